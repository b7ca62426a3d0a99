"""Safetensors files, read and written in parts, so that no model is held whole.

The format's own library (https://github.com/huggingface/safetensors#format) checks headers here;
it reads and writes whole tensors only, so the bytes are read and written by position.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from raymerge.errors import CheckpointError, excerpt, one_line
from raymerge.files.atomic import reserve_space
from raymerge.models.checkpoints.checkpoint import (
    SAFETENSORS_DTYPES,
    TensorSpec,
    is_shape,
    open_file,
    read_at,
    read_converted,
)

_MAX_HEADER_BYTES = 1 << 27  # the library allows 100 MB
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


# --- reading -------------------------------------------------------------------------------------


def is_safetensors(path: Path, head: bytes) -> bool:
    """Return whether a file is one of safetensors: by its suffix, or by the JSON header's brace
    after eight bytes of length."""
    return path.suffix == ".safetensors" or head[8:9] == b"{"


class SafetensorsCheckpoint:
    """A safetensors file: checked by its own library, read with positioned reads.

    It is not memory-mapped: mapped pages count as this process's memory until the mapping closes,
    which adds up to K whole models.
    """

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_file(path)
            first, header = _read_header(self._file)
            self.specs: Mapping[str, TensorSpec] = {
                key: _spec(key, entry) for key, entry in header.items()
            }
            self._starts = {key: first + e["data_offsets"][0] for key, e in header.items()}
        except Exception as error:  # a damaged header fails anywhere: KeyError, RecursionError, …
            raise CheckpointError(
                f"checkpoint {path}: damaged safetensors file ({one_line(error)}); fetch it again"
            ) from error

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        dtype = self.specs[key].dtype
        position = self._starts[key] + start * dtype.itemsize
        what = f"checkpoint {self.path}: {key}"
        read_converted(out_n, dtype, lambda n: read_at(self._file, position, n), what)


def _spec(key: str, entry: Mapping[str, Any]) -> TensorSpec:
    """Return what the header says of a tensor. Raises :class:`ValueError`."""
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise ValueError(f"{excerpt(key)} is {excerpt(entry['dtype'])}, which torch cannot read")
    if not is_shape(entry["shape"]):
        raise ValueError(f"{excerpt(key)} has the shape {excerpt(entry['shape'])}")
    return TensorSpec(tuple(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]])


def _read_header(file: FileIO) -> tuple[int, Mapping[str, Any]]:
    """Return where the tensors' bytes start, and the header's entries by key, sorted.

    The library checks the header against the file's size. It maps what it checks, and a mapped
    file that is cut meanwhile ends the process; so it is given a copy of the header alone, with as
    much empty room after it, which takes no memory, as the file has.
    """
    fd = file.fileno()
    size, length = os.fstat(fd).st_size, int.from_bytes(os.pread(fd, 8, 0), "little")
    head = os.pread(fd, min(8 + length, size, _MAX_HEADER_BYTES), 0)
    with tempfile.NamedTemporaryFile(prefix="raymerge-") as copy:
        copy.write(head)
        copy.truncate(size)
        with safe_open(copy.name, framework="pt"):
            header = json.loads(head[8:])
    header.pop("__metadata__", None)
    return 8 + length, dict(sorted(header.items()))


# --- writing -------------------------------------------------------------------------------------


class SafetensorsWriter:
    """A safetensors file with room for all tensors; the caller writes every part before closing.

    Opening raises :class:`OSError` if the disk has no room.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        header, starts, size = _header(specs)
        self._starts = starts
        self._file = path.open("wb", buffering=0)
        reserve_space(self._file.fileno(), len(header) + size)
        self._pwrite(memoryview(header), 0)
        self._base = len(header)

    def write(self, name: str, start: int, values_n: Tensor) -> None:
        """Write columns ``start:start + n`` of a flattened tensor (CPU, in the stored dtype)."""
        raw = values_n.contiguous().reshape(-1).view(torch.uint8).numpy()
        position = self._base + self._starts[name] + start * values_n.element_size()
        self._pwrite(memoryview(raw), position)  # type: ignore[arg-type]

    def _pwrite(self, remaining: memoryview, position: int) -> None:
        while len(remaining):
            count = os.pwrite(self._file.fileno(), remaining, position)
            remaining, position = remaining[count:], position + count

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """Return the header's bytes, where each tensor starts after them, and the bytes of all
    tensors."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    # Wide dtypes come first, as in the library, so that every tensor is aligned to its dtype.
    for name in sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name)):
        spec = specs[name]
        end = position + spec.nbytes
        entries[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        starts[name], position = position, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts, position
