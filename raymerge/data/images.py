"""A task's images: files, or rows of a stored data set, behind one interface."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
"""The errors that Pillow raises for damaged images."""

FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are opened: by its content, an EPS named .jpg would run in Ghostscript."""


_ANY_PIXELS = 1 << 24
_PIXELS_PER_BYTE = 1 << 13
_WHITE_8, _WHITE_16 = (1 << 8) - 1, (1 << 16) - 1
_BITS_PER_SAMPLE = 258  # the tag of a TIFF; cameras and microscopes store 12 of 16
_LARGE = Lock()


@dataclass(frozen=True)
class Labels:
    """(N,) class numbers as they are stored; ``names[number]`` is a class, None if not known."""

    numbers: NDArray[np.int64]
    names: tuple[str, ...] | None = None
    are_texts: bool = False
    """True if the names are all that is stored, so that the numbers mean nothing by themselves."""


class Source(Protocol):
    """A stored data set of N images: hashable, and small to pickle.

    Another process opens the data for itself. Several threads may call the methods at once. All
    raise :class:`~raymerge.errors.DataError`.
    """

    def __len__(self) -> int:
        """Return N."""
        ...

    def key(self, row: int) -> str:
        """Return a text that identifies an image independently of the data set's folder."""
        ...

    def name(self, row: int) -> str:
        """Return the name of an image for error messages."""
        ...

    def encoded(self, row: int) -> bytes | None:
        """Return an image's file; None if only its pixels are stored."""
        ...

    def image(self, row: int) -> Image.Image:
        """Return an image; an encoded one is not decoded yet."""
        ...

    def labels(self) -> Labels: ...


@dataclass(frozen=True)
class StoredImage:
    """One image of a data set, for any process to open."""

    source: Source
    row: int

    def open(self) -> Image.Image:
        return self.source.image(self.row)

    def encoded(self) -> bytes | None:
        return self.source.encoded(self.row)

    @property
    def key(self) -> str:
        return self.source.key(self.row)

    def __str__(self) -> str:
        return self.source.name(self.row)


Item: TypeAlias = Path | StoredImage


class StoredImages(Sequence[Item]):
    """Rows of a data set in a given order; only their numbers are kept in memory."""

    def __init__(self, source: Source, rows: NDArray[np.int64]) -> None:
        self.source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> StoredImage: ...
    @overload
    def __getitem__(self, index: slice) -> StoredImages: ...
    def __getitem__(self, index: int | slice) -> StoredImage | StoredImages:
        if isinstance(index, slice):
            return StoredImages(self.source, self._rows[index])
        return StoredImage(self.source, int(self._rows[index]))


@dataclass(frozen=True)
class ImageList:
    """Images in a fixed order; ``labels[i]`` is the class of ``items[i]``, −1 if unlabeled."""

    items: Sequence[Item]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.items)

    def keys(self, folder: str) -> list[str]:
        """Return texts that identify the images independently of their ``folder``."""
        return [
            str(item.relative_to(folder)) if isinstance(item, Path) else f"{item.key} {label}"
            for item, label in zip(self.items, self.labels, strict=True)
        ]


def open_image(item: Item) -> Image.Image:
    """Open an image, not yet decoded; raises one of ``DECODE_ERRORS`` or :class:`DataError`."""
    if not isinstance(item, Path):
        return item.open()
    return _bounded(Image.open(item, formats=FORMATS), item.stat().st_size)


def open_encoded(content: bytes) -> Image.Image:
    """Open an image whose file is in memory."""
    return _bounded(Image.open(io.BytesIO(content), formats=FORMATS), len(content))


def _bounded(image: Image.Image, encoded_bytes: int) -> Image.Image:
    """Return an image if its file can hold so many pixels. Raises :class:`ValueError`.

    No format packs more than some thousands of pixels into a byte; decoding a forged header's
    millions would take gigabytes, once for each core.
    """
    pixels = image.width * image.height
    if pixels > max(_ANY_PIXELS, _PIXELS_PER_BYTE * encoded_bytes):
        raise ValueError(
            f"{image.width} x {image.height} pixels in {encoded_bytes:,} bytes, which no image has"
        )
    return image


@contextmanager
def decoding(image: Image.Image) -> Iterator[Image.Image]:
    """Yield an image to decode; of enormous ones, one at a time."""
    with _LARGE if image.width * image.height > _ANY_PIXELS else nullcontext():
        yield image


def as_8_bit(image: Image.Image) -> Image.Image:
    """Return an image of 8 bits a channel; deeper grey is scaled, where Pillow would clip it.

    Other numbers have no white: they are taken as they are from 0 to 255, as Pillow takes them.
    Raises :class:`ValueError` for those that would be clipped, or become black.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    white = _white(image)
    if white is not None:
        return Image.fromarray((values * (np.float32(255) / white)).round().astype(np.uint8))
    lowest, highest = values.min(initial=0), values.max(initial=0)
    is_fraction = image.mode == "F" and 0 < highest <= 1
    if not (lowest >= 0 and highest <= _WHITE_8) or is_fraction:
        raise ValueError(
            f"its pixels are {values.dtype} from {values.min():g} to {values.max():g}, which have "
            "no white; save it with 8 or 16 bits a channel"
        )
    return image


def _white(image: Image.Image) -> int | None:
    """Return the number that stands for white in a grey image of more than 8 bits, if one does."""
    if image.mode == "I":  # Pillow scales the maximum of a PGM to 16 bits
        return _WHITE_16 if image.format in ("PNG", "PPM") else None
    if image.mode == "F":
        return None
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
    return (1 << bits) - 1 if _WHITE_8 < 1 << bits <= _WHITE_16 else _WHITE_16
