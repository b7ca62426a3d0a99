"""An opened checkpoint: names, shapes and types of its tensors, and a way to read each by parts.

The readers of the single formats build on this; ``opening`` chooses among them.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from raymerge.errors import CheckpointError

_TensorT = TypeVar("_TensorT")


_NESTED = ("state_dict", "model_state_dict")


_SPARE_FILES = 32


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint(Protocol):
    """An opened state dict: headers in memory, tensors read when asked for."""

    path: Path
    kind: str
    specs: Mapping[str, TensorSpec]

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        """Write columns ``start:start + n`` of the flattened tensor into ``out_n`` (CPU, any
        floating dtype). Raises :class:`CheckpointError` for a damaged file."""
        ...


@runtime_checkable
class Partial(Checkpoint, Protocol):
    """A checkpoint that leaves something to the pretrained model: an adapter, a bare tower."""

    def over(self, base: Checkpoint, prefix: str) -> Checkpoint:
        """The whole visual tower, ``visual.*``; that of ``base`` is ``prefix*``. Raises
        :class:`CheckpointError` if the two do not fit."""
        ...


def read_tensor(checkpoint: Checkpoint, key: str, dtype: torch.dtype | None = None) -> Tensor:
    """One whole tensor on the CPU, in its stored dtype unless another is given."""
    spec = checkpoint.specs[key]
    out_n = torch.empty(math.prod(spec.shape), dtype=dtype or spec.dtype)
    checkpoint.fill(key, 0, out_n)
    return out_n.view(spec.shape)


def open_file(path: Path) -> FileIO:
    """Open for reading; a thousand experts are more files than a process may open by default."""
    file = path.open("rb", buffering=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if file.fileno() > soft - _SPARE_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return file


def read_at(file: FileIO, position: int, out_n: Tensor) -> None:
    """Fill a contiguous tensor from there on. Raises :class:`OSError` if the file ends first."""
    left = memoryview(out_n.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while len(left):
        count = os.preadv(file.fileno(), [left], position)
        if not count:
            raise OSError("the file ends early")
        left, position = left[count:], position + count


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def state_dict(loaded: Any, path: Path, kind: type[_TensorT]) -> dict[str, _TensorT]:
    """The tensors by name, of what a file holds. Raises :class:`CheckpointError`."""
    for key in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"checkpoint {path}: holds a {type(loaded).__name__}, not a state dict (name → tensor)"
        )
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, kind)}
    if not tensors:
        raise CheckpointError(f"checkpoint {path}: holds no tensor; expected a state dict")
    return tensors
