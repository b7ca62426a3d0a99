"""What an experiment found, as tables and curves: written as JSON, printed, and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Cell = str | float | None


@dataclass(frozen=True)
class Table:
    """Fractions are shown as percentages; None as a dash."""

    title: str
    columns: Sequence[str]
    """Of the numbers; the first column of a row is its name."""
    rows: Mapping[str, Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Curves:
    """Series over one axis; None where there is no value."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float | None]]
    caption: str = ""


@dataclass(frozen=True)
class Findings:
    title: str
    tables: Sequence[Table] = ()
    curves: Sequence[Curves] = ()
    notes: Sequence[str] = ()
    """What a reader must know to read them: on which world, with which settings."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The numbers behind them, for whoever wants more."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def text(findings: Findings) -> str:
    """The tables for a terminal."""
    parts = [findings.title]
    for table in findings.tables:
        parts += ["", table.title, *_lines(table)]
        if table.caption:
            parts.append(table.caption)
    return "\n".join([*parts, "", *(f"- {note}" for note in findings.notes)])


def _lines(table: Table) -> list[str]:
    shown = {name: [show(cell) for cell in row] for name, row in table.rows.items()}
    first = max((len(name) for name in shown), default=0)
    widths = [
        max([len(column), *(len(row[i]) for row in shown.values())])
        for i, column in enumerate(table.columns)
    ]
    head = " " * first + "".join(
        f"  {column:>{width}}" for column, width in zip(table.columns, widths, strict=True)
    )
    lines = [head]
    for name, row in shown.items():
        cells = "".join(f"  {cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append(f"{name:<{first}}{cells}")
    return lines


def show(cell: Cell) -> str:
    """A cell as it is read: 0.7312 is 73.1, None a dash, text itself."""
    if cell is None:
        return "–"
    return cell if isinstance(cell, str) else f"{100 * cell:.1f}"
