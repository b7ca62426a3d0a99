"""The results of an experiment as tables and curves: written as JSON, printed as text.

:mod:`raymerge.report` draws them as a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Cell = str | float | None


@dataclass(frozen=True)
class Table:
    """A table of named rows. Fractions are texts as percentages, None as a dash."""

    title: str
    columns: Sequence[str]
    """Headings of the numbers; the name of a row stands before them."""
    rows: Mapping[str, Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Curves:
    """Series over one axis; None is a missing value."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float | None]]
    caption: str = ""


@dataclass(frozen=True)
class Findings:
    """The tables, curves and notes of one experiment."""

    title: str
    tables: Sequence[Table] = ()
    curves: Sequence[Curves] = ()
    notes: Sequence[str] = ()
    """Facts needed to read the tables: the world, the settings."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The numbers behind the tables and curves."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def text(findings: Findings) -> str:
    """Return the tables as text for a terminal."""
    parts = [findings.title]
    for table in findings.tables:
        parts += ["", table.title, *_lines(table)]
        if table.caption:
            parts.append(table.caption)
    return "\n".join([*parts, "", *(f"- {note}" for note in findings.notes)])


def _lines(table: Table) -> list[str]:
    texts = {name: [show(cell) for cell in row] for name, row in table.rows.items()}
    first = max((len(name) for name in texts), default=0)
    widths = [
        max([len(column), *(len(row[i]) for row in texts.values())])
        for i, column in enumerate(table.columns)
    ]
    head = " " * first + "".join(
        f"  {column:>{width}}" for column, width in zip(table.columns, widths, strict=True)
    )
    lines = [head]
    for name, row in texts.items():
        cells = "".join(f"  {cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append(f"{name:<{first}}{cells}")
    return lines


def show(cell: Cell) -> str:
    """Return a cell as text: 0.7312 as 73.1, None as a dash, text unchanged."""
    if cell is None:
        return "–"
    return cell if isinstance(cell, str) else f"{100 * cell:.1f}"
