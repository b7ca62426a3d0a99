"""Memory for the task vectors: in float32 or bfloat16, on the device, in RAM, or in a mapped file.

Legend: K tasks, C cells of a shard, n = CELL columns of each.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from raymerge.errors import RunError
from raymerge.files import claim
from raymerge.merging.layout import CELL
from raymerge.messages import VectorStorage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def allocate(storage: VectorStorage, cells: int, tasks: int, device: torch.device) -> Tensor:
    """(C, K, CELL) zeros. Raises :class:`RunError` when the disk has no room for them."""
    shape, dtype = (cells, tasks, CELL), DTYPES[storage.dtype]
    if storage.location == "disk":
        return _mapped(storage.folder, cells * tasks * CELL, dtype).view(shape)
    if storage.location == "host" and device.type == "cuda":
        return torch.zeros(shape, dtype=dtype, pin_memory=True)
    return torch.zeros(shape, dtype=dtype, device=device)


def _mapped(folder: str | None, count: int, dtype: torch.dtype) -> Tensor:
    """A shared mapping of a file that has no name any more, so that it ends with this process."""
    try:
        handle, name = tempfile.mkstemp(prefix="raymerge-vectors-", dir=folder)
    except OSError as error:
        raise RunError(f"vectors.folder {folder}: cannot be written: {error.strerror}") from error
    try:
        # Claimed now: a mapping that finds the disk full later ends the process without a word.
        claim(handle, count * dtype.itemsize)
        return torch.from_file(name, shared=True, size=count, dtype=dtype)
    except OSError as error:
        raise RunError(
            f"vectors.folder {folder or tempfile.gettempdir()}: no room for "
            f"{count * dtype.itemsize / 1e9:.1f} GB of task vectors ({error.strerror}); name "
            "another folder"
        ) from error
    finally:
        os.close(handle)
        Path(name).unlink()
