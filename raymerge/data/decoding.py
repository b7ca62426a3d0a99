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
from torch import Tensor

from raymerge.data.images import (
    DECODE_ERRORS,
    ImageList,
    Item,
    as_8_bit,
    decoding,
    open_image,
)
from raymerge.errors import DataError, one_line

if TYPE_CHECKING:
    from raymerge.data.preprocess import Preprocess

_TAIL_BYTES = 1024
_JPEG_END = b"\xff\xd9"
_WIDE = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def decode(item: Item, preprocess: Preprocess) -> Tensor:
    """Return (3, H, W) uint8; raises :class:`DataError` naming the image."""
    try:
        with open_image(item) as image, decoding(image):
            return preprocess.to_pixels(as_8_bit(image))
    except DECODE_ERRORS as error:
        raise damage_error(item, error) from error


def check_image(item: Item) -> DataError | None:
    """Return the error of a damaged image, or None, without decoding an intact one.

    A PNG has checksums and a JPEG an end marker; anything else is decoded to be sure, and so are
    pixels of other than 8 bits.
    """
    try:
        with open_image(item) as image:
            kind, is_plain = image.format, image.mode not in _WIDE
            if kind == "PNG" and is_plain:
                image.verify()
                return None
        if kind == "JPEG" and _JPEG_END in _tail(item):
            return None
        with open_image(item) as image, decoding(image):
            as_8_bit(image).load()
    except DECODE_ERRORS as error:
        return damage_error(item, error)
    except DataError as error:
        return error
    return None


def damage_error(item: Item, error: Exception) -> DataError:
    return DataError(f"image {item}: does not decode ({one_line(error)}); replace or remove it")


def _tail(item: Item) -> bytes:
    """Return the last bytes of an image's file."""
    if not isinstance(item, Path):
        return (item.encoded() or b"")[-_TAIL_BYTES:]
    with item.open("rb") as file:
        file.seek(max(0, item.stat().st_size - _TAIL_BYTES))
        return file.read()


def decode_all(
    items: Sequence[Item],
    preprocess: Preprocess,
    progress: Callable[[int], None] | None = None,
    threads: int | None = None,
) -> Tensor:
    """Return (N, 3, H, W) uint8 in the order of ``items``; ``threads``: default one per core."""
    height, width = preprocess.size
    out_N3HW = torch.empty(len(items), 3, height, width, dtype=torch.uint8)

    def work(i: int) -> None:
        out_N3HW[i] = decode(items[i], preprocess)

    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for _ in pool.map(work, range(len(items))):
            if progress is not None:
                progress(1)
    return out_N3HW


def decode_batches(
    items: Sequence[Item], preprocess: Preprocess, batch: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first index, uint8 images) of each batch; the next one is decoded meanwhile."""
    with ThreadPoolExecutor(1) as ahead:
        job = ahead.submit(decode_all, items[:batch], preprocess)
        for start in range(0, len(items), batch):
            pixels_B3HW = job.result()
            following = items[start + batch : start + 2 * batch]
            if following:
                job = ahead.submit(decode_all, following, preprocess)
            yield start, pixels_B3HW


class PinnedImages:
    """The images of one task that a worker's slots need, decoded once and kept in memory."""

    def __init__(
        self,
        images: ImageList,
        needed: NDArray[np.int64],
        preprocess: Preprocess,
        progress: Callable[[int], None] | None = None,
        threads: int | None = None,
    ) -> None:
        self._needed = np.unique(needed)
        items = [images.items[i] for i in self._needed]
        self._pixels_N3HW = decode_all(items, preprocess, progress, threads)

    def holds(self, indices: NDArray[np.int64]) -> bool:
        """Return whether all of these images are pinned."""
        return bool(np.isin(indices, self._needed).all())

    def take(self, indices: NDArray[np.int64]) -> Tensor:
        """Return (len(indices), 3, H, W) uint8, by index in the task's image list."""
        return self._pixels_N3HW[torch.from_numpy(np.searchsorted(self._needed, indices))]

    def __len__(self) -> int:
        return len(self._pixels_N3HW)

    @property
    def nbytes(self) -> int:
        return self._pixels_N3HW.numel()
