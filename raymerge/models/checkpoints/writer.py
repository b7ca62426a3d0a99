"""Writing a ``.safetensors`` file part by part, so that a model is never held to be written.

Format: https://github.com/huggingface/safetensors#format. Its own library writes whole tensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from raymerge.files.atomic import reserve_space
from raymerge.models.checkpoints.checkpoint import SAFETENSORS_DTYPES, TensorSpec

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class SafetensorsWriter:
    """Opens ``path`` with room for all tensors; every part must be written before it closes.

    Raises :class:`OSError` as soon as it opens when the disk has no room.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        header, starts, size = _header(specs)
        self._starts = starts
        self._file = path.open("wb", buffering=0)
        reserve_space(self._file.fileno(), len(header) + size)
        self._pwrite(memoryview(header), 0)
        self._base = len(header)

    def write(self, name: str, start: int, values_n: Tensor) -> None:
        """Columns ``start:start + n`` of the flattened tensor, in its dtype, on the CPU."""
        raw = values_n.contiguous().reshape(-1).view(torch.uint8).numpy()
        position = self._base + self._starts[name] + start * values_n.element_size()
        self._pwrite(memoryview(raw), position)  # type: ignore[arg-type]

    def _pwrite(self, left: memoryview, position: int) -> None:
        while len(left):
            count = os.pwrite(self._file.fileno(), left, position)
            left, position = left[count:], position + count

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def _header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """The file's first bytes, where each tensor starts after them, and the bytes of all tensors."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    # Wide dtypes first, as the library does, so that every tensor is aligned to its dtype.
    for name in sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name)):
        spec = specs[name]
        end = position + math.prod(spec.shape) * spec.dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        starts[name], position = position, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts, position
