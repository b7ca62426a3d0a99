""".npz: ``images`` (N, H, W, 3), (N, H, W, 1) or (N, H, W) uint8, and ``labels`` (N,).

Images that are stored uncompressed (``np.savez``) are read one by one in place. Nothing is
unpickled.
"""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO, Any

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from raymerge.data.images import Labels
from raymerge.data.sources.files import FileStamp, read_at, stamps_of
from raymerge.data.sources.labels import text_labels
from raymerge.data.sources.reference import DataReference
from raymerge.errors import DataError, excerpt, one_line

_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    RuntimeError,  # encrypted, or an unknown compression
    SyntaxError,  # of the header of an array
    struct.error,
    zlib.error,
    tokenize.TokenError,
    TypeError,
    MemoryError,
    OverflowError,
)
_LOCAL_HEADER = 30  # bytes before the name and the extra field of a zip's member
_MOST_HEADER_BYTES = 10_000  # numpy's own limit, which it checks after reading the header
_MOST_NAME_BYTES = 4 << 10
_MOST_LABEL_BYTES = 1 << 29
_ANY_BYTES, _MOST_RATIO = 1 << 28, 256
"""A larger array may not unpack to more than so many times its size in the file."""


@dataclass(frozen=True)
class _Member:
    """``offset``: of the values in the file; None if they are compressed or transposed."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int | None


def _described(member: _Member) -> str:
    return f"{one_line(member.dtype, 60)} of shape {one_line(member.shape, 60)}"


def open_arrays(reference: DataReference, path: Path) -> NpzArrays:
    reference.require_options()
    (stamp,) = stamps_of([path])
    images = _member(path, "images")
    shaped = len(images.shape) == 3 or (len(images.shape) == 4 and images.shape[3] in (1, 3))
    if images.dtype != np.uint8 or not shaped or 0 in images.shape:
        raise DataError(
            f"{path}: images is {_described(images)}; it must be uint8 of shape "
            "(N, H, W, 3), (N, H, W, 1) or (N, H, W), none of them 0"
        )
    return NpzArrays(stamp, images.shape, images.offset)


@dataclass(frozen=True)
class NpzArrays:
    """A :class:`~raymerge.data.images.Source`."""

    file: FileStamp
    shape: tuple[int, ...]
    offset: int | None
    _cache: _Cache = field(init=False, repr=False, compare=False, default_factory=lambda: _Cache())

    def __reduce__(self) -> tuple[type[NpzArrays], tuple[FileStamp, tuple[int, ...], int | None]]:
        return NpzArrays, (self.file, self.shape, self.offset)

    def __len__(self) -> int:
        return self.shape[0]

    def key(self, row: int) -> str:
        return f"{self.file.path.name} image {row}"

    def name(self, row: int) -> str:
        return f"{self.file.path} image {row}"

    def encoded(self, row: int) -> None:
        return None

    def image(self, row: int) -> Image.Image:
        height, width = self.shape[1:3]
        pixels = self._pixels(row).reshape(height, width, *self.shape[3:])
        return Image.fromarray(pixels[..., 0] if self.shape[3:] == (1,) else pixels)

    def _pixels(self, row: int) -> NDArray[np.uint8]:
        if self.offset is None:
            pixels: NDArray[np.uint8] = self._cache.all_of(self.file.path)[row]
            return pixels
        size = int(np.prod(self.shape[1:]))
        content = read_at(self.file.path, self.offset + row * size, size)
        if len(content) < size:
            raise DataError(f"{self.name(row)}: the file has been cut off; write it again")
        return np.frombuffer(content, dtype=np.uint8)

    def labels(self) -> Labels:
        labels = _member(self.file.path, "labels")
        if labels.shape != self.shape[:1] or labels.dtype.kind not in "biuU":
            raise DataError(
                f"{self.file.path}: labels is {_described(labels)}; it must be "
                f"whole numbers (or class names) of shape ({len(self)},), one an image"
            )
        size = labels.dtype.itemsize
        if size > _MOST_NAME_BYTES or size * len(self) > _MOST_LABEL_BYTES:
            raise DataError(
                f"{self.file.path}: labels is {_described(labels)}: {size:,} bytes each are no "
                "labels; save class names, or whole numbers"
            )
        values = _read(self.file.path, "labels")
        if labels.dtype.kind == "U":
            return text_labels([str(value) for value in values])
        if labels.dtype.kind == "u" and len(values) and values.max() > np.iinfo(np.int64).max:
            raise DataError(
                f"{self.file.path}: label {values.max()} is too large; "
                "write labels below the number of classes"
            )
        return Labels(values.astype(np.int64))


class _Cache:
    """All images of a compressed file, read when the first one is needed."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._images: NDArray[np.uint8] | None = None

    def all_of(self, path: Path) -> NDArray[np.uint8]:
        with self._lock:
            if self._images is None:
                self._images = _read(path, "images")
            return self._images


