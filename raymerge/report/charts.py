"""The charts of a run, a comparison and an experiment, each for the page and as a PNG file.

Only what there is to see is drawn: a chart without a value is None.
"""

from __future__ import annotations

from raymerge.report.curves import (
    entropy_series,
    findings_series,
    is_accuracy,
    lambda_series,
    mean_entropy_series,
    scan_series,
)
from raymerge.report.data import Comparison, Metrics, Run
from raymerge.report.figures import Bar, Chart, bar_chart, heat_map, line_chart
from raymerge.report.formats import decimal, percent
from raymerge.report.names import first_lambda, is_merged, method_title
from raymerge.report.ranking import leaders, mean_top1
from raymerge.report.records import FindingsCurves


def entropy_chart(metrics: Metrics) -> Chart | None:
    """Draw each task's entropy while learning."""
    return line_chart(
        entropy_series(metrics),
        label="Entropy of every task against the steps",
        x_label="step",
        y_label="entropy, nats",
    )


def lambda_curves(run: Run) -> Chart | None:
    """Draw each task's λ, averaged over its layers, against the steps (paper, Fig. 4)."""
    return line_chart(
        lambda_series(run.metrics) if run.metrics else [],
        label="Coefficient of every task against the steps",
        x_label="step",
        y_label="λ" if run.lambdas and run.lambdas.is_task_wise else "λ, mean over layers",
    )


def lambda_map(run: Run | None) -> Chart | None:
    """Draw λ as a heat map, or a bar a task where λ has no layers. A constant λ is no picture."""
    lambdas = run.lambdas if run is not None else None
    if run is None or lambdas is None or lambdas.range[0] == lambdas.range[1]:
        return None
    if not lambdas.is_task_wise:
        start = first_lambda(run)
        return heat_map(lambdas, label="Coefficient of every task and layer", start=start)
    bars = [
        Bar(task, mean, decimal(mean))
        for task, mean in zip(lambdas.tasks, lambdas.means, strict=True)
    ]
    most = max(lambdas.range[1], 0.0) or 1.0
    return bar_chart(bars, label="Coefficient of every task", most=most)


def method_bars(comparison: Comparison) -> Chart | None:
    """Draw the mean accuracy of every method that has one."""
    top1 = mean_top1(comparison.methods)
    best = leaders(top1)
    bars = [
        Bar(method_title(name), value, f"{percent(value)} %", _bar_colour(name, name in best))
        for name, value in top1.items()
        if value is not None
    ]
    return bar_chart(bars, label="Mean accuracy of every method", most=1.0) if bars else None


def _bar_colour(method: str, is_best: bool) -> str:
    if not is_merged(method):
        return "reference"
    return "accent" if is_best else "quiet"


def scan_chart(comparison: Comparison) -> Chart | None:
    """Draw accuracy against one λ for all, learned methods as levels (paper, Fig. 1)."""
    return line_chart(
        scan_series(comparison, comparison.scan) if comparison.scan else [],
        label="Mean accuracy against a single coefficient",
        x_label="λ, the same for every task and layer",
        y_label="mean top-1, %",
    )


def mean_entropy_chart(comparison: Comparison) -> Chart | None:
    series = [
        mean_entropy_series(method_title(name), run.metrics)
        for name, run in comparison.runs.items()
        if run.metrics and run.metrics.entropy
    ]
    return line_chart(
        series,
        label="Mean entropy of every learned method against the steps",
        x_label="step",
        y_label="entropy, nats, mean over tasks",
    )


def findings_chart(curves: FindingsCurves) -> Chart | None:
    """Draw the lines of an experiment, accuracies in %."""
    unit = ", %" if is_accuracy(curves) and "%" not in curves.y_label else ""
    return line_chart(
        findings_series(curves),
        label=curves.title,
        x_label=curves.x_label,
        y_label=curves.y_label + unit,
    )
