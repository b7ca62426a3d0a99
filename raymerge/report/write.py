"""Writing a report: one page, and the charts as PNG files, beside the data they show."""

from __future__ import annotations

from pathlib import Path

from raymerge.files.atomic import write_text
from raymerge.report.charts import (
    findings_chart,
    lambda_curves,
    lambda_map,
    method_bars,
    scan_chart,
)
from raymerge.report.comparison_page import comparison_page
from raymerge.report.data import Comparison, Experiment, Run, load
from raymerge.report.experiment_page import experiment_page
from raymerge.report.figures import Chart, save_png
from raymerge.report.run_page import run_page


def write_report(folder: str | Path) -> Path:
    """Draw ``folder/report.html`` from what is in ``folder`` and return its path.

    The page is one file that requests nothing. It is replaced in one step, so that a reader
    never sees half a page. Raises ``UserError``, and writes nothing, if there is nothing to
    draw or a file is malformed.
    """
    folder = Path(folder)
    report = load(folder)
    path = folder / "report.html"
    write_text(path, _page(report))
    return path


def _page(report: Run | Comparison | Experiment) -> str:
    if isinstance(report, Experiment):
        return experiment_page(report)
    return comparison_page(report) if isinstance(report, Comparison) else run_page(report)


def write_plots(folder: str | Path) -> list[Path]:
    """Write PNG files of the page's charts beside the data they show and return their paths.

    A run gives ``lambda_heatmap.png`` (the paper's Fig. 5; bars if λ has no layers) and
    ``lambda_curves.png`` (Fig. 4), if it learned λ. A comparison gives these for every learned
    method under ``runs/``, the layer-wise map and the task-wise curves again at the top,
    ``comparison.png`` and ``uniform_scan.png`` (Fig. 1). An experiment gives ``curves_1.png``
    and so on, one a chart. Raises ``UserError`` as ``write_report`` does.
    """
    report = load(Path(folder))
    charts = _charts(report)
    return [save_png(chart, path) for path, chart in charts.items() if chart is not None]


def _charts(report: Run | Comparison | Experiment) -> dict[Path, Chart | None]:
    """Return every chart that is also a file, by its path."""
    folder = report.folder
    if isinstance(report, Run):
        return _run_charts(report)
    if isinstance(report, Experiment):
        curves = enumerate(report.curves, 1)
        return {folder / f"curves_{number}.png": findings_chart(each) for number, each in curves}
    charts: dict[Path, Chart | None] = {}
    for run in report.runs.values():
        charts |= _run_charts(run)
    layer_wise, task_wise = (report.runs.get(m) for m in ("adamerging", "adamerging_task"))
    charts[folder / "lambda_heatmap.png"] = lambda_map(layer_wise)
    charts[folder / "lambda_curves.png"] = lambda_curves(task_wise) if task_wise else None
    charts[folder / "comparison.png"] = method_bars(report)
    charts[folder / "uniform_scan.png"] = scan_chart(report)
    return charts


def _run_charts(run: Run) -> dict[Path, Chart | None]:
    return {
        run.folder / "lambda_heatmap.png": lambda_map(run) if run.metrics else None,
        run.folder / "lambda_curves.png": lambda_curves(run),
    }
