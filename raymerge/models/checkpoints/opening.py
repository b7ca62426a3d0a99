"""Open a state dict without reading its tensors: safetensors, or torch files through weights_only.

The kind is detected from the content, not from the name. Only the columns that are asked for are
read, into memory that the caller owns, so opening K checkpoints costs no memory.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from raymerge.errors import CheckpointError, one_line
from raymerge.models.checkpoints.checkpoint import (
    SAFETENSORS_DTYPES,
    Checkpoint,
    TensorSpec,
    open_file,
    read_at,
    state_dict,
)
from raymerge.models.checkpoints.locate import locate

_ZIP_MAGIC = b"PK\x03\x04"


class SafetensorsCheckpoint:
    """A ``.safetensors`` file: checked by its own library, read with positioned reads.

    Not memory-mapped: pages of a mapping count as this process's memory until it is closed, K
    whole models in the end.
    """

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_file(path)
            with safe_open(path, framework="pt") as file:  # checks the header against the size
                self.specs: Mapping[str, TensorSpec] = {
                    key: _slice_spec(file.get_slice(key))
                    for key in file.keys()  # noqa: SIM118
                }
            self._starts = _data_starts(path)
        except Exception as error:  # a damaged header fails anywhere: KeyError, RecursionError, …
            raise CheckpointError(
                f"checkpoint {path}: damaged safetensors file ({one_line(error)}); fetch it again"
            ) from error

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        dtype = self.specs[key].dtype
        same = out_n.dtype == dtype and out_n.is_contiguous()
        values_n = out_n if same else torch.empty(len(out_n), dtype=dtype)
        try:
            read_at(self._file, self._starts[key] + start * dtype.itemsize, values_n)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {self.path}: {key} cannot be read ({one_line(error)}); fetch it again"
            ) from error
        if not same:
            out_n.copy_(values_n)


class TorchCheckpoint:
    """A ``torch.save`` file, through ``weights_only=True``: nothing in it can run code."""

    kind = "torch"

    def __init__(self, path: Path, loaded: Any) -> None:
        self.path = path
        self._tensors = state_dict(loaded, path, Tensor)
        size = path.stat().st_size
        for key, tensor in self._tensors.items():
            _require_stored(tensor, size, f"checkpoint {path}: {key}")
        self.specs: Mapping[str, TensorSpec] = {
            key: TensorSpec(tuple(t.shape), t.dtype) for key, t in self._tensors.items()
        }

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        stored = self._tensors[key].detach().reshape(-1)
        out_n.copy_(stored[start : start + len(out_n)])


def _require_stored(tensor: Tensor, size: int, where: str) -> None:
    """Raise for what is no plain array of numbers that the file of ``size`` bytes holds.

    torch enlarges a storage to what a tensor claims, and repeats one number as often as it says.
    """
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise CheckpointError(f"{where} is sparse, quantized or without numbers; save it dense")
    claimed = tensor.numel() * tensor.element_size()
    if max(claimed, tensor.untyped_storage().nbytes()) > size:
        raise CheckpointError(
            f"{where} claims {claimed:,} bytes, and the file has {size:,}; save it contiguous"
        )


def open_checkpoint(reference: str | Path) -> Checkpoint:
    """Open by content. Raises :class:`CheckpointError` for missing, damaged or unsafe files.

    Hugging Face's models are presented under open_clip's names, PEFT's adapters as what they are.
    """
    return _presented(open_stored(reference))


def open_stored(reference: str | Path) -> Checkpoint:
    """The same under the names that the file itself has."""
    path = locate(str(reference))
    return _open_index(path) if path.name.endswith(".index.json") else _open(path)


def _presented(checkpoint: Checkpoint) -> Checkpoint:
    from raymerge.models.checkpoints.huggingface import HuggingFaceCheckpoint, vision_prefix
    from raymerge.models.checkpoints.lora import LoraCheckpoint, is_adapter

    if is_adapter(checkpoint.specs):
        return LoraCheckpoint(checkpoint)
    prefix = vision_prefix(checkpoint.specs)
    return checkpoint if prefix is None else HuggingFaceCheckpoint(checkpoint, prefix)


def _open_index(path: Path) -> Checkpoint:
    from raymerge.models.checkpoints.huggingface import ShardedCheckpoint

    return ShardedCheckpoint(path, _open)


def _open(path: Path) -> Checkpoint:
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"checkpoint {path}: the file is empty; fetch it again")
    if path.suffix == ".safetensors" or (len(head) == 9 and head[8:9] == b"{"):
        return SafetensorsCheckpoint(path)
    return _open_torch(path)


def _open_torch(path: Path) -> Checkpoint:
    """Through torch's own safe reader; what it does not take is a pickled module, or refused."""
    try:
        loaded = _load_weights_only(path)
    except Exception:  # a damaged pickle fails anywhere: struct.error, EOFError, …
        from raymerge.models.checkpoints.pickled import PickledCheckpoint

        return PickledCheckpoint(path)
    return TorchCheckpoint(path, loaded)


def _data_starts(path: Path) -> dict[str, int]:
    """Where each tensor's bytes start in a file whose header has been checked."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        key: 8 + length + int(entry["data_offsets"][0])
        for key, entry in header.items()
        if key != "__metadata__"
    }


def _slice_spec(piece: Any) -> TensorSpec:
    return TensorSpec(tuple(piece.get_shape()), SAFETENSORS_DTYPES[piece.get_dtype()])


def _load_weights_only(path: Path) -> Any:
    with path.open("rb") as file:
        zipped = file.read(4) == _ZIP_MAGIC
    with warnings.catch_warnings():  # torch warns of odd pickles before it refuses them
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
