"""One check of the folder that a command is about to write into.

A folder is in use if it holds anything but hidden files: a killed run may leave temporary ones. One
in use is written only by the command that wrote it before, and only where a flag says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from raymerge.errors import UserError

_PURPOSES = {"resume": "continue that run", "overwrite": "replace it"}


def require_output(
    folder: Path,
    marks: Sequence[str],
    *,
    writer: str,
    flags: Mapping[str, bool] | None = None,
    what: str = "output",
) -> bool:
    """Return whether ``folder`` is in use; raise :class:`UserError` unless it may be written.

    ``marks``: names by which ``writer`` recognises a folder of its own, any one of them. ``flags``:
    those of ``resume`` and ``overwrite`` that the command has, one of which must be set for a
    folder in use; a command without flags replaces its own folders. Writes nothing.
    """
    where = f"{what} {folder}"
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{where}: is a file; name a folder")
        in_use = folder.exists() and any(path.name[:1] != "." for path in folder.iterdir())
        is_own = any((folder / mark).exists() for mark in marks)
        nearest = nearest_folder(folder)
    except OSError as error:  # no permission on the way, or too long a name
        raise UserError(f"{where}: {error.strerror}; choose another folder") from error
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{where}: {nearest} is not writable; choose another folder")
    if in_use and not is_own:
        raise UserError(
            f"{where}: is in use and was not written by {writer} (it has no {marks[0]}); choose "
            "another folder"
        )
    if in_use and flags and not any(flags.values()):
        remedies = " or ".join(f"--{flag} to {_PURPOSES[flag]}" for flag in flags)
        raise UserError(f"{where}: is in use; choose another folder, or {remedies}")
    return in_use


def nearest_folder(path: Path) -> Path:
    """Return ``path`` if it exists, else the nearest path above it that does, on the same disk."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
