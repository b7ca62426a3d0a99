"""Helpers of all formats: stamps of files, reads from the middle, limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raymerge.data.folder import quote_names
from raymerge.errors import DataError

MOST_ENCODED_BYTES = 1 << 28
"""Largest file of one image: a larger one is a mistake, or an attack on the memory."""


@dataclass(frozen=True)
class FileStamp:
    """A file with the size and time by which a change is noticed."""

    path: Path
    size: int
    changed_ns: int


def stamps_of(paths: Sequence[Path]) -> tuple[FileStamp, ...]:
    """Return the stamps of files; raises :class:`DataError` naming the missing ones."""
    stamps, missing = [], []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            missing.append(path)
        else:
            if path.is_file():
                stamps.append(FileStamp(path, stat.st_size, stat.st_mtime_ns))
            else:
                missing.append(path)
    if missing and len(paths) == 1:
        raise DataError(f"{missing[0]}: no such file; check the path")
    if missing:
        names = quote_names([path.name for path in missing])
        raise DataError(
            f"{missing[0].parent}: {len(missing)} of {len(paths)} files are missing: {names}; "
            "copy them there"
        )
    return tuple(stamps)


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Read bytes, fewer if the file has been truncated; raises :class:`DataError`."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def require_small(size: int, what: str) -> None:
    if size > MOST_ENCODED_BYTES:
        raise DataError(
            f"{what}: is {size / 2**20:.0f} MiB encoded, and raymerge reads images of at most "
            f"{MOST_ENCODED_BYTES >> 20} MiB; shrink or remove it"
        )


def printable_name(name: str, limit: int = 80) -> str:
    """Return a name from inside a file as part of one line."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return text if len(text) <= limit else text[: limit - 1] + "…"
