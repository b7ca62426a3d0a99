"""Charts as inline SVG. Colours are CSS classes (``theme.py``), so they follow light and dark.

Lengths are SVG user units, one CSS pixel at full width. Shapes: K tasks, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raymerge.report.curves import Series
from raymerge.report.data import Lambdas
from raymerge.report.formats import decimal, same_places, tick_text, ticks
from raymerge.report.markup import Markup, compact, join, tag
from raymerge.report.names import LayerGroup, layer_groups
from raymerge.report.theme import COLOUR_LEVELS

WIDTH = 1080
GLYPH = 7.2
"""Room for a character of a label, 12 px on screen and 13 px in print."""
BOLD_GLYPH = 8.1


@dataclass(frozen=True)
class Axis:
    """A linear map from data in [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        width = self.high - self.low
        share = (value - self.low) / width if width else 0.5  # numbers too large for a margin
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        return ticks(self.low, self.high)


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    text: str
    kind: str = "merged"
    """"best", "merged" or "reference"."""


def shorten(label: str, most: int) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def text(content: str, x: float, y: float, class_: str, anchor: str | None = None) -> Markup:
    return tag("text", content, x=x, y=y, class_=class_, text_anchor=anchor)


def _svg(width: float, height: float, label: str, *children: str) -> Markup:
    drawing = tag(
        "svg",
        *children,
        viewBox=f"0 0 {compact(width)} {compact(height)}",
        role="img",
        aria_label=label,
    )
    return tag("div", drawing, class_="chart")


# Line chart


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    y_label: str,
    y_text: Callable[[float], str] = tick_text,
) -> Markup | None:
    """Lines with their names at the right end; None where no line has a value.

    ``y_text`` writes the ticks and the values in the tooltips.
    """
    drawn = [line for line in series if any(y is not None for y in line.y)]
    if not drawn:
        return None
    names = max(len(shorten(line.label, 28)) for line in drawn)
    height = max(330, 16 * len(drawn) + 70)
    lead = 12 + min(48, 2 * len(drawn))
    x_end = WIDTH - 6 - lead - GLYPH * names
    x = Axis(*_range([v for line in drawn for v in line.x]), 48, x_end)
    values = [y for line in drawn for y in line.y if y is not None]
    y = Axis(*_padded(*_range(values)), height - 46, 30)
    slots = spread([y(_last(line)) for line in drawn], gap=15, low=30, high=height - 16)
    lines = [_line(one, i, x, y, (x_end + lead, slots[i]), y_text) for i, one in enumerate(drawn)]
    frame = _frame(x, y, x_label, y_label, y_text)
    return _svg(WIDTH, height, label, frame, *lines)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _padded(low: float, high: float) -> tuple[float, float]:
    """Some air above and below; values that start near zero get an axis from zero."""
    margin = 0.06 * (high - low)
    return (0.0 if 0 <= low < 0.5 * high else low - margin, high + margin)


def _last(line: Series) -> float:
    return next(y for y in reversed(line.y) if y is not None)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions in the same order, at least ``gap`` apart and inside [low, high] if they fit.

    They are the least-squares closest to ``wanted``: each run of positions that would overlap
    is centred on its mean (pool adjacent violators).
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    pools: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        mean, size = wanted[index] - rank * gap, 1
        while pools and pools[-1][0] >= mean:
            other, others = pools.pop()
            mean = (mean * size + other * others) / (size + others)
            size += others
        pools.append((mean, size))
    starts = [mean for mean, size in pools for _ in range(size)]
    last = high - (len(wanted) - 1) * gap
    placed = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        placed[index] = max(low, min(starts[rank], last)) + rank * gap
    return placed


