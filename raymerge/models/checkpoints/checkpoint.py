"""An opened checkpoint: names, shapes and dtypes of its tensors, and a way to read each in parts.

Opening a checkpoint reads headers only; tensors are read column by column into memory that the
caller owns, so K open checkpoints cost no memory. Each format has a reader in a module of its own;
``opening`` chooses among them.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from raymerge.errors import CheckpointError, one_line

_SPARE_FILES = 32

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_NUMBERS = 1 << 48
_MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor, as a header states them."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def is_size(value: object) -> bool:
    """Return whether a value from a file can be the size of a dimension, or a count of numbers."""
    return type(value) is int and 0 <= value < _MAX_NUMBERS


def is_shape(value: object) -> bool:
    """Return whether a value from a file is a shape of few enough numbers, its zeros left out."""
    return (
        isinstance(value, tuple | list)
        and len(value) <= _MAX_DIMENSIONS
        and all(map(is_size, value))
        and is_size(math.prod(max(1, size) for size in value))
    )


@lru_cache
def is_convertible(dtype: torch.dtype) -> bool:
    """Return whether torch converts numbers of a dtype to others: not float4, bits or qint8."""
    try:
        torch.empty(1, dtype=torch.complex64).copy_(torch.empty(1, dtype=dtype))
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


class Checkpoint(Protocol):
    """An opened state dict: headers in memory, tensors read on request."""

    path: Path
    kind: str
    """The format, as ``raymerge inspect`` prints it."""
    specs: Mapping[str, TensorSpec]

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        """Write columns ``start:start + n`` of the flattened tensor into ``out_n`` (CPU, any
        floating dtype). Raises :class:`CheckpointError` for a damaged file."""
        ...


@runtime_checkable
class Partial(Checkpoint, Protocol):
    """A checkpoint that needs the pretrained model: an adapter, or a tower without projection."""

    def complete(self, base: Checkpoint, prefix: str) -> Checkpoint:
        """Return the whole visual tower as ``visual.*``; that of ``base`` is ``prefix*``. Raises
        :class:`CheckpointError` if the two do not fit."""
        ...


def chosen_prefix(checkpoint: Checkpoint) -> str:
    """Return the prefix of the keys in the file that a view has chosen, empty if it has not."""
    return getattr(checkpoint, "chosen", "")


def other_prefixes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the prefixes of the models in the file that a view has not chosen."""
    return getattr(checkpoint, "others", ())


class ViewCheckpoint:
    """A checkpoint whose tensors lie in others, under names of their own.

    ``origins``: name → the checkpoint that holds the tensor, and its key there.
    """

    def __init__(
        self, path: Path, kind: str, origins: Mapping[str, tuple[Checkpoint, str]]
    ) -> None:
        self.path, self.kind, self._origins = path, kind, origins
        self.specs: Mapping[str, TensorSpec] = {
            name: checkpoint.specs[key] for name, (checkpoint, key) in origins.items()
        }

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        checkpoint, stored_key = self._origins[key]
        checkpoint.fill(stored_key, start, out_n)


def read_tensor(checkpoint: Checkpoint, key: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return one whole tensor on the CPU, in ``dtype`` or the stored one."""
    spec = checkpoint.specs[key]
    out_n = torch.empty(spec.numel, dtype=dtype or spec.dtype)
    checkpoint.fill(key, 0, out_n)
    return out_n.view(spec.shape)


def open_file(path: Path) -> FileIO:
    """Open a file for reading, and raise the process's limit on open files where it is near.

    A thousand experts are more files than a process may open by default.
    """
    file = path.open("rb", buffering=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if file.fileno() > soft - _SPARE_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return file


def read_at(file: FileIO, position: int, out_n: Tensor) -> None:
    """Fill a contiguous tensor with the bytes from ``position`` on. Raises :class:`OSError` if the
    file ends first."""
    remaining = memoryview(out_n.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while len(remaining):
        count = os.preadv(file.fileno(), [remaining], position)
        if not count:
            raise OSError("the file ends early")
        remaining, position = remaining[count:], position + count


def read_converted(
    out_n: Tensor, dtype: torch.dtype, read: Callable[[Tensor], None], what: str
) -> None:
    """Fill ``out_n`` with numbers that are stored as ``dtype``.

    ``read`` fills a contiguous tensor of that dtype: ``out_n`` itself where it is one. Raises
    :class:`CheckpointError` with ``what`` (file and tensor) where ``read`` raises OSError.
    """
    is_direct = out_n.dtype == dtype and out_n.is_contiguous()
    values_n = out_n if is_direct else torch.empty(len(out_n), dtype=dtype)
    try:
        read(values_n)
    except OSError as error:
        raise CheckpointError(
            f"{what} cannot be read ({one_line(error)}); fetch it again"
        ) from error
    if not is_direct:
        out_n.copy_(values_n)
