"""Facts about smoothing, thinning and the lines of each chart."""

from __future__ import annotations

import pytest
from report_samples import metrics_of

from raymerge.report.curves import (
    MOST_POINTS,
    entropy_series,
    findings_series,
    lambda_series,
    running_mean,
    task_mean,
    window,
)
from raymerge.report.records import FindingsCurves


def test_a_running_mean_of_width_one_changes_nothing():
    assert running_mean((3.0, 1.0, None, 2.0), 1) == (3.0, 1.0, None, 2.0)


def test_a_running_mean_keeps_a_constant_and_a_line():
    assert running_mean((2.0,) * 9, 5) == (2.0,) * 9
    line = tuple(float(i) for i in range(9))
    assert running_mean(line, 3)[1:-1] == line[1:-1]


def test_a_gap_stays_a_gap_and_out_of_its_neighbours():
    assert running_mean((1.0, None, 3.0), 3) == (1.0, None, 3.0)


def test_the_mean_over_tasks_needs_every_task():
    assert task_mean({"a": (1.0, 2.0), "b": (3.0, None)}) == (2.0, None)


@pytest.mark.parametrize("steps", [1, 49, 50, 500, 5001])
def test_the_window_is_odd_and_short_runs_are_not_smoothed(steps):
    assert window(steps) % 2 == 1
    assert window(steps) <= max(1, steps // 16)


def test_a_long_line_is_thinned_but_keeps_both_ends():
    values = tuple(float(i) for i in range(10_000))
    (line,) = lambda_series(metrics_of({"a": values}))
    assert len(line.x) <= MOST_POINTS + 1
    assert (line.y[0], line.y[-1]) == (0.0, 9999.0)


def test_the_mean_of_several_tasks_is_drawn_last_and_strong():
    lines = entropy_series(metrics_of(entropy={"a": (1.0, 3.0), "b": (2.0, 5.0)}))
    assert [line.label for line in lines] == ["a", "b", "mean"]
    assert [line.is_strong for line in lines] == [False, False, True]
    assert lines[-1].y == (1.5, 4.0)
    assert len(entropy_series(metrics_of(entropy={"a": (1.0, 3.0)}))) == 1


def test_accuracies_of_an_experiment_are_percentages_and_constants_levels():
    curves = {"title": "t", "x_label": "x", "x": [1, 2, 3]}
    series = {"ties": [0.1, None, 0.5], "mine": [0.25, 0.25, 0.25]}
    found = FindingsCurves(y_label="top-1", series=series, **curves)
    ties, mine = findings_series(found)
    assert (ties.label, ties.y, ties.is_level) == ("TIES-Merging", (10.0, None, 50.0), False)
    assert (mine.y, mine.is_level) == ((25.0, 25.0, 25.0), True)
    assert findings_series(found.model_copy(update={"y_label": "MB"}))[0].y == (0.1, None, 0.5)
