"""Checked reading of JSON: every mismatch is a ``UserError`` that names the file and the key."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from raymerge.errors import UserError

_INF = math.inf
_LARGEST_WHOLE = 1 << 50


@dataclass(frozen=True)
class Node:
    """A JSON value together with the place it came from; null and absent read the same."""

    value: Any
    file: Path
    key: str = ""

    def fail(self, wanted: str) -> NoReturn:
        shown = json.dumps(self.value, default=str)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        place = self.key.strip() or "the content"
        raise UserError(f"{self.file}: {place} must be {wanted}, not {shown}")

    @property
    def present(self) -> bool:
        return self.value is not None

    def __getitem__(self, name: str) -> Node:
        """The member ``name`` of an object; a null node if there is none."""
        found = self._object().get(name)
        parent = self.key if self.key.endswith(" ") else f"{self.key}."
        return Node(found, self.file, parent + name if self.key else name)

    def members(self) -> Iterator[tuple[str, Node]]:
        return ((name, self[name]) for name in self.names())

    def names(self) -> Iterable[str]:
        return self._object()

    def elements(self) -> list[Node]:
        if not isinstance(self.value, list):
            self.fail("a list")
        return [Node(v, self.file, f"{self.key}[{i}]") for i, v in enumerate(self.value)]

    def _object(self) -> dict[str, Any]:
        if self.value is None:
            return {}
        if not isinstance(self.value, dict):
            self.fail("an object")
        return self.value

    def text(self) -> str:
        if not isinstance(self.value, str):
            self.fail("a string")
        return self.value

    def number(self, low: float = -_INF, high: float = _INF) -> float:
        """A finite number in [low, high]."""
        wanted = "a finite number" + (f" in [{low:g}, {high:g}]" if high < _INF else "")
        wanted += f" of at least {low:g}" if low > -_INF and high == _INF else ""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            self.fail(wanted)
        if not low <= self.value <= high or not abs(self.value) <= sys.float_info.max:
            self.fail(wanted)
        return float(self.value)

    def whole(self) -> int:
        """A whole number of at least 0, small enough to be told from the next as a float."""
        number = self.number(0)
        if number != int(number) or number > _LARGEST_WHOLE:
            self.fail("a whole number")
        return int(number)

    def measurement(self) -> float | None:
        """A number that a run measured: None where it is absent, NaN or infinite."""
        if self.value is None or (isinstance(self.value, float) and not math.isfinite(self.value)):
            return None
        return self.number()


def read_text(file: Path) -> str | None:
    """The file's text, or None if there is no such file."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def read_json(file: Path) -> Node | None:
    """The file's root object, or None if there is no such file."""
    text = read_text(file)
    if text is None:
        return None
    root = Node(_parse(text, file, line=0), file)
    if not isinstance(root.value, dict):
        root.fail("an object")
    return root


def read_json_lines(file: Path) -> list[Node]:
    """One node a line; [] if there is no such file.

    A run that was killed leaves half a last line, without its newline: that line is dropped.
    """
    text = read_text(file) or ""
    complete, _, tail = text.rpartition("\n")
    lines = [*complete.split("\n"), tail] if _is_json(tail) else complete.split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return [Node(_parse(line, file, number), file, f"line {number}: ") for number, line in numbered]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: str, file: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = line or error.lineno
        raise UserError(f"{file}: line {where} is not valid JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from error
