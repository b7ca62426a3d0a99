"""The three kinds of chart, drawn once with matplotlib: for the page and for the PNG files.

Each is drawn by matplotlib's object interface (no pyplot, no global state) in the light colours
of ``theme``. A part that explains itself on hover has a ``gid``, by which ``inline_svg`` finds it.
What to draw is left to ``charts``. Lengths are CSS pixels at full width; matplotlib is imported
only when something is drawn.

Shapes: K tasks, L layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymerge.errors import escape_unprintable
from raymerge.files.atomic import write_atomically
from raymerge.report.curves import Series
from raymerge.report.formats import decimal, short
from raymerge.report.names import layer_groups
from raymerge.report.records import Lambdas
from raymerge.report.theme import LIGHT, SERIES_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 1080
COLOUR_LEVELS = 64
_LARGEST = 1e100
"""Larger numbers are drawn as this: matplotlib's arithmetic on axes would overflow."""
_PNG_DPI = 110
_DPI = 72
"""Makes a CSS pixel of one of matplotlib's points."""


@dataclass(frozen=True)
class Chart:
    """A figure and its words. ``label`` describes it to those who do not see it."""

    figure: Figure
    label: str
    tooltips: Mapping[str, Sequence[str]]
    """Gid → one text for all that has this gid, or one for each of its shapes in order."""


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    text: str
    colour: str = "quiet"
    """A name in ``theme.LIGHT``; "accent" also makes the texts bold."""


