"""The lines of every line chart, computed from what was measured. ``charts`` draws them.

Shapes: N steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from raymerge.report.data import Comparison, Metrics
from raymerge.report.names import method_title
from raymerge.report.ranking import mean_top1
from raymerge.report.records import FindingsCurves, Measurements, Scan, mean

MOST_POINTS = 300
"""A line keeps at most this many points: more are not visible and only make the file large."""


@dataclass(frozen=True)
class Series:
    """One line; y is None where nothing was measured."""

    label: str
    x: tuple[float, ...]
    y: Measurements
    is_strong: bool = False
    """Drawn over the others, in the text colour."""
    is_level: bool = False
    """A constant to compare with, drawn dotted."""


def lambda_series(metrics: Metrics) -> list[Series]:
    """Return each task's mean λ against the steps."""
    return [_thin(task, metrics.steps, y_N) for task, y_N in metrics.lambdas.items()]


def entropy_series(metrics: Metrics) -> list[Series]:
    """Return each task's entropy (nats) and, last, the mean of several tasks.

    All are running means over ``window`` steps.
    """
    width = window(len(metrics.steps))
    smooth = {task: running_mean(y_N, width) for task, y_N in metrics.entropy.items()}
    lines = [_thin(task, metrics.steps, y_N) for task, y_N in smooth.items()]
    if len(lines) < 2:
        return lines
    return [*lines, replace(mean_entropy_series("mean", metrics), is_strong=True)]


def mean_entropy_series(label: str, metrics: Metrics) -> Series:
    """Return the mean over the tasks alone, smoothed as in ``entropy_series``."""
    y_N = running_mean(task_mean(metrics.entropy), window(len(metrics.steps)))
    return _thin(label, metrics.steps, y_N)


def scan_series(comparison: Comparison, scan: Scan) -> list[Series]:
    """Return task arithmetic's mean top-1 (%) against its λ, after each learned method's level."""
    x, top1 = zip(*scan.points, strict=True)
    means = mean_top1(comparison.methods)
    levels = [
        Series(method_title(name), (x[0], x[-1]), _percentages((value, value)), is_level=True)
        for name in comparison.runs
        if (value := means[name]) is not None
    ]
    title = method_title("task_arithmetic")
    return [*levels, Series(title, x, _percentages(top1), is_strong=True)]


def findings_series(curves: FindingsCurves) -> list[Series]:
    """Return each line of an experiment, accuracies in %.

    A line with a single value all along is a level to compare with.
    """
    scaled = _percentages if is_accuracy(curves) else tuple
    return [
        Series(method_title(name), curves.x, scaled(y), is_level=len(y) > 2 and len(set(y)) == 1)
        for name, y in curves.series.items()
    ]


def is_accuracy(curves: FindingsCurves) -> bool:
    return "top-1" in curves.y_label


def _percentages(fractions: Sequence[float | None]) -> Measurements:
    return tuple(None if y is None else 100 * y for y in fractions)


def window(steps: int) -> int:
    """Return the steps of a running mean: odd, about 4 % of a run, 1 (as it is) if it is short."""
    return max(1, steps // 25) | 1 if steps >= 50 else 1


def running_mean(y_N: Measurements, width: int) -> Measurements:
    """Return the centred mean over ``width`` steps, over fewer at the ends, leaving out gaps."""
    if width == 1:
        return y_N
    reach, size = width // 2, len(y_N)
    sums = [0.0, *accumulate(0.0 if y is None else y for y in y_N)]
    counts = [0, *accumulate(int(y is not None) for y in y_N)]
    windows = ((max(0, i - reach), min(size, i + reach + 1)) for i in range(size))
    return tuple(
        None if y is None else (sums[stop] - sums[start]) / (counts[stop] - counts[start])
        for y, (start, stop) in zip(y_N, windows, strict=True)
    )


def task_mean(by_task: Mapping[str, Measurements]) -> Measurements:
    """Return the mean over tasks of every step, None where a task is missing."""
    return tuple(
        None if None in column else mean(column) for column in zip(*by_task.values(), strict=True)
    )


def _thin(label: str, x: Sequence[int], y: Measurements) -> Series:
    """Keep every n-th point, counted from the last so that the final value is always drawn."""
    stride = -(-len(x) // MOST_POINTS)
    keep = [i for i in range(len(x)) if (len(x) - 1 - i) % stride == 0 or i == 0]
    return Series(label, tuple(float(x[i]) for i in keep), tuple(y[i] for i in keep))
