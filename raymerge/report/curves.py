"""Series to plot, shared by the report's SVG and the PNG files.

Shapes: N steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from raymerge.report.data import Comparison, FoundCurves, Measurements, Metrics, Scan
from raymerge.report.names import method_title
from raymerge.report.ranking import mean_top1

MOST_POINTS = 300
"""A line keeps at most this many points: more are not visible and only make the file large."""


@dataclass(frozen=True)
class Series:
    """One line; y is None where nothing was measured."""

    label: str
    x: tuple[float, ...]
    y: Measurements
    strong: bool = False
    """Drawn over the others, in the text colour."""
    constant: bool = False
    """A level to compare with, drawn dashed."""


def lambda_series(metrics: Metrics) -> list[Series]:
    """Each task's mean λ against the steps."""
    return [_thin(task, metrics.steps, y_N) for task, y_N in metrics.lambdas.items()]


def entropy_series(metrics: Metrics) -> list[Series]:
    """Each task's entropy (nats) and, last, the mean of several; running means over ``window``."""
    width = window(len(metrics.steps))
    smooth = {task: running_mean(y_N, width) for task, y_N in metrics.entropy.items()}
    lines = [_thin(task, metrics.steps, y_N) for task, y_N in smooth.items()]
    if len(lines) < 2:
        return lines
    mean = _thin("mean", metrics.steps, running_mean(task_mean(metrics.entropy), width))
    return [*lines, Series(mean.label, mean.x, mean.y, strong=True)]


def mean_entropy_series(label: str, metrics: Metrics) -> Series:
    """The mean over the tasks alone, smoothed as in ``entropy_series``."""
    y_N = running_mean(task_mean(metrics.entropy), window(len(metrics.steps)))
    return _thin(label, metrics.steps, y_N)


def scan_series(comparison: Comparison, scan: Scan) -> list[Series]:
    """Mean top1 of task arithmetic against its λ, after a level for every learned method."""
    ends = (scan.scalings[0], scan.scalings[-1])
    top1 = mean_top1(comparison.methods)
    levels = [
        Series(method_title(name), ends, (value, value), constant=True)
        for name in comparison.runs
        if (value := top1[name]) is not None
    ]
    curve = Series(method_title("task_arithmetic"), scan.scalings, scan.top1, strong=True)
    return [*levels, curve]


def found_series(found: FoundCurves) -> list[Series]:
    """Each line of an experiment; one with a single value all along is a level to compare with."""
    return [
        Series(method_title(name), found.x, y, constant=len(y) > 2 and len(set(y)) == 1)
        for name, y in found.series.items()
    ]


def window(steps: int) -> int:
    """Steps a running mean covers: odd, about 4 % of a run, 1 (no smoothing) for a short one."""
    return max(1, steps // 25) | 1 if steps >= 50 else 1


def running_mean(y_N: Measurements, width: int) -> Measurements:
    """The centred mean over ``width`` steps, over fewer at the ends; gaps stay out of it."""
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
    """The mean over tasks of every step; None where a task is missing."""
    return tuple(
        None if any(y is None for y in column) else _mean(column)
        for column in zip(*by_task.values(), strict=True)
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _thin(label: str, x: Sequence[int], y: Measurements) -> Series:
    """Every n-th point, counted from the last so that the final value is always drawn."""
    stride = -(-len(x) // MOST_POINTS)
    keep = [i for i in range(len(x)) if (len(x) - 1 - i) % stride == 0 or i == 0]
    return Series(label, tuple(float(x[i]) for i in keep), tuple(y[i] for i in keep))
