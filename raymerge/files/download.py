"""Download a remote file into a partial file: resumed after failures, verified, never endless."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from raymerge.errors import RaymergeError, RemoteError
from raymerge.files.atomic import cache_folder
from raymerge.files.progress import Progress
from raymerge.files.remote_errors import error_line, http_status
from raymerge.files.stores import RemoteFile, find_file
from raymerge.files.urls import redact_url

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 8 << 20
_ATTEMPTS = 4
_WAIT_S = 1.0
_MOST_UNSIZED_BYTES = 64 << 30
"""The limit of a file whose size is not known; half of the free space, if that is less."""
_FORGET_S = 7 * 24 * 3600
"""An incomplete download that nobody continued for so long is removed."""


class _MismatchError(Exception):
    """The content received is not the one that the store describes. ``digest``: its SHA-256."""

    def __init__(self, message: str, digest: str) -> None:
        super().__init__(message)
        self.digest = digest


def download(file: RemoteFile, folder: Path, advance: Progress) -> tuple[Path, str]:
    """Return a complete and verified copy in ``folder`` and its SHA-256.

    A copy that an earlier call left incomplete is continued, unless the remote has changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _forget_old(folder)
    _require_room(file, folder)
    is_one_read = file.size is not None and file.size <= _CHUNK_BYTES
    before = None if is_one_read else find_file(file.url).identity  # listings may differ from it
    partial = _partial(file, folder)
    digest = _fill(file, partial, advance)
    if before is not None and find_file(file.url).identity != before:
        partial.unlink()
        raise RemoteError(f"{redact_url(file.url)}: changed while it was fetched; run again")
    return partial, digest


def _forget_old(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(OSError):  # another process may have removed or completed it
            if path.stat().st_mtime < time.time() - _FORGET_S:
                path.unlink()


def _require_room(file: RemoteFile, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if file.size is not None and file.size - _usable_bytes(file, _path(file, folder)) > free:
        raise RemoteError(
            f"{redact_url(file.url)}: has {file.size:,} bytes, but the cache folder "
            f"{cache_folder()} has {free:,} free; free some, or set RAYMERGE_CACHE to another disk"
        )


def _partial(file: RemoteFile, folder: Path) -> Path:
    """Return the path to continue; partial files of other states of the remote are removed."""
    path = _path(file, folder)
    for other in folder.glob(f"{file.key}-*"):
        if other != path or file.identity is None:
            other.unlink(missing_ok=True)
    return path


def _path(file: RemoteFile, folder: Path) -> Path:
    return folder / f"{file.key}-{(file.identity or 'unknown')[:16]}"


def _fill(file: RemoteFile, partial: Path, advance: Progress) -> str:
    """Complete ``partial`` in a few attempts; returns its SHA-256.

    After a failure it stays only if the next call can continue it and the disk is not full.
    """
    mismatches: set[str] = set()
    advance(_usable_bytes(file, partial))
    for attempt in range(_ATTEMPTS):
        try:
            return _continue(file, partial, advance, mismatches)
        except Exception as error:
            is_last = attempt == _ATTEMPTS - 1 or _is_final(error)
            if isinstance(error, _MismatchError):
                mismatches.add(error.digest)
                advance(-partial.stat().st_size)
                partial.unlink()
            elif is_last and (file.size is None or file.identity is None or _is_full(error)):
                partial.unlink(missing_ok=True)
            if is_last:
                raise
            logger.info("%s: %s; trying again", redact_url(file.url), error_line(error, file.url))
            time.sleep(_WAIT_S * attempt)
    raise AssertionError("unreachable")


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _is_final(error: Exception) -> bool:
    kinds = (FileNotFoundError, PermissionError, ImportError, RaymergeError)
    return _is_full(error) or isinstance(error, kinds) or http_status(error) in (401, 403, 404)


def _usable_bytes(file: RemoteFile, partial: Path) -> int:
    size = partial.stat().st_size if partial.exists() else 0
    return size if file.size is not None and size <= file.size else 0


def _continue(file: RemoteFile, partial: Path, advance: Progress, mismatches: set[str]) -> str:
    """Append what is missing and verify the whole; returns its SHA-256."""
    start = _usable_bytes(file, partial)
    hashes = {name: hashlib.new(name) for name in {"sha256", *file.checksums}}
    limit = _limit(file, partial.parent)
    with partial.open("r+b" if start else "wb") as out:
        # The checksums are of the whole content, so what is here already counts too.
        if start:
            update_hashes(partial, hashes.values())
            out.seek(start)
        for chunk in _chunks(file, start):
            out.write(chunk)
            if out.tell() > limit:
                break  # refused below; a faulty server may send without end
            for each in hashes.values():
                each.update(chunk)
            advance(len(chunk))
        out.flush()
        os.fsync(out.fileno())
        size = out.tell()
    if file.size is None and size > limit:
        raise RemoteError(
            f"{redact_url(file.url)}: sent over {limit:,} bytes without saying how many there are; "
            f"fetch it by other means, or set RAYMERGE_CACHE to a larger disk than "
            f"{cache_folder()}"
        )
    digests = {name: each.hexdigest() for name, each in hashes.items()}
    _verify(file, size, digests, mismatches)
    return digests["sha256"]


def _limit(file: RemoteFile, folder: Path) -> int:
    if file.size is not None:
        return file.size
    return min(_MOST_UNSIZED_BYTES, shutil.disk_usage(folder).free // 2)


def _verify(file: RemoteFile, size: int, digests: dict[str, str], mismatches: set[str]) -> None:
    sha256 = digests["sha256"]
    if file.size is not None and size < file.size:
        raise OSError(f"ended after {size:,} of {file.size:,} bytes")
    if file.size is not None and size > file.size:
        raise _MismatchError(f"{size:,} bytes came instead of {file.size:,}", sha256)
    for name, expected in file.checksums.items():
        # Some stores' tags look like an MD5 and are none (S3 with keys of its own): the same
        # content received twice is the content of the remote.
        is_confirmed = name == "md5" and sha256 in mismatches
        if digests[name] != expected.lower() and not is_confirmed:
            raise _MismatchError(f"the {name} of what came is not {expected}", sha256)


def _chunks(file: RemoteFile, start: int) -> Iterator[bytes]:
    """Yield the content from ``start`` to the end."""
    position = start
    if file.size is not None:
        try:
            for chunk in _ranges(file, start):
                position += len(chunk)
                yield chunk
            return
        except ValueError as error:  # "… doesn't appear to support range requests"
            if "block_size" not in str(error) and "seek" not in str(error).lower():
                raise

    # The server sends whole files only: skip what is here already.
    with file.fs.open(file.path, "rb", block_size=0) as stream:
        while chunk := bytes(stream.read(_CHUNK_BYTES)):
            if len(chunk) > position:
                yield chunk[position:]
            position = max(0, position - len(chunk))


def _ranges(file: RemoteFile, start: int) -> Iterator[bytes]:
    with file.fs.open(file.path, "rb", block_size=_CHUNK_BYTES, cache_type="none") as stream:
        if start:
            stream.seek(start)
        while chunk := bytes(stream.read(_CHUNK_BYTES)):
            yield chunk


def update_hashes(path: Path, hashes: Iterable[Any]) -> None:
    """Feed a file's content to each hash."""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            for each in hashes:
                each.update(chunk)
