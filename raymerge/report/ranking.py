"""The ranking of a comparison: its tasks, its means, and the best merged methods."""

from __future__ import annotations

from collections.abc import Mapping

from raymerge.report.names import is_merged
from raymerge.report.records import Results


def task_names(methods: Mapping[str, Results]) -> list[str]:
    """Return all tasks, in order of their first appearance."""
    return list(dict.fromkeys(task for results in methods.values() for task in results.tasks))


def leaders(values: Mapping[str, float | None], *, smallest: bool = False) -> frozenset[str]:
    """Return the merged methods with the best value, all at a tie; references do not compete."""
    competing = {m: v for m, v in values.items() if v is not None and is_merged(m)}
    if not competing:
        return frozenset()
    best = (min if smallest else max)(competing.values())
    return frozenset(method for method, value in competing.items() if value == best)


def mean_top1(methods: Mapping[str, Results]) -> dict[str, float | None]:
    return {name: results.average.top1 for name, results in methods.items()}