@contextmanager
def style() -> Iterator[None]:
    """Set what figures need of matplotlib while they are made and while they are saved."""
    import matplotlib

    settings: Any = {
        "font.size": 12,
        "text.color": LIGHT["ink"],
        "text.parse_math": False,  # a task may be called $x$
        "axes.formatter.useoffset": False,
        "svg.fonttype": "none",  # text stays text
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # matplotlib's own font lacks some scripts; a browser has others.
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def save_png(chart: Chart, path: Path) -> Path:
    with style():
        write_atomically(path, lambda file: chart.figure.savefig(file, format="png", dpi=_PNG_DPI))
    return path


def _axes(height: float) -> tuple[Figure, Axes]:
    """Return an empty figure of full width and its axes, without frame and tick marks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / _DPI, height / _DPI), dpi=_DPI)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=6, labelcolor=LIGHT["muted"])
    return figure, axes


def _fit(figure: Figure, axes: Axes, top: float, bottom: float) -> None:
    """Give the axes all the height but ``top`` and ``bottom``, and the width their names leave."""
    height = figure.get_figheight() * _DPI
    left, right = 100.0, 100.0
    for _ in range(2):  # names beside the axes move a little with their width
        figure.subplots_adjust(
            **{"left": left / WIDTH, "right": 1 - right / WIDTH},
            **{"top": 1 - top / height, "bottom": bottom / height},
        )
        outer: Any = axes.get_tightbbox()
        inner = axes.get_window_extent()
        # The rest is for a browser whose font is wider than matplotlib's.
        left, right = inner.x0 - outer.x0 + 12, outer.x1 - inner.x1 + 20
    figure.subplots_adjust(left=left / WIDTH, right=1 - right / WIDTH)


def _drawable(value: float | None) -> float:
    return float("nan") if value is None else max(-_LARGEST, min(value, _LARGEST))


def _label(name: str, most: int) -> str:
    """Return a name from a file as one line of at most ``most`` characters."""
    name = escape_unprintable(name)
    return name if len(name) <= most else name[: most - 1] + "…"


# Lines


def line_chart(series: Sequence[Series], *, label: str, x_label: str, y_label: str) -> Chart | None:
    """Draw lines with their names at the right end; None where no line has a value."""
    lines = [line for line in series if _points(line)]
    if not lines:
        return None
    with style():
        height = max(330, 16 * len(lines) + 80)
        figure, axes = _axes(height)
        for index, line in enumerate(lines):
            _draw_line(axes, line, index)
        _scale_axes(axes, lines)
        axes.set_xlabel(_label(x_label, 80), color=LIGHT["muted"])
        axes.set_title(_label(y_label, 80), loc="left", fontsize=12, color=LIGHT["muted"])
        _name_lines(axes, lines, height - 76)
        _fit(figure, axes, top=30, bottom=46)
    return Chart(figure, label, {f"line-{i}": [_course(line)] for i, line in enumerate(lines)})


def _points(line: Series) -> list[tuple[float, float]]:
    """Return the points that were measured."""
    return [(x, _drawable(y)) for x, y in zip(line.x, line.y, strict=True) if y is not None]


def _draw_line(axes: Axes, line: Series, index: int) -> None:
    """Draw a line; the points of a short one too, for one alone would not be visible."""
    colour, dashes, width = _pen(line, index)
    (drawn,) = axes.plot(line.x, [_drawable(y) for y in line.y], gid=f"line-{index}")
    drawn.set(color=colour, linestyle=dashes, linewidth=width, clip_on=False)
    if len(line.x) <= 20 and not line.is_level:
        drawn.set(marker="o", markersize=6)


def _pen(line: Series, index: int) -> tuple[str, str, float]:
    """Return colour, line style and width: twenty lines are told apart, solid and then dashed."""
    if line.is_level:
        return LIGHT["muted"], ":", 2
    if line.is_strong:
        return LIGHT["ink"], "-", 2.8
    dashes = "-" if index % (2 * SERIES_COLOURS) < SERIES_COLOURS else "--"
    return LIGHT[f"series-{index % SERIES_COLOURS}"], dashes, 1.6


def _scale_axes(axes: Axes, lines: Sequence[Series]) -> None:
    """Set round ticks and draw the y-axis from zero where values start near it."""
    from matplotlib.ticker import MaxNLocator

    whole = all(float(x).is_integer() for line in lines for x in line.x)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=whole))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.margins(x=0, y=0.06)
    values = [y for line in lines for _, y in _points(line)]
    if 0 <= min(values) < 0.5 * max(values):
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=LIGHT["grid"], linewidth=1)


def _name_lines(axes: Axes, lines: Sequence[Series], height: float) -> None:
    """Write each name beside the end of its line, with a leader to where it found room.

    ``height``: of the axes.
    """
    from matplotlib.lines import Line2D

    left, right = axes.get_xlim()
    low, high = axes.get_ylim()
    pixel = (high - low) / height
    ends = [_points(line)[-1] for line in lines]
    slots = spread([y for _, y in ends], 15 * pixel, low - 20 * pixel, high)
    place = axes.get_yaxis_transform()  # x as a fraction of the axes, y in data
    x_name = 1 + (12 + min(48, 2 * len(lines))) / WIDTH
    for index, (line, (x, y), slot) in enumerate(zip(lines, ends, slots, strict=True)):
        colour, _, _ = _pen(line, index)
        leader = Line2D([(x - left) / (right - left), x_name], [y, slot], linewidth=0.8, alpha=0.55)
        name = axes.text(x_name + 0.004, slot, _label(line.label, 28), va="center")
        name.set_fontweight("bold" if line.is_strong else "normal")
        for part in (axes.add_artist(leader), name):
            part.set(color=colour, transform=place, clip_on=False, gid=f"line-{index}")


def _course(line: Series) -> str:
    """Return a line's name and its first and last value."""
    values = [short(y, 4) for y in line.y if y is not None]
    first, last = values[0], values[-1]
    return f"{line.label}: {last if line.is_level else f'{first} → {last}'}"


def spread(targets: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions in the same order, at least ``gap`` apart, inside [low, high] if they fit.

    They are the least-squares closest to ``targets``: each run of positions that would overlap
    is centred on its mean (pool adjacent violators).
    """
    order = sorted(range(len(targets)), key=targets.__getitem__)
    pools: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        mean, size = targets[index] - rank * gap, 1
        while pools and pools[-1][0] >= mean:
            other, others = pools.pop()
            mean = (mean * size + other * others) / (size + others)
            size += others
        pools.append((mean, size))
    starts = [mean for mean, size in pools for _ in range(size)]
    last = high - (len(targets) - 1) * gap
    positions = [0.0] * len(targets)
    for rank, index in enumerate(order):
        positions[index] = max(low, min(starts[rank], last)) + rank * gap
    return positions


# Bars


def bar_chart(bars: Sequence[Bar], *, label: str, most: float) -> Chart:
    """Draw horizontal bars on a scale that reaches ``most``, each with its value at the end."""
    with style():
        figure, axes = _axes(26 * len(bars) + 4)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(min(0.0, *(_drawable(bar.value) for bar in bars)), _drawable(most))
        axes.set_xticks([])
        names = axes.set_yticks(range(len(bars)), [_label(bar.label, 34) for bar in bars])
        for row, (bar, tick) in enumerate(zip(bars, names, strict=True)):
            value, gid = _drawable(bar.value), f"bar-{row}"
            weight = "bold" if bar.colour == "accent" else "normal"
            tick.label1.set(color=LIGHT["ink"], fontweight=weight, gid=gid)
            axes.barh(row, value, height=0.7, color=LIGHT[bar.colour], gid=gid)
            end = (max(value, 0.0), row)
            text = axes.annotate(bar.text, end, xytext=(8, 0), textcoords="offset points")
            text.set(va="center_baseline", fontweight=weight, gid=gid)
        _fit(figure, axes, top=2, bottom=2)
    return Chart(figure, label, {f"bar-{i}": [f"{b.label}: {b.text}"] for i, b in enumerate(bars)})


# Heat map


def heat_map(lambdas: Lambdas, *, label: str, start: float | None = None) -> Chart:
    """Draw λ with a row a task and a column a layer (AdaMerging paper, Fig. 5).

    The colours diverge from ``start``, the λ before the first step; default: from the middle.
    """
    from matplotlib import colormaps

    K, L = len(lambdas.tasks), len(lambdas.layers)
    row_height = 24 if K <= 10 else 18
    low, high = colour_range(lambdas, start)
    with style():
        figure, axes = _axes(row_height * K + 90)
        # Not imshow: a page without requests cannot hold its raster, and a cell needs a tooltip.
        values_KL = [[_drawable(value) for value in row_L] for row_L in lambdas.values]
        diverging = colormaps["coolwarm"].resampled(COLOUR_LEVELS)
        mesh = axes.pcolormesh(values_KL, cmap=diverging, vmin=low, vmax=high, gid="cells")
        axes.invert_yaxis()
        axes.hlines(range(1, K), 0, L, color=LIGHT["paper"], linewidth=1)
        axes.set_yticks(
            [k + 0.5 for k in range(K)],
            [_label(task, 22) for task in lambdas.tasks],
            color=LIGHT["ink"],
        )
        _mark_blocks(axes, lambdas)
        _write_means(axes, lambdas)
        _draw_scale(axes, mesh, row_height * K, _range_text(lambdas, start))
        _fit(figure, axes, top=44, bottom=46)
    cells = [
        f"{task} · {layer}: {value:.4f}"
        for task, row_L in zip(lambdas.tasks, lambdas.values, strict=True)
        for layer, value in zip(lambdas.layers, row_L, strict=True)
    ]
    return Chart(figure, label, {"cells": cells})


def colour_range(lambdas: Lambdas, start: float | None = None) -> tuple[float, float]:
    """Return the ends of the colour scale: equally far from ``start``, and no λ beyond them."""
    low, high = (_drawable(value) for value in lambdas.range)
    centre = (low + high) / 2 if start is None else _drawable(start)
    reach = max(high - centre, centre - low) or 1.0
    return centre - reach, centre + reach


def _range_text(lambdas: Lambdas, start: float | None) -> str:
    low, high = lambdas.range
    before = "" if start is None else f"; {decimal(start)} before the first step"
    return f"λ from {decimal(low)} to {decimal(high)}{before}"


def _mark_blocks(axes: Axes, lambdas: Lambdas) -> None:
    """Draw a line before every block, and as many block labels as fit."""
    groups = layer_groups(lambdas.layers)
    axes.vlines([group.start for group in groups[1:]], 0, len(lambdas.tasks), color=LIGHT["paper"])
    room = 850 / len(lambdas.layers)
    ticks, free_from = {}, -20.0
    for group in groups:
        middle = (group.start + group.stop) / 2
        half = 4 * len(group.label)
        if group.label and middle * room - half >= free_from:
            ticks[middle] = group.label
            free_from = middle * room + half + 5
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel("layer, by block", loc="left", color=LIGHT["muted"])


def _write_means(axes: Axes, lambdas: Lambdas) -> None:
    place = axes.get_yaxis_transform()
    for k, mean in enumerate(lambdas.means):
        axes.text(1.045, k + 0.5, decimal(mean), ha="right", va="center_baseline", transform=place)
    axes.text(1.045, -0.25, "mean", ha="right", color=LIGHT["muted"], transform=place)


def _draw_scale(axes: Axes, mesh: Any, height: float, text: str) -> None:
    """Draw the colour scale, its ends and ``text`` above the cells, which are ``height`` high."""
    low, high = mesh.get_clim()
    pixel = 1 / height
    scale = axes.inset_axes((0.07, 1 + 20 * pixel, 0.16, 12 * pixel))
    bar: Any = axes.figure.colorbar(mesh, cax=scale, orientation="horizontal", ticks=[])
    bar.solids.set_rasterized(False)  # an image inside the SVG would be a request
    bar.solids.set_edgecolor("face")  # no seams between its stripes
    bar.outline.set_visible(False)
    ends = (
        scale.text(-0.03, 0.5, f"λ = {decimal(low, 2)}", ha="right"),
        scale.text(1.03, 0.5, f"{decimal(high, 2)}   ({text})", ha="left"),
    )
    for end in ends:
        end.set(color=LIGHT["muted"], va="center_baseline", transform=scale.transAxes)