def _frame(x: Axis, y: Axis, x_label: str, y_label: str, y_text: Callable[[float], str]) -> Markup:
    """Horizontal grid lines, tick labels and axis names."""
    rows = [
        join(
            tag("line", x1=x.start, x2=x.end, y1=y(tick), y2=y(tick), class_="grid"),
            text(written, x.start - 8, y(tick) + 4, "tick", "end"),
        )
        for tick, written in zip(y.ticks, same_places(map(y_text, y.ticks)), strict=True)
    ]
    columns = [
        text(written, x(tick), y.start + 18, "tick", "middle")
        for tick, written in zip(x.ticks, same_places(map(tick_text, x.ticks)), strict=True)
    ]
    names = (
        text(y_label, 0, 12, "axis"),
        text(x_label, (x.start + x.end) / 2, y.start + 38, "axis", "middle"),
    )
    return join(*rows, *columns, *names)


def _line(
    line: Series,
    index: int,
    x: Axis,
    y: Axis,
    slot: tuple[float, float],
    y_text: Callable[[float], str],
) -> Markup:
    """The line, its name at ``slot`` and a leader from the one to the other."""
    first, last = next(v for v in line.y if v is not None), _last(line)
    end_x = x(max(at for at, v in zip(line.x, line.y, strict=True) if v is not None))
    course = y_text(last) if line.constant else f"{y_text(first)} → {y_text(last)}"
    leader = f"M{compact(end_x)} {compact(y(last))}L{compact(slot[0])} {compact(slot[1])}"
    return tag(
        "g",
        tag("title", f"{line.label}: {course}"),
        tag("path", d=leader, class_="leader"),
        tag("path", d=_path(line, x, y), class_="line"),
        *_dots(line, x, y),
        text(shorten(line.label, 28), slot[0] + 4, slot[1] + 4, "name"),
        class_=_line_class(line, index),
    )


def _dots(line: Series, x: Axis, y: Axis) -> list[Markup]:
    """The points of a short line: a single one would not be visible otherwise."""
    if line.constant or len(line.x) > 20:
        return []
    return [
        tag("circle", cx=x(at), cy=y(value), r=3, class_="dot")
        for at, value in zip(line.x, line.y, strict=True)
        if value is not None
    ]


def _line_class(line: Series, index: int) -> str:
    if line.constant:
        return "series constant"
    return "series strong" if line.strong else f"series s{index % 20}"


def _path(line: Series, x: Axis, y: Axis) -> str:
    """SVG path data; a gap in the values starts a new stroke."""
    commands = []
    pen = "M"
    for at, value in zip(line.x, line.y, strict=True):
        if value is None:
            pen = "M"
            continue
        commands.append(f"{pen}{compact(x(at))} {compact(y(value))}")
        pen = "L"
    return "".join(commands)


# Bars


def bar_chart(bars: Sequence[Bar], *, label: str, most: float) -> Markup:
    """Horizontal bars on a scale from 0 to ``most``, the value written at the end of each."""
    names = max(len(shorten(bar.label, 34)) for bar in bars)
    x = Axis(0, most, 12 + BOLD_GLYPH * names, WIDTH - 60)
    rows = [_bar(bar, 26 * index, x) for index, bar in enumerate(bars)]
    return _svg(WIDTH, 26 * len(bars) + 4, label, *rows)


def _bar(bar: Bar, top: float, x: Axis) -> Markup:
    start, end = sorted((x(0), x(max(min(bar.value, x.high), 0))))
    return tag(
        "g",
        tag("title", f"{bar.label}: {bar.text}"),
        text(shorten(bar.label, 34), x.start - 10, top + 18, "name", "end"),
        tag("rect", x=start, y=top + 4, width=max(end - start, 1), height=18, class_="fill"),
        text(bar.text, end + 8, top + 18, "value"),
        class_=f"bar {bar.kind}",
    )


# Heat map


@dataclass(frozen=True)
class Grid:
    """Where the cells of a heat map are."""

    left: float
    top: float
    cell: float
    row: float
    rows: int
    columns: int

    @property
    def right(self) -> float:
        return self.left + self.cell * self.columns

    @property
    def bottom(self) -> float:
        return self.top + self.row * self.rows


