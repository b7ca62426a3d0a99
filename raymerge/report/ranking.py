"""Which methods of a comparison are best, and at what."""

from __future__ import annotations

from collections.abc import Mapping

from raymerge.report.data import Results
from raymerge.report.names import NOT_MERGED


def task_names(methods: Mapping[str, Results]) -> list[str]:
    """All tasks, in order of their first appearance."""
    return list(dict.fromkeys(task for results in methods.values() for task in results.tasks))


def leaders(values: Mapping[str, float | None], *, smallest: bool = False) -> frozenset[str]:
    """The merged methods with the best value, all of them at a tie; references do not compete."""
    competing = {m: v for m, v in values.items() if v is not None and m not in NOT_MERGED}
    if not competing:
        return frozenset()
    best = (min if smallest else max)(competing.values())
    return frozenset(method for method, value in competing.items() if value == best)


def mean_top1(methods: Mapping[str, Results]) -> dict[str, float | None]:
    return {name: results.average.top1 for name, results in methods.items()}
