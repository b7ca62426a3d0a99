"""The comparison as plain text, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raymerge.report.formats import NO_VALUE, percent, short
from raymerge.report.names import method_title
from raymerge.report.ranking import leaders, mean_top1, task_names
from raymerge.report.records import ComparisonRecord, Results, Scan, validate

COLUMNS = 100
"""The width of terminal to fit."""
_NARROWEST = 6
_LONGEST_TITLE = 32


def comparison_table(
    results: Mapping[str, Mapping[str, Any]],
    uniform_scan: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """Return top-1 in %: a row a method, a column a task, at most 100 characters wide.

    ``results`` is the ``methods`` object of ``comparison.json`` and ``uniform_scan`` its member
    of that name. Task names are cut to fit; tasks beyond the width are counted in a note. The
    best average of a merged model carries a star. Raises ``UserError`` on malformed results.
    """
    data = {"methods": dict(results), "uniform_scan": uniform_scan and dict(uniform_scan)}
    comparison = validate(ComparisonRecord, data, "comparison")
    methods = comparison.methods
    return "\n".join([*_rows(methods), "", *_notes(methods, comparison.uniform_scan)])


def _rows(methods: Mapping[str, Results]) -> list[str]:
    best = leaders(mean_top1(methods))
    titles = {name: _cut(method_title(name), _LONGEST_TITLE) for name in methods}
    width = max(len(title) for title in ("Top-1, %", *titles.values()))
    tasks = _visible_tasks(methods)
    heads = _headings(tasks, _task_room(width) - 2 * len(tasks))
    widths = [max(len(head), _NARROWEST - 1) for head in heads]
    header = _row("Top-1, %", width, heads, widths, "average ")
    lines = [
        _row(
            titles[name],
            width,
            [percent(results.tasks[t].top1) if t in results.tasks else NO_VALUE for t in tasks],
            widths,
            percent(results.average.top1) + ("*" if name in best else " "),
        )
        for name, results in methods.items()
    ]
    return [header, "-" * len(header.rstrip()), *lines]


def _row(title: str, width: int, cells: Sequence[str], widths: Sequence[int], last: str) -> str:
    inner = "".join(f"  {cell:>{size}}" for cell, size in zip(cells, widths, strict=True))
    return f"{title:<{width}}{inner}  {last:>8}".rstrip()


def _task_room(title_width: int) -> int:
    """Return the characters left for all task columns, each with two blanks before it."""
    return COLUMNS - title_width - len("  average ")


def _visible_tasks(methods: Mapping[str, Results]) -> list[str]:
    width = max((len(_cut(method_title(name), _LONGEST_TITLE)) for name in methods), default=8)
    return task_names(methods)[: _task_room(max(width, 8)) // (_NARROWEST + 2)]


def _headings(tasks: Sequence[str], budget: int) -> list[str]:
    """Return the names, cut so that the columns are at most ``budget`` characters together.

    Only the longest are cut: in the middle where cutting the end would make two alike.
    """
    room = _NARROWEST - 1
    while room < _LONGEST_TITLE and _used(tasks, room + 1) <= budget:
        room += 1
    plain = [_cut(task, room) for task in tasks]
    half = (room - 1) // 2
    return [
        f"{task[: room - 1 - half]}…{task[-half:]}" if plain.count(head) > 1 and half else head
        for task, head in zip(tasks, plain, strict=True)
    ]


def _used(tasks: Sequence[str], room: int) -> int:
    return sum(max(_NARROWEST - 1, min(len(task), room)) for task in tasks)


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _notes(methods: Mapping[str, Results], scan: Scan | None) -> list[str]:
    notes = ["* best average of a merged model"] if leaders(mean_top1(methods)) else []
    hidden = len(task_names(methods)) - len(_visible_tasks(methods))
    if hidden:
        notes.append(f"{hidden} more tasks are in the average and in the report")
    if scan:
        scaling, top1 = scan.best
        notes.append(
            f"best uniform λ of {len(scan.scalings)} tried (task arithmetic): "
            f"{short(scaling)} gives {percent(top1)} on average"
        )
    return notes
