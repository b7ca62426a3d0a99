"""The charts as PNG files, by matplotlib's object interface (no pyplot, no global state).

Shapes: K tasks, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raymerge.files.atomic import write_atomically
from raymerge.report.curves import Series, found_series, lambda_series, scan_series
from raymerge.report.data import Comparison, Experiment, Lambdas, Run, load
from raymerge.report.names import NOT_MERGED, layer_groups, method_title
from raymerge.report.ranking import leaders, mean_top1
from raymerge.report.svg import colour_range, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 160
_PLATE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "boxstyle": "round"}
_BEST, _MERGED, _REFERENCE = "#1f5fa8", "#9fb4cc", "#c3c9d0"


def write_plots(folder: str | Path) -> list[Path]:
    """Writes PNG files beside the data they show and returns their paths.

    A run gives ``lambda_heatmap.png`` (the paper's Fig. 5) and ``lambda_curves.png`` (Fig. 4),
    as far as it has λ. A comparison gives these for every learned method under ``runs/``, the
    layer-wise map and the task-wise curves again at the top, ``comparison.png`` and
    ``uniform_scan.png`` (Fig. 1). An experiment gives ``curves_1.png`` and so on, one a chart.
    Raises ``UserError`` as ``write_report`` does.
    """
    folder = Path(folder)
    report = load(folder)
    if isinstance(report, Run):
        return _run_plots(report, folder)
    if isinstance(report, Experiment):
        return _experiment_plots(report)
    inner = [path for run in report.runs.values() for path in _run_plots(run, run.folder)]
    return [*inner, *_comparison_plots(report)]


def _run_plots(run: Run, folder: Path) -> list[Path]:
    paths = []
    if run.lambdas and run.metrics:  # a constant λ is no picture
        paths.append(_save(heat_map(run.lambdas), folder / "lambda_heatmap.png"))
    if _has_curves(run):
        paths.append(_save(lambda_curves(run), folder / "lambda_curves.png"))
    return paths


def _comparison_plots(comparison: Comparison) -> list[Path]:
    folder, paths = comparison.folder, []
    layer_wise = comparison.runs.get("adamerging")
    task_wise = comparison.runs.get("adamerging_task")
    if layer_wise and layer_wise.lambdas:
        paths.append(_save(heat_map(layer_wise.lambdas), folder / "lambda_heatmap.png"))
    if task_wise and _has_curves(task_wise):
        paths.append(_save(lambda_curves(task_wise), folder / "lambda_curves.png"))
    if any(value is not None for value in mean_top1(comparison.methods).values()):
        paths.append(_save(method_bars(comparison), folder / "comparison.png"))
    if comparison.scan:
        levels_and_curve = scan_series(comparison, comparison.scan)
        labels = ("λ, the same for every task and layer", "mean top-1")
        paths.append(_save(_lines(levels_and_curve, *labels), folder / "uniform_scan.png"))
    return paths


def _experiment_plots(experiment: Experiment) -> list[Path]:
    return [
        _save(
            _lines(found_series(found), found.x_label, found.y_label),
            experiment.folder / f"curves_{number}.png",
        )
        for number, found in enumerate(experiment.curves, 1)
        if any(y is not None for line in found.series.values() for y in line)
    ]


def _save(figure: Figure, path: Path) -> Path:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=_DPI))
    return path


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure, in inches, and its axes without the upper and right frame."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def heat_map(lambdas: Lambdas) -> Figure:
    """λ: a row a task, a column a layer, block borders and numbers below (Fig. 5)."""
    rows, columns = len(lambdas.tasks), len(lambdas.layers)
    figure, axes = _figure(min(max(4.0, 2.5 + 0.14 * columns), 16.0), 1.3 + 0.3 * rows)
    low, high = colour_range(lambdas)
    # Not imshow: it resamples the whole picture in float64, which takes more than a small merge.
    image = axes.pcolormesh(lambdas.values, cmap="viridis", vmin=low, vmax=high)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.set_yticks([row + 0.5 for row in range(rows)], lambdas.tasks)
    axes.tick_params(length=0, labelsize=9)
    _mark_blocks(axes, lambdas)
    figure.colorbar(image, ax=axes, label="λ", pad=0.05 if lambdas.task_wise else 0.01)
    return figure


def _mark_blocks(axes: Axes, lambdas: Lambdas) -> None:
    if lambdas.task_wise:
        axes.set_xticks([])
        for row, value in enumerate(lambdas.means):
            axes.text(0.5, row + 0.5, f"{value:.3f}", ha="center", va="center", bbox=_PLATE)
        return
    groups = [group for group in layer_groups(lambdas.layers) if group.label]
    middles = [(group.start + group.stop) / 2 for group in groups]
    axes.set_xticks(middles, [group.label for group in groups])
    axes.set_xlabel("layer, by block")
    for group in groups[1:]:
        axes.axvline(group.start, color="white", linewidth=0.8)


def _has_curves(run: Run) -> bool:
    return run.metrics is not None and bool(run.metrics.lambdas)


def lambda_curves(run: Run) -> Figure:
    """Each task's λ, averaged over its layers, against the steps (Fig. 4)."""
    task_wise = run.lambdas is not None and run.lambdas.task_wise
    series = lambda_series(run.metrics) if run.metrics else []
    return _lines(series, "step", "λ" if task_wise else "λ, mean over layers")


def _lines(series: Sequence[Series], x_label: str, y_label: str) -> Figure:
    """Lines named at their right ends; a level (``constant``) is dashed grey."""
    figure, axes = _figure(9, max(4.0, 0.22 * len(series)))
    for index, line in enumerate(series):
        y = [float("nan") if value is None else value for value in line.y]
        colour, style, width = _pen(line, index)
        mark = "o" if len(y) <= 20 and not line.constant else ""
        axes.plot(line.x, y, color=colour, linestyle=style, linewidth=width, marker=mark)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#e8ebee")
    axes.margins(x=0)
    _name_lines(axes, series)
    return figure


def _pen(line: Series, index: int) -> tuple[str, str, float]:
    """Colour, line style and width in points."""
    if line.constant:
        return "#5b6570", ":", 1.2
    if line.strong:
        return "#1b1f24", "-", 2.2
    return f"C{index % 10}", "-" if index % 20 < 10 else "--", 1.5


def _name_lines(axes: Axes, series: Sequence[Series]) -> None:
    """Writes each name beside the end of its line, with a leader where it had to move."""
    ends = [(line, next((y for y in reversed(line.y) if y is not None), None)) for line in series]
    named = [(line, axes.get_lines()[i], y) for i, (line, y) in enumerate(ends) if y is not None]
    low, high = axes.get_ylim()
    slots = spread([y for _, _, y in named], (high - low) / max(18, len(named)), low, high)
    for (line, drawn, y), slot in zip(named, slots, strict=True):
        colour = drawn.get_color()
        axes.annotate(
            line.label,
            xy=(1, y),
            xytext=(1.04, slot),
            xycoords=("axes fraction", "data"),
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5)},
        )


def method_bars(comparison: Comparison) -> Figure:
    """Mean accuracy of every method that has one, in %."""
    top1 = {n: v for n, v in mean_top1(comparison.methods).items() if v is not None}
    best = leaders(top1)
    colours = [
        _REFERENCE if name in NOT_MERGED else _BEST if name in best else _MERGED for name in top1
    ]
    figure, axes = _figure(9, 0.9 + 0.36 * len(top1))
    bars = axes.barh(
        [method_title(name) for name in top1], [100 * v for v in top1.values()], color=colours
    )
    axes.bar_label(bars, fmt="%.1f", padding=4, fontsize=9)
    axes.set_xlim(0, 105)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("mean top-1, %")
    return figure
