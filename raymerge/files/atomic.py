"""Write files so that a crash leaves the old file or the new one: temporary file, fsync, rename."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from raymerge.errors import RunError

_MACHINE = re.sub(r"\W", "", socket.gethostname())[:32]


def cache_folder() -> Path:
    """Return the folder of data that can be made again: ``$RAYMERGE_CACHE`` or the home's cache."""
    folder = os.environ.get("RAYMERGE_CACHE")
    return Path(folder).absolute() if folder else Path.home() / ".cache" / "raymerge"


def exists(path: Path) -> bool:
    """Return whether a file or folder exists; a name that is too long for one does not."""
    try:
        return path.exists()
    except OSError:
        return False


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then replace ``path`` by it."""
    with stage_file(path, path.parent) as (temporary, commit):
        write(temporary)
        commit()


@contextmanager
def stage_file(path: Path, folder: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yield a temporary file in ``folder`` and a function that renames it to ``path``, durably.

    ``folder`` is on the file system of ``path``. Without that call, or after an error, the
    temporary file is removed.
    """
    try:
        remove_leftovers(folder, glob.escape(path.name))
        prefix = f".{path.name}.{_MACHINE}-{os.getpid()}."
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=folder)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary, lambda: _commit(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written: {error.strerror or error}; "
            "free space, or choose another folder"
        ) from error


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove the temporary files and folders that ended processes of this machine have left.

    ``name``: the pattern of what they were writing.
    """
    for left in folder.glob(f".{name}.{_MACHINE}-*.tmp"):
        process = left.name.rpartition(f".{_MACHINE}-")[2].partition(".")[0]
        if not process.isdecimal() or psutil.pid_exists(int(process)):
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder if it exists; killed in between, it is gone and its rest a leftover."""
    if path.is_dir():
        rest = path.with_name(f".{path.name}.{_MACHINE}-{os.getpid()}.{time.time_ns()}.tmp")
        path.replace(rest)
        shutil.rmtree(rest, ignore_errors=True)


def _commit(temporary: Path, path: Path) -> None:
    sync(temporary)
    temporary.chmod(0o666 & ~_umask())
    temporary.replace(path)
    sync(path.parent)


@contextmanager
def stage_folder(target: Path, *, exist_ok: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``target`` that becomes it unless an error is raised.

    ``exist_ok``: if another process has made ``target`` meanwhile, that folder stays. Raises
    :class:`RunError` if it cannot be written.
    """
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, glob.escape(target.name))
        prefix = f".{target.name}.{_MACHINE}-{os.getpid()}."
        name = tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=target.parent)
        try:
            yield Path(name)
            Path(name).chmod(0o777 & ~_umask())
            if not (exist_ok and target.is_dir()):
                Path(name).replace(target)
                sync(target.parent)
        finally:
            shutil.rmtree(name, ignore_errors=True)
    except OSError as error:
        raise RunError(
            f"{target}: cannot be written: {error.strerror or error}; "
            "free space, or choose another folder"
        ) from error


def reserve_space(handle: int, size: int) -> None:
    """Allocate ``size`` bytes for an open file; raises OSError if the disk is full."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, max(1, size))
    else:  # macOS: sets the size; space is allocated by the writes
        os.ftruncate(handle, max(1, size))


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # for lone surrogates


def sync(path: Path) -> None:
    """Wait until a file's content or a folder's list of entries is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
