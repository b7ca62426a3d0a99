"""The tables of a page: which cells they have, and which of them are best.

``templates/macros.html`` writes them as HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from raymerge.report.formats import count, decimal, percent
from raymerge.report.names import is_merged, method_title
from raymerge.report.ranking import leaders, task_names
from raymerge.report.records import FindingsTable, Results, Score

MOST_COLUMNS = 9
"""With more tasks than this, a comparison has a row a task and a column a method."""


@dataclass(frozen=True)
class Cell:
    """``kind``: CSS classes. ``exact``: the unrounded value, shown on hover."""

    text: str
    kind: str = "number"
    exact: float | None = None


@dataclass(frozen=True)
class Row:
    name: str
    cells: Sequence[Cell]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """``headings``: one for the names of the rows, then one for each column of cells."""

    headings: Sequence[str]
    rows: Sequence[Row]
    kind: str = ""
    """"facts" has columns of text, any other table columns of numbers."""


def score_table(results: Results) -> Table:
    """Return one model's scores: a row a task, and the average."""
    rows = [_score_row(name, score) for name, score in results.tasks.items()]
    headings = ("Task", "Top-1, %", "Loss", "Entropy, nats", "Test images")
    return Table(headings, [*rows, _score_row("Average", results.average, "total")])


def _score_row(name: str, score: Score, kind: str = "") -> Row:
    cells = (
        Cell(percent(score.top1), exact=score.top1),
        Cell(decimal(score.loss), exact=score.loss),
        Cell(decimal(score.entropy), exact=score.entropy),
        Cell(count(score.examples)),
    )
    return Row(name, cells, kind)


def methods_table(methods: Mapping[str, Results], key: Literal["top1", "loss", "entropy"]) -> Table:
    """Return one measurement of every method on every task and on average, turned to fit.

    The best merged model of each task is bold.
    """
    tasks = task_names(methods)
    columns: dict[str | None, dict[str, float | None]] = {
        task: {name: getattr(each.tasks.get(task), key, None) for name, each in methods.items()}
        for task in tasks
    }
    # The average stands after the tasks, under a key that no task can have.
    columns[None] = {name: getattr(each.average, key) for name, each in methods.items()}
    best = {task: leaders(column, smallest=key != "top1") for task, column in columns.items()}
    write = percent if key == "top1" else decimal

    def cell(method: str, task: str | None) -> Cell:
        kinds = {
            "number": True,
            "best": method in best[task],
            "reference": not is_merged(method),
            "mean": task is None,
        }
        exact = columns[task][method]
        return Cell(write(exact), " ".join(kind for kind, holds in kinds.items() if holds), exact)

    corner = {"top1": "Top-1, %", "loss": "Loss", "entropy": "Entropy, nats"}[key]
    titles = {task: "Average" if task is None else task for task in columns}
    if len(tasks) > MOST_COLUMNS:
        rows = [
            Row(title, [cell(method, task) for method in methods], "mean" if task is None else "")
            for task, title in titles.items()
        ]
        return Table([corner, *map(method_title, methods)], rows)
    rows = [
        Row(method_title(method), [cell(method, task) for task in columns], _row_kind(method))
        for method in methods
    ]
    return Table([corner, *titles.values()], rows)


def _row_kind(method: str) -> str:
    return "" if is_merged(method) else "reference"


def findings_table(findings: FindingsTable, methods: frozenset[str]) -> Table:
    """Return a table of an experiment, the best merged models in bold.

    Methods that are rows compete within every column, and methods that are columns within every
    row; where neither is one, nothing competes.
    """
    best = _best_cells(findings, methods)
    rows = [
        Row(
            method_title(name),
            [
                _findings_cell(cell, (name, column) in best)
                for column, cell in zip(findings.columns, row, strict=True)
            ],
            _row_kind(name),
        )
        for name, row in findings.rows.items()
    ]
    across = not methods & findings.rows.keys()
    columns = [method_title(c) if across and c in methods else c for c in findings.columns]
    return Table(["", *columns], rows)


def _best_cells(findings: FindingsTable, methods: frozenset[str]) -> set[tuple[str, str]]:
    """Return the (row, column) pairs of the best merged models."""
    cells = {
        (name, column): cell
        for name, row in findings.rows.items()
        for column, cell in zip(findings.columns, row, strict=True)
        if isinstance(cell, float)
    }
    if methods & findings.rows.keys():
        columns = {
            each: {n: v for (n, c), v in cells.items() if c == each} for each in findings.columns
        }
        return {(name, column) for column, values in columns.items() for name in _winners(values)}
    rows = {
        each: {c: v for (n, c), v in cells.items() if n == each and c in methods}
        for each in findings.rows
    }
    return {(name, column) for name, values in rows.items() for column in _winners(values)}


def _winners(values: Mapping[str, float]) -> frozenset[str]:
    """Return the leaders, if there is more than one model to compare."""
    return leaders(values) if sum(map(is_merged, values)) > 1 else frozenset()


def _findings_cell(cell: str | float | None, is_best: bool) -> Cell:
    if isinstance(cell, str):
        return Cell(cell)
    return Cell(percent(cell), "number best" if is_best else "number", cell)


def facts(rows: Mapping[str, str], headings: tuple[str, str], kind: str = "") -> Table:
    """Return two columns of text; ``kind``: CSS class of the second."""
    return Table(headings, [Row(name, [Cell(text, kind)]) for name, text in rows.items()], "facts")


def number_facts(rows: Mapping[str, str], headings: tuple[str, str]) -> Table:
    """Return a column of names and a column of numbers."""
    return Table(headings, [Row(name, [Cell(text)]) for name, text in rows.items()])
