"""Writing files so that a crash leaves the old or the new, never a half: temp, fsync, rename."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raymerge.errors import RunError


def cache_folder() -> Path:
    """What may be made again is kept here: ``$RAYMERGE_CACHE`` or ``~/.cache/raymerge``."""
    given = os.environ.get("RAYMERGE_CACHE")
    return Path(given).absolute() if given else Path.home() / ".cache" / "raymerge"


def exists(path: Path) -> bool:
    """Also of what is too long to be the name of a file."""
    try:
        return path.exists()
    except OSError:
        return False


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """``write`` fills a temporary file beside ``path``, which then replaces it."""
    with stage_file(path, path.parent) as (temporary, commit):
        write(temporary)
        commit()


@contextmanager
def stage_file(path: Path, folder: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A temporary file in ``folder`` (of the same file system) and the function that makes it
    ``path``, durably. Without that call, or after an error, it is removed."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=folder)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary, lambda: _commit(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error


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
        name = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        try:
            yield Path(name)
            Path(name).chmod(0o777 & ~_umask())
            if not (exist_ok and target.is_dir()):
                Path(name).replace(target)
                sync(target.parent)
        finally:
            shutil.rmtree(name, ignore_errors=True)
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {error.strerror or error}") from error


def reserve_space(handle: int, size: int) -> None:
    """Make room for ``size`` bytes in an open file now; OSError if the disk has none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, max(1, size))
    else:  # macOS: the size only, the room is found as it is written
        os.ftruncate(handle, max(1, size))


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # of halves of characters


def sync(path: Path) -> None:
    """Wait until a file's or a folder's own entries are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
