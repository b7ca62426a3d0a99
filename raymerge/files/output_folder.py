"""The folder that a command writes into: permission, one writer, and the result that it replaces.

A folder is in use if it holds anything but hidden files: a killed run may leave temporary ones. One
in use is written only by the command that wrote it before, and only where a flag says so. The
result in it is moved aside, and is removed when the new one is whole.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from raymerge.errors import RunError, UserError
from raymerge.files.atomic import remove_folder, remove_leftovers
from raymerge.files.fencing import claim_attempt, newest_attempt

logger = logging.getLogger(__name__)

PREVIOUS = ".previous"
"""The hidden folder of a whole result that is being replaced."""
_ATTEMPTS = ".attempts"
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


class OutputFolder:
    """A folder that one driver writes at a time; arguments as for :func:`require_output`.

    ``marks[0]`` describes the result: it is written first and stays while the result is replaced.
    ``last``: the file whose presence makes a result whole; it is written last.
    """

    def __init__(self, path: Path, marks: Sequence[str], last: str, *, writer: str) -> None:
        self.path = path.absolute()
        self._marks, self._last, self._writer = marks, last, writer
        self._flags: Mapping[str, bool] = {}
        self._attempt = 0

    def check(self, flags: Mapping[str, bool]) -> bool:
        """Return whether the folder is in use. Raises :class:`UserError`; writes nothing."""
        self._flags = flags
        return require_output(self.path, self._marks, writer=self._writer, flags=flags)

    def claim(self, files: Iterable[Path] = ()) -> None:
        """Create the folder and become its one writer; set ``files``, an earlier result, aside.

        Raises :class:`UserError` if another driver has written a result there since the check.
        """
        self.check(self._flags)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)
            self._attempt = claim_attempt(self.path / _ATTEMPTS)
            self._set_aside(list(files))
        except OSError as error:
            raise UserError(
                f"output {self.path}: cannot be created: {error.strerror}; choose another folder"
            ) from error

    def require_own(self) -> None:
        """Raise :class:`RunError` if another driver has claimed the folder since."""
        if newest_attempt(self.path / _ATTEMPTS) != self._attempt:
            raise RunError(
                f"output {self.path}: another run has taken it over; this one writes nothing more: "
                "give each run a folder of its own"
            )

    def finish(self) -> None:
        """Remove the replaced result: the new one is whole."""
        remove_folder(self.path / PREVIOUS)

    def _set_aside(self, files: Sequence[Path]) -> None:
        """Move the files of a whole result to a hidden folder; remove those of an incomplete one.

        ``last`` is moved last, so that a killed driver's move is completed by the next one.
        """
        previous, last = self.path / PREVIOUS, self.path / self._last
        if not last.exists():
            for file in files:
                remove_folder(file) if file.is_dir() else file.unlink()
            return
        if (previous / self._last).exists():  # of a result before that one
            remove_folder(previous)
        previous.mkdir(exist_ok=True)
        shutil.copy2(self.path / self._marks[0], previous)
        for file in sorted(files, key=lambda file: file == last):
            target = previous / file.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
        logger.warning("output %s: the result before is kept until the new one is whole", previous)
