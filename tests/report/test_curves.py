"""Facts about smoothing, label placement, ticks and colours."""

from __future__ import annotations

import random

import pytest

from raymerge.report.curves import MOST_POINTS, lambda_series, running_mean, task_mean, window
from raymerge.report.data import Lambdas, Metrics
from raymerge.report.formats import percent, same_places, seconds, tick_text, ticks
from raymerge.report.markup import Markup, tag
from raymerge.report.svg import colour_range, level, line_chart, spread
from raymerge.report.theme import COLOUR_LEVELS, viridis


def metrics_of(lambdas: dict[str, tuple[float | None, ...]]) -> Metrics:
    count = len(next(iter(lambdas.values())))
    nothing = (None,) * count
    return Metrics(tuple(range(1, count + 1)), nothing, {}, lambdas, nothing)


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


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(1, 500) == [100, 200, 300, 400, 500]
    assert ticks(0.31, 0.312) == [0.31, 0.3105, 0.311, 0.3115, 0.312]
    assert ticks(-0.2, 0.2) == [-0.2, -0.1, 0.0, 0.1, 0.2]
    assert ticks(3, 3) == [3]


def test_numbers_are_written_for_people():
    assert percent(0.83449) == "83.4"
    assert percent(None) == "–"
    assert [seconds(s) for s in (0.012, 3.21, 754, 7504)] == [
        "12 ms",
        "3.2 s",
        "12 min 34 s",
        "2 h 5 min",
    ]
    assert same_places(["0", "0.25", "1.5"]) == ["0.00", "0.25", "1.50"]
    assert tick_text(-0.5) == "−0.5"


def test_the_colour_scale_has_its_ends_at_the_extremes():
    lambdas = Lambdas(("a",), ("x", "y"), ((-0.1, 0.7),))
    assert colour_range(lambdas) == (-0.1, 0.7)
    assert colour_range(Lambdas(("a",), ("x",), ((0.7,),))) == (0.0, 0.7)
    assert colour_range(Lambdas(("a",), ("x",), ((0.0,),))) == (0.0, 1.0)
    assert [level(v, -0.1, 0.7) for v in (-0.1, 0.7)] == [0, COLOUR_LEVELS - 1]


def test_colours_follow_viridis():
    matplotlib = pytest.importorskip("matplotlib")
    for index in range(COLOUR_LEVELS):
        exact = matplotlib.colormaps["viridis"](index / (COLOUR_LEVELS - 1))[:3]
        ours = bytes.fromhex(viridis(index)[1:])
        assert ours == pytest.approx([255 * channel for channel in exact], abs=12)


def test_a_chart_without_values_is_none():
    assert line_chart([], label="", x_label="", y_label="") is None
    (empty,) = lambda_series(metrics_of({"a": (None, None)}))
    assert line_chart([empty], label="", x_label="", y_label="") is None


def test_a_gap_interrupts_the_line():
    (line,) = lambda_series(metrics_of({"a": (0.1, None, 0.3, 0.2)}))
    chart = line_chart([line], label="", x_label="", y_label="")
    assert chart is not None
    path = chart.split('class="line"')[0].rpartition('d="')[2]
    assert (path.count("M"), path.count("L")) == (2, 1)


def test_markup_escapes_text_and_attributes_but_not_markup():
    inner = tag("b", "<&>")
    assert inner == "<b>&lt;&amp;&gt;</b>"
    outer = tag("td", inner, "x<y", title='a"b<c', class_="n", data_k=0.5)
    expected = '<td title="a&quot;b&lt;c" class="n" data-k="0.5"><b>&lt;&amp;&gt;</b>x&lt;y</td>'
    assert outer == expected
    assert isinstance(outer, Markup)
