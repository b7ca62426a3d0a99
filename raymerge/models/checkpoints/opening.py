"""Open a checkpoint in any format, recognised by its content and not by its name.

A checkpoint is a container (the file format) in which tensors lie under a layout of keys (the
library that named them). Both are rows of a table here, the first match wins, and a new format is a
new row; reading is left to the format's own module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from raymerge.errors import CheckpointError, unknown_name
from raymerge.models.checkpoints.checkpoint import Checkpoint, TensorSpec, ViewCheckpoint
from raymerge.models.checkpoints.foreign import HEAD_BYTES, require_checkpoint
from raymerge.models.checkpoints.huggingface import HuggingFaceCheckpoint, is_huggingface
from raymerge.models.checkpoints.locate import is_index, locate, split_part
from raymerge.models.checkpoints.lora import LoraCheckpoint, is_adapter
from raymerge.models.checkpoints.pickled import PickledCheckpoint
from raymerge.models.checkpoints.safetensors_file import SafetensorsCheckpoint, is_safetensors
from raymerge.models.checkpoints.sharded import open_sharded

_Specs = Mapping[str, TensorSpec]
_STATE_DICTS = ("state_dict", "model_state_dict")

# A container by the path and the first bytes of its file.
_CONTAINERS: Sequence[tuple[Callable[[Path, bytes], bool], Callable[[Path], Checkpoint]]] = (
    (lambda path, head: is_index(path), lambda path: open_sharded(path, _open_container)),
    (is_safetensors, SafetensorsCheckpoint),
    (lambda path, head: True, PickledCheckpoint),
)
# A layout by the keys in the container.
_LAYOUTS: Sequence[tuple[Callable[[_Specs], bool], Callable[[Checkpoint], Checkpoint]]] = (
    (is_adapter, LoraCheckpoint),
    (is_huggingface, HuggingFaceCheckpoint),
    (lambda specs: True, lambda checkpoint: checkpoint),
)


def open_checkpoint(reference: str | Path) -> Checkpoint:
    """Open a checkpoint under open_clip's names; a LoRA adapter under its own.

    Raises :class:`CheckpointError` for missing, damaged or unsafe files.
    """
    checkpoint = open_stored(reference)
    return next(present for matches, present in _LAYOUTS if matches(checkpoint.specs))(checkpoint)


def open_stored(reference: str | Path) -> Checkpoint:
    """Open a checkpoint, or the part of it that the reference names, under the file's own names."""
    place, part = split_part(str(reference))
    checkpoint = _open_container(locate(place))
    return _part_of(checkpoint, part) if part else checkpoint


def open_state_dict(reference: str | Path) -> Checkpoint:
    """Open a checkpoint as :func:`open_stored` does; of a state dict that training code has saved
    beside other tensors, the state dict alone."""
    checkpoint = open_stored(reference)
    for part in _STATE_DICTS:
        if any(key.startswith(f"{part}.") for key in checkpoint.specs):
            return _part_of(checkpoint, part)
    return checkpoint


def _part_of(checkpoint: Checkpoint, part: str) -> Checkpoint:
    """Return the tensors whose keys start with ``part`` and a dot, under what follows."""
    start, root = part.rstrip(".") + ".", getattr(checkpoint, "root", "")
    if root.startswith(start):  # what is opened lies in that part alone
        return checkpoint
    start = start.removeprefix(root)
    keys = [key for key in checkpoint.specs if key.startswith(start)]
    if not keys:
        parts = {key.partition(".")[0] for key in checkpoint.specs if "." in key}
        raise CheckpointError(f"checkpoint {checkpoint.path}: #{unknown_name(part, sorted(parts))}")
    origins = {key.removeprefix(start): (checkpoint, key) for key in keys}
    return ViewCheckpoint(checkpoint.path, checkpoint.kind, origins)


def _open_container(path: Path) -> Checkpoint:
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path}: cannot be read: {error.strerror}; check the path"
        ) from error
    if not head:
        raise CheckpointError(f"checkpoint {path}: the file is empty; fetch it again")
    if not is_index(path):
        require_checkpoint(path, head)
    return next(open_file for matches, open_file in _CONTAINERS if matches(path, head))(path)
