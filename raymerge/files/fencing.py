"""Attempt numbers of a run: each driver claims one, and only the highest may still save.

They are empty files in a folder, such as ``attempt-0002``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_ATTEMPT = re.compile(r"attempt-(\d{4,})")


def claim_attempt(folder: Path) -> int:
    """Claim and return the next attempt number; drivers with lower ones can no longer save."""
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
    """Return the highest claimed number, or 0 if there is none."""
    return max(numbers(folder, _ATTEMPT), default=0)


def numbers(folder: Path, pattern: re.Pattern[str]) -> list[int]:
    """Return the numbers in the names that match ``pattern`` as a whole, in no order."""
    if not folder.is_dir():
        return []
    matches = (pattern.fullmatch(path.name) for path in folder.iterdir())
    return [int(match.group(1)) for match in matches if match]
