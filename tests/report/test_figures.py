"""Facts about the charts: where labels go, what is drawn of odd numbers and names."""

from __future__ import annotations

import random
import warnings

import pytest
from report_samples import metrics_of

from raymerge.report.curves import Series, lambda_series
from raymerge.report.figures import (
    Bar,
    bar_chart,
    colour_range,
    heat_map,
    line_chart,
    save_png,
    spread,
)
from raymerge.report.records import Lambdas


def lambdas_of(*rows: tuple[float, ...]) -> Lambdas:
    tasks, layers = (
        tuple(f"{kind}{i}" for i in range(size))
        for kind, size in (("t", len(rows)), ("l", len(rows[0])))
    )
    return Lambdas(tasks=tasks, layers=layers, values=rows)


def lines_of(*series: Series):
    return line_chart(series, label="all", x_label="x", y_label="y")


@pytest.mark.parametrize("seed", range(20))
def test_spread_labels_keep_order_distance_and_bounds(seed):
    rng = random.Random(seed)
    wanted = [rng.uniform(100, 200) for _ in range(18)]
    placed = spread(wanted, gap=15, low=30, high=330)
    ranked = sorted(range(18), key=wanted.__getitem__)
    steps = [placed[b] - placed[a] for a, b in zip(ranked, ranked[1:], strict=False)]
    assert min(steps) >= 15 - 1e-9
    assert min(placed) >= 30 - 1e-9
    assert max(placed) <= 330 + 1e-9


def test_spread_moves_no_label_without_need_and_centres_a_clash():
    assert spread([50.0, 10.0, 90.0], gap=15, low=0, high=100) == [50.0, 10.0, 90.0]
    assert spread([50.0, 50.0], gap=10, low=0, high=100) == [45.0, 55.0]


def test_the_colours_diverge_from_the_start_and_reach_the_farthest_value():
    assert colour_range(lambdas_of((-0.1, 0.7))) == pytest.approx((-0.1, 0.7))
    assert colour_range(lambdas_of((0.28, 0.32)), 0.3) == pytest.approx((0.28, 0.32))
    assert colour_range(lambdas_of((0.2, 0.3)), 0.3) == pytest.approx((0.2, 0.4))
    assert colour_range(lambdas_of((0.0,))) == (-1.0, 1.0)  # no range: any, around the value


def test_a_chart_without_values_is_none():
    assert lines_of() is None
    (empty,) = lambda_series(metrics_of({"a": (None, None)}))
    assert lines_of(empty) is None


def test_tooltips_give_the_course_of_a_line():
    chart = lines_of(
        Series("rising", (1, 2, 3), (0.1, None, 0.25)),
        Series("flat", (1, 3), (2, 2), is_level=True),
    )
    assert chart is not None
    assert chart.tooltips == {"line-0": ["rising: 0.1 → 0.25"], "line-1": ["flat: 2"]}


def test_values_near_zero_are_drawn_from_zero_and_others_from_near_them():
    near, far = (lines_of(Series("a", (1, 2), y)) for y in ((0.1, 0.9), (0.7, 0.9)))
    assert near is not None
    assert far is not None
    assert near.figure.axes[0].get_ylim()[0] == 0
    assert 0.6 < far.figure.axes[0].get_ylim()[0] < 0.7


ODD_NAMES = ("$x^2$", "a\nb", "\x1b[2J", "é\ud800", "任务", "x" * 500, "")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_drawn_without_a_warning(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        charts = (
            line_chart([Series(name, (1, 2), (1, 2))], label=name, x_label=name, y_label=name),
            bar_chart([Bar(name, 0.5, "0.5")], label=name, most=1),
            heat_map(Lambdas(tasks=(name,), layers=(name, "b"), values=((0.1, 0.2),)), label=name),
        )
        for chart in charts:
            assert chart is not None
            assert save_png(chart, tmp_path / "chart.png").stat().st_size > 0


@pytest.mark.parametrize("values", [(1e308, -1e308), (-1.0, -2.0), (9e18, 9e18), (5e-324, 0.0)])
def test_odd_numbers_are_drawn_without_a_warning(tmp_path, values):
    low, high = sorted(values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        charts = (
            lines_of(Series("a", (1, 2), values), Series("b", (1, 2), (high, None))),
            bar_chart([Bar("a", low, "low"), Bar("b", high, "high")], label="", most=high or 1.0),
            heat_map(lambdas_of(values), label=""),
        )
        for chart in charts:
            assert chart is not None
            assert save_png(chart, tmp_path / "chart.png").stat().st_size > 0
