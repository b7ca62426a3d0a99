"""Who may write a run: every driver claims a number, and one with a lower number writes no more.

Numbered entries of a folder: ``attempt-0002``, ``step-00000120``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_ATTEMPT = re.compile(r"attempt-(\d{4,})")


def claim_attempt(folder: Path) -> int:
    """The next attempt number below ``folder``; whoever has a lower one can no longer save."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        number = newest_attempt(folder) + 1
        try:
            path = folder / f"attempt-{number:04d}"
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            continue
        return number


def newest_attempt(folder: Path) -> int:
    """0 if nobody has claimed one."""
    return max(numbers(folder, _ATTEMPT), default=0)


def numbers(folder: Path, pattern: re.Pattern[str]) -> list[int]:
    """The numbers of the entries whose whole name matches ``pattern``, in no order."""
    if not folder.is_dir():
        return []
    matches = (pattern.fullmatch(path.name) for path in folder.iterdir())
    return [int(match.group(1)) for match in matches if match]
