"""The errors that raymerge raises, and helpers for their messages.

A message is one line: what, where, the numbers, the remedy. The errors survive pickling (only
``args`` carry state), so one that is raised in a Ray actor reads the same on the driver.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

_LONGEST_LINE = 2000


def escape_unprintable(text: str) -> str:
    """Return a text as one line that is safe to print.

    Names from files may hold line breaks, and codes that move a terminal's cursor.
    """
    if text.isprintable():
        return text
    line = " ".join(text.split("\n"))
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def shorten(line: str, limit: int = _LONGEST_LINE) -> str:
    """Return a line with its middle left out if it is longer than ``limit``: what and where stand
    at its head, and the remedy at its end."""
    if len(line) <= limit:
        return line
    head, tail = _head(line, limit // 2), line[-(limit // 2) :]
    if line[-len(tail) - 1] != " " and "@" in tail.split(" ")[0]:
        tail = tail.partition(" ")[2]
    return f"{head} … {tail}"


def _head(line: str, limit: int) -> str:
    """Return the first characters of a line without an address that ends beyond them.

    Its password is redacted later, and only where the whole address stands.
    """
    head, space, last = line[:limit].rpartition(" ")
    return head if "://" in last else head + space + last


def printable_lines(text: str) -> str:
    """Return a text of several lines that is safe to print on a terminal."""
    return "\n".join(escape_unprintable(line) for line in text.split("\n"))


def one_line(error: object, limit: int = 160) -> str:
    """Return an error's text on one line, cut off after ``limit`` characters.

    An error without a text gives the name of its class.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else _head(text, limit - 1) + "…"


class _Excerpt(reprlib.Repr):
    def repr_str(self, text: str, level: int) -> str:
        if "://" in text and len(text) > self.maxstring - 2:
            # Part of an address would show part of its password, which is redacted only in whole.
            text = f"{text[: text.index('://')][-20:]}://…"
        return super().repr_str(text, level)


_EXCERPT = _Excerpt()


def excerpt(value: object, limit: int = 60) -> str:
    """Return a value as Python writes it, bounded: YAML aliases can make one of any size."""
    text = _EXCERPT.repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Return ``; did you mean X?`` for the known name nearest to ``name``; "" if none is near."""
    if not isinstance(name, str):
        return ""
    by_lowercase = {each.lower(): each for each in names}
    nearest = difflib.get_close_matches(name.lower(), by_lowercase, 1)
    return f"; did you mean {by_lowercase[nearest[0]]}?" if nearest else ""


def unknown_name(name: object, names: Iterable[str]) -> str:
    """Return what an error says about a name that is not among the known ones."""
    names = tuple(names)
    return f"{excerpt(name)} is unknown{did_you_mean(name, names)} (known: {', '.join(names)})"


class RaymergeError(Exception):
    """Base of everything raymerge raises on purpose; the CLI prints it without a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        return shorten(escape_unprintable(super().__str__()))


class UserError(RaymergeError):
    """The input is wrong: nothing was written. Exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """A config file or an override has an unknown key or a wrong value."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, unsafe, or does not fit the pretrained model."""


class RemoteError(UserError):
    """A file behind a URL is missing, cannot be reached, or arrives damaged."""


class DataError(UserError):
    """An image folder, a class list or an image is missing, empty or unreadable."""


class RunError(RaymergeError):
    """The run failed after it had started. Exit code 1."""


class NonFiniteError(RunError):
    """A step (counted from 0) gave NaN or infinity, and λ is as it was before that step."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what, step)
        self.what, self.step = what, step

    def __str__(self) -> str:
        return (
            f"step {self.step + 1}: {self.what}; λ was left at step {self.step}: check that task's "
            "checkpoint and images, lower optimizer.lr, or set optimizer.nonfinite: skip (not for "
            "Frank-Wolfe)"
        )


class WorkerLostError(RunError):
    """A worker died or did not answer in time; ``--resume`` continues from the saved state."""


class PeerLostError(WorkerLostError):
    """A collective failed in a healthy worker: a peer or the network is lost."""
