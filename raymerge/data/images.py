"""A task's images: files, or rows of a stored data set, behind one interface."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
"""The errors that Pillow raises for damaged images."""

FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are opened: by its content, an EPS named .jpg would run in Ghostscript."""


@dataclass(frozen=True)
class Labels:
    """(N,) class numbers as they are stored; ``names[number]`` is a class, None if not known."""

    numbers: NDArray[np.int64]
    names: tuple[str, ...] | None = None


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
    return Image.open(item, formats=FORMATS) if isinstance(item, Path) else item.open()


def open_encoded(content: bytes) -> Image.Image:
    """Open an image whose file is in memory."""
    return Image.open(io.BytesIO(content), formats=FORMATS)