def heat_map(lambdas: Lambdas, *, label: str) -> Markup:
    """λ with a row a task, a column a layer; tooltips name the cell and its value."""
    left = 14 + GLYPH * max(len(shorten(name, 22)) for name in lambdas.tasks)
    cell = max(3, min(40, (WIDTH - left - 52) // len(lambdas.layers)))
    row = 24 if len(lambdas.tasks) <= 10 else 18
    grid = Grid(left, 44, cell, row, len(lambdas.tasks), len(lambdas.layers))
    low, high = colour_range(lambdas)
    rows = [_heat_row(lambdas, k, grid, low, high) for k in range(grid.rows)]
    return _svg(
        max(WIDTH, grid.right + 52),
        grid.bottom + 42,
        label,
        *rows,
        _group_marks(layer_groups(lambdas.layers), grid),
        text("mean", grid.right + 44, grid.top - 8, "tick", "end"),
        text("layer, by block", grid.left, grid.bottom + 36, "axis"),
        _colour_bar(grid.left, low, high),
    )


def colour_range(lambdas: Lambdas) -> tuple[float, float]:
    """The ends of the colour scale: from 0, or from a negative λ, to the largest λ."""
    values = [value for row_L in lambdas.values for value in row_L]
    low, high = min(0.0, *values), max(values)
    return (low, high) if high > low else (low, low + 1.0)


def level(value: float, low: float, high: float) -> int:
    """The colour class of ``value``, from 0 to ``COLOUR_LEVELS`` − 1."""
    return min(int((value - low) / (high - low) * COLOUR_LEVELS), COLOUR_LEVELS - 1)


def _heat_row(lambdas: Lambdas, k: int, grid: Grid, low: float, high: float) -> Markup:
    task, y = lambdas.tasks[k], grid.top + k * grid.row
    baseline = y + grid.row / 2 + 4
    cells = [
        tag(
            "rect",
            tag("title", f"{task} · {layer}: {value:.4f}"),
            x=grid.left + column * grid.cell,
            y=y,
            width=grid.cell,
            height=grid.row - 1,
            class_=f"c{level(value, low, high)}",
        )
        for column, (layer, value) in enumerate(zip(lambdas.layers, lambdas.values[k], strict=True))
    ]
    return join(
        text(shorten(task, 22), grid.left - 8, baseline, "name", "end"),
        tag("g", *cells, class_="cells"),
        text(decimal(lambdas.means[k]), grid.right + 44, baseline, "value", "end"),
    )


def _group_marks(groups: Sequence[LayerGroup], grid: Grid) -> Markup:
    """A hair line before every block, and as many block labels as fit."""
    lines = [
        tag("line", x1=x, x2=x, y1=grid.top, y2=grid.bottom - 1, class_="block")
        for x in (grid.left + group.start * grid.cell for group in groups[1:])
    ]
    labels, free_from = [], grid.left - 20
    for group in groups:
        middle = grid.left + (group.start + group.stop) / 2 * grid.cell
        half = len(group.label) * GLYPH / 2
        if group.label and middle - half >= free_from:
            labels.append(text(group.label, middle, grid.bottom + 16, "tick", "middle"))
            free_from = middle + half + 5
    return join(*lines, *labels)


def _colour_bar(left: float, low: float, high: float) -> Markup:
    """The scale, above the cells: its two ends in numbers."""
    start, step = left + 58, 2.5
    stripes = [
        tag("rect", x=start + step * i, y=4, width=step, height=12, class_=f"c{i}")
        for i in range(COLOUR_LEVELS)
    ]
    end = start + step * COLOUR_LEVELS
    return join(
        text(f"λ = {low:.2f}", start - 6, 14, "tick", "end"),
        tag("g", *stripes, class_="cells"),
        text(f"{high:.2f}", end + 6, 14, "tick"),
    )