# --- the file ------------------------------------------------------------------------------------


def _member(path: Path, name: str) -> _Member:
    """Describe ``name``.npy from its header; raises :class:`DataError`."""
    # Read the header alone.
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                raise DataError(
                    f"{path}: holds no array {name!r} (it has "
                    f"{', '.join(sorted(_arrays(archive))[:5]) or 'none'}); save it with "
                    "np.savez(path, images=…, labels=…)"
                )
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as file:
                shape, fortran, dtype = _header(file)
                header_bytes = file.tell()
    except _ERRORS as error:
        raise _unreadable(path, error) from error

    # Refuse what cannot be read safely, or does not fit into memory unpacked.
    if dtype.hasobject:
        raise DataError(
            f"{path}: {name} holds Python objects, which only pickle reads and raymerge does not; "
            f"save {name} as an array of {'uint8' if name == 'images' else 'int64'}"
        )
    size = int(np.prod([1, *shape], dtype=object)) * dtype.itemsize
    if info.file_size != header_bytes + size:
        raise DataError(
            f"{path}: {name} of shape {one_line(shape, 60)} takes {excerpt(size)} bytes, but "
            f"{info.file_size} are stored; write the file again"
        )
    if info.compress_type != zipfile.ZIP_STORED or fortran:
        if size > max(_ANY_BYTES, _MOST_RATIO * info.compress_size):
            raise DataError(
                f"{path}: {name} would unpack from {info.compress_size:,} to {size:,} bytes; save "
                "it with np.savez (uncompressed, C order), which is read in place"
            )
        if size > psutil.virtual_memory().available:
            raise DataError(
                f"{path}: {name} takes {size / 2**30:.1f} GiB unpacked, more than is free; save it "
                "with np.savez (uncompressed, C order), which is read in place"
            )
        return _Member(shape, dtype, None)
    return _Member(shape, dtype, _offset(path, info) + header_bytes)


def _arrays(archive: zipfile.ZipFile) -> list[str]:
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    return [one_line(name, 60) for name in names if name.isprintable()]


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    # numpy would read a header of any length, here up to 4 GiB, before it refuses it.
    start = file.read(12)
    width, form = (2, "<H") if start[6:7] == b"\x01" else (4, "<I")
    (length,) = struct.unpack(form, start[8 : 8 + width])
    if length > _MOST_HEADER_BYTES:
        raise ValueError(f"a header of {length:,} bytes")
    file.seek(0)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(file)
    return tuple(map(int, shape)), bool(fortran), dtype


def _offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Return the offset of a stored member's bytes, and check that the file has them all."""
    header = read_at(path, info.header_offset, _LOCAL_HEADER)
    name, extra = struct.unpack("<HH", header[26:30])
    start = info.header_offset + _LOCAL_HEADER + int(name) + int(extra)
    if start + info.file_size > path.stat().st_size:
        raise DataError(f"{path}: is cut off; write it again")
    return start


def _read(path: Path, name: str) -> NDArray[Any]:
    """Return a whole array after verifying its checksum."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            values: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
            return np.ascontiguousarray(values)
    except _ERRORS as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable .npz file ({one_line(error)}); write it again")
