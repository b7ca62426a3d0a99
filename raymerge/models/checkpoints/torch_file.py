"""Torch files, through ``torch.load(weights_only=True)``: nothing in them can run code.

``pickled`` reads the files that this loader does not take.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymerge.errors import CheckpointError
from raymerge.models.checkpoints.checkpoint import Checkpoint, TensorSpec, state_dict
from raymerge.models.checkpoints.pickle_containers import ZIP_MAGIC
from raymerge.models.checkpoints.pickled import PickledCheckpoint


def open_torch(path: Path) -> Checkpoint:
    """Open a torch file or a pickle: through torch's own safe loader, else as a pickled module."""
    try:
        value = _load_weights_only(path)
    except Exception:  # a damaged pickle fails anywhere: struct.error, EOFError, …
        return PickledCheckpoint(path)
    return TorchCheckpoint(path, value)


def _load_weights_only(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    with warnings.catch_warnings():  # torch warns about odd pickles before it refuses them
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


class TorchCheckpoint:
    """A ``torch.save`` file that torch's own safe loader takes."""

    kind = "torch"

    def __init__(self, path: Path, value: Any) -> None:
        self.path = path
        self._tensors = state_dict(value, path, Tensor)
        size = path.stat().st_size
        for key, tensor in self._tensors.items():
            _require_stored(tensor, size, f"checkpoint {path}: {key}")
        self.specs: Mapping[str, TensorSpec] = {
            key: TensorSpec(tuple(t.shape), t.dtype) for key, t in self._tensors.items()
        }

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        stored = self._tensors[key].detach().reshape(-1)
        out_n.copy_(stored[start : start + len(out_n)])


def _require_stored(tensor: Tensor, size: int, what: str) -> None:
    """Raise unless a tensor is a plain array whose numbers all lie in a file of ``size`` bytes.

    torch enlarges a storage to the size that a tensor claims, and repeats a number as often as its
    strides say.
    """
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise CheckpointError(f"{what} is sparse, quantized or without numbers; save it dense")
    claimed = tensor.numel() * tensor.element_size()
    if max(claimed, tensor.untyped_storage().nbytes()) > size:
        raise CheckpointError(
            f"{what} claims {claimed:,} bytes, and the file has {size:,}; save it contiguous"
        )
