"""HTML tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from raymerge.report.data import FoundTable, Results, Score
from raymerge.report.formats import count, decimal, percent
from raymerge.report.markup import Markup, join, tag
from raymerge.report.names import NOT_MERGED, method_title
from raymerge.report.ranking import leaders, task_names

MOST_COLUMNS = 9
"""With more tasks than this, a comparison has a row a task and a column a method."""


def score_table(results: Results) -> Markup:
    """One model: a row a task, and the average."""
    rows = [_score_row(name, score) for name, score in results.tasks.items()]
    headings = ("Task", "Top-1, %", "Loss", "Entropy, nats", "Test images")
    return table(headings, [*rows, _score_row("Average", results.average, "total")])


def _score_row(name: str, score: Score, class_: str | None = None) -> Markup:
    cells = (
        _number(percent(score.top1), exact=score.top1),
        _number(decimal(score.loss), exact=score.loss),
        _number(decimal(score.entropy), exact=score.entropy),
        _number(count(score.examples)),
    )
    return tag("tr", _row_head(name), *cells, class_=class_)


def top1_table(methods: Mapping[str, Results]) -> Markup:
    """Accuracies of every method, the best merged model of each task in bold."""
    return _comparison(methods, lambda score: score.top1, percent, "Top-1, %", smallest=False)


def loss_table(methods: Mapping[str, Results]) -> Markup:
    return _comparison(methods, lambda score: score.loss, decimal, "Loss", smallest=True)


def entropy_table(methods: Mapping[str, Results]) -> Markup:
    return _comparison(
        methods, lambda score: score.entropy, decimal, "Entropy, nats", smallest=True
    )


def _comparison(
    methods: Mapping[str, Results],
    value: Callable[[Score], float | None],
    write: Callable[[float | None], str],
    corner: str,
    *,
    smallest: bool,
) -> Markup:
    """One measurement of every method on every task and on average, turned so that it fits."""
    tasks = task_names(methods)
    columns = {
        **{
            task: {m: value(r.tasks.get(task, Score())) for m, r in methods.items()}
            for task in tasks
        },
        _MEAN: {m: value(r.average) for m, r in methods.items()},
    }
    best = {task: leaders(column, smallest=smallest) for task, column in columns.items()}
    cells = {
        (method, task): _number(
            write(column[method]),
            exact=column[method],
            kinds=_kinds(method, task, method in best[task]),
        )
        for task, column in columns.items()
        for method in methods
    }
    return (_tall if len(tasks) > MOST_COLUMNS else _wide)(methods, list(columns), cells, corner)


_MEAN = "\0mean"
"""Key of the average among the tasks; no task can have this name."""
_Cells = Mapping[tuple[str, str], Markup]


def _kinds(method: str, task: str, best: bool) -> list[str]:
    kinds = {"best": best, "reference": method in NOT_MERGED, "mean": task == _MEAN}
    return [kind for kind, holds in kinds.items() if holds]


def _title(task: str) -> str:
    return "Average" if task == _MEAN else task


def _wide(methods: Mapping[str, Results], tasks: list[str], cells: _Cells, corner: str) -> Markup:
    """A row a method."""
    rows = [
        tag(
            "tr",
            _row_head(method_title(method)),
            *(cells[method, task] for task in tasks),
            class_="reference" if method in NOT_MERGED else None,
        )
        for method in methods
    ]
    return table([corner, *map(_title, tasks)], rows)


def _tall(methods: Mapping[str, Results], tasks: list[str], cells: _Cells, corner: str) -> Markup:
    """A row a task."""
    rows = [
        tag(
            "tr",
            _row_head(_title(task)),
            *(cells[method, task] for method in methods),
            class_="mean" if task == _MEAN else None,
        )
        for task in tasks
    ]
    return table([corner, *map(method_title, methods)], rows)


def found_table(found: FoundTable, methods: frozenset[str]) -> Markup:
    """A table of an experiment, the best of its merged models in bold.

    ``methods`` are the names of methods: as rows they compete in every column, as columns in every
    row; where neither is one, nothing competes.
    """
    best = _best_cells(found, methods)
    rows = [
        tag(
            "tr",
            _row_head(method_title(name)),
            *(
                _found_cell(cell, best=(name, column) in best)
                for column, cell in zip(found.columns, row, strict=True)
            ),
            class_="reference" if name in NOT_MERGED else None,
        )
        for name, row in found.rows.items()
    ]
    across = not methods & found.rows.keys()
    columns = [method_title(c) if across and c in methods else c for c in found.columns]
    return table(["", *columns], rows)


def _best_cells(found: FoundTable, methods: frozenset[str]) -> set[tuple[str, str]]:
    cells = {
        (name, column): cell
        for name, row in found.rows.items()
        for column, cell in zip(found.columns, row, strict=True)
        if isinstance(cell, float)
    }
    if methods & found.rows.keys():
        columns = [{n: v for (n, c), v in cells.items() if c == each} for each in found.columns]
        pairs = zip(found.columns, columns, strict=True)
        return {(name, column) for column, values in pairs for name in _winners(values)}
    rows = [{c: v for (n, c), v in cells.items() if n == each} for each in found.rows]
    return {
        (name, column)
        for name, values in zip(found.rows, rows, strict=True)
        for column in _winners({c: v for c, v in values.items() if c in methods})
    }


def _winners(values: Mapping[str, float]) -> frozenset[str]:
    """The leaders, where there is more than one to compare."""
    competing = values.keys() - NOT_MERGED
    return leaders(values) if len(competing) > 1 else frozenset()


def _found_cell(cell: str | float | None, *, best: bool) -> Markup:
    if isinstance(cell, str):
        return _number(cell)
    return _number(percent(cell), exact=cell, kinds=["best"] if best else [])


def facts(rows: Mapping[str, str], headings: tuple[str, str], *, code: bool = False) -> Markup:
    """Two columns of text."""
    body = [
        tag("tr", _row_head(name), tag("td", text, class_="code" if code else None))
        for name, text in rows.items()
    ]
    return _framed(tag("tr", *(tag("th", each, scope="col") for each in headings)), body, "facts")


def number_facts(rows: Mapping[str, str], headings: tuple[str, str]) -> Markup:
    """A column of names and a column of numbers."""
    return table(headings, [tag("tr", _row_head(n), _number(text)) for n, text in rows.items()])


def table(headings: Sequence[str], rows: Sequence[Markup]) -> Markup:
    """All columns but the first are numbers."""
    first, *others = headings
    head = tag(
        "tr",
        tag("th", first, scope="col"),
        *(tag("th", each, scope="col", class_="number") for each in others),
    )
    return _framed(head, rows)


def _framed(head: Markup, rows: Sequence[Markup], class_: str | None = None) -> Markup:
    body = tag("table", tag("thead", head), tag("tbody", join(*rows)), class_=class_)
    return tag("div", body, class_="scroll")


def _row_head(name: str) -> Markup:
    return tag("th", name, scope="row")


def _number(text: str, exact: float | None = None, kinds: Sequence[str] = ()) -> Markup:
    """A right-aligned cell; the tooltip has the unrounded value."""
    title = None if exact is None else f"{exact:.6g}"
    return tag("td", text, class_=" ".join(("number", *kinds)), title=title)
