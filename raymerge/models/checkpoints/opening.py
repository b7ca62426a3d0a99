"""Open a checkpoint in any format, recognised by its content and not by its name.

A checkpoint is a container (the file format) in which tensors lie under a layout of keys (the
library that named them). Both are rows of a table here, the first match wins, and a new format is a
new row; reading is left to the format's own module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from raymerge.errors import CheckpointError
from raymerge.models.checkpoints.checkpoint import Checkpoint, TensorSpec
from raymerge.models.checkpoints.huggingface import HuggingFaceCheckpoint, is_huggingface
from raymerge.models.checkpoints.locate import is_index, locate
from raymerge.models.checkpoints.lora import LoraCheckpoint, is_adapter
from raymerge.models.checkpoints.safetensors_file import SafetensorsCheckpoint, is_safetensors
from raymerge.models.checkpoints.sharded import open_sharded
from raymerge.models.checkpoints.torch_file import open_torch

_Specs = Mapping[str, TensorSpec]

_HEAD_BYTES = 9  # of a safetensors file: the length of its header, and the header's first byte

# A container by the path and the first bytes of its file.
_CONTAINERS: Sequence[tuple[Callable[[Path, bytes], bool], Callable[[Path], Checkpoint]]] = (
    (lambda path, head: is_index(path), lambda path: open_sharded(path, _open_container)),
    (is_safetensors, SafetensorsCheckpoint),
    (lambda path, head: True, open_torch),
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
    """Open a checkpoint under the names that the file itself has."""
    return _open_container(locate(str(reference)))


def _open_container(path: Path) -> Checkpoint:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"checkpoint {path}: the file is empty; fetch it again")
    return next(open_file for matches, open_file in _CONTAINERS if matches(path, head))(path)
