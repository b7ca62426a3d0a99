"""Decoding: files → uint8 tensors at the model's resolution, on all cores, once.

Legend: N images, H × W the model's resolution.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from raymerge.data.folder import ImageList
from raymerge.errors import DataError

if TYPE_CHECKING:
    from raymerge.models import Preprocess

_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def decode(path: Path, preprocess: Preprocess) -> Tensor:
    """(3, H, W) uint8. Raises :class:`DataError` naming the file."""
    try:
        with Image.open(path) as image:
            return preprocess.to_pixels(image)
    except _DECODE_ERRORS as error:
        raise _damaged(path, error) from error


def check_image(path: Path) -> DataError | None:
    """What is wrong with this image file, if anything, without decoding a sound one.

    A PNG has checksums and a JPEG an end marker; anything else is decoded to be sure.
    """
    try:
        with Image.open(path) as image:
            kind = image.format
            image.verify()
        if kind != "PNG" and not (kind == "JPEG" and _has_end_marker(path)):
            with Image.open(path) as image:
                image.load()
    except _DECODE_ERRORS as error:
        return _damaged(path, error)
    return None


def _damaged(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return DataError(f"image {path}: does not decode ({reason}); replace or remove it")


def _has_end_marker(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        return b"\xff\xd9" in file.read()


def decode_all(
    paths: Sequence[Path],
    preprocess: Preprocess,
    progress: Callable[[int], None] | None = None,
    threads: int | None = None,
) -> Tensor:
    """(N, 3, H, W) uint8, in the order of ``paths``; ``threads``: default one per core."""
    height, width = preprocess.size
    out_N3HW = torch.empty(len(paths), 3, height, width, dtype=torch.uint8)

    def work(i: int) -> None:
        out_N3HW[i] = decode(paths[i], preprocess)

    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for _ in pool.map(work, range(len(paths))):
            if progress is not None:
                progress(1)
    return out_N3HW


def decode_batches(
    paths: Sequence[Path], preprocess: Preprocess, batch: int
) -> Iterator[tuple[int, Tensor]]:
    """(first index, uint8 images) per batch; the next batch decodes while one is used."""
    with ThreadPoolExecutor(1) as ahead:
        job = ahead.submit(decode_all, paths[:batch], preprocess)
        for start in range(0, len(paths), batch):
            pixels_B3HW = job.result()
            following = paths[start + batch : start + 2 * batch]
            if following:
                job = ahead.submit(decode_all, following, preprocess)
            yield start, pixels_B3HW


class PinnedImages:
    """The images of one task that a worker's slots will ever need, decoded once, kept in memory."""

    def __init__(
        self,
        images: ImageList,
        needed: NDArray[np.int64],
        preprocess: Preprocess,
        progress: Callable[[int], None] | None = None,
        threads: int | None = None,
    ) -> None:
        self._needed = np.unique(needed)
        paths = [images.paths[i] for i in self._needed]
        self._pixels_N3HW = decode_all(paths, preprocess, progress, threads)

    def holds(self, indices: NDArray[np.int64]) -> bool:
        """Whether every one of these images is pinned."""
        return bool(np.isin(indices, self._needed).all())

    def take(self, indices: NDArray[np.int64]) -> Tensor:
        """(len(indices), 3, H, W) uint8, by index in the task's image list."""
        return self._pixels_N3HW[torch.from_numpy(np.searchsorted(self._needed, indices))]

    def __len__(self) -> int:
        return len(self._pixels_N3HW)

    @property
    def nbytes(self) -> int:
        return self._pixels_N3HW.numel()
