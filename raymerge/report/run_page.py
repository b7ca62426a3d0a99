"""The report of one run: its scores, how it learned, and the coefficients that it found."""

from __future__ import annotations

from markupsafe import Markup

from raymerge.report.charts import entropy_chart, lambda_curves, lambda_map
from raymerge.report.curves import window
from raymerge.report.data import Metrics, Run
from raymerge.report.formats import decimal, percent, plural
from raymerge.report.names import run_method, run_title
from raymerge.report.records import Lambdas
from raymerge.report.render import render
from raymerge.report.tables import score_table


def run_page(run: Run) -> str:
    results, metrics = run.results, run.metrics
    return render(
        "run.html",
        run.folder,
        run.provenance,
        metrics,
        title=run_title(run),
        headline=headline(run),
        scores=score_table(results) if results and results.tasks else None,
        entropy=entropy_chart(metrics) if metrics else None,
        entropy_note=_entropy_note(metrics) if metrics else "",
        **learned(run),
    )


def learned(run: Run) -> dict[str, object]:
    """Return the charts of the coefficients, and a sentence on their range."""
    return {
        "curves": lambda_curves(run),
        "lambda_map": lambda_map(run),
        "lambdas_note": _range_note(run.lambdas) if run.lambdas else "",
    }


def _entropy_note(metrics: Metrics) -> str:
    width = window(len(metrics.steps))
    note = f"Running means over {width} steps. " if width > 1 else ""
    note += "Entropy of the predictions on each step's images."
    losses = [loss for loss in metrics.loss if loss is not None]
    if losses:
        first, last = decimal(losses[0]), decimal(losses[-1])
        note += f" The loss went from {first} at the first step to {last} at the last."
    return note


def _range_note(lambdas: Lambdas) -> str:
    cells = [
        (value, task if lambdas.is_task_wise else f"{task}, {layer}")
        for task, row_L in zip(lambdas.tasks, lambdas.values, strict=True)
        for layer, value in zip(lambdas.layers, row_L, strict=True)
    ]
    (low, low_place), (high, high_place) = min(cells), max(cells)
    if low == high:
        return f"Every λ is {decimal(low)}."
    return f"From {decimal(low)} ({low_place}) to {decimal(high)} ({high_place})."


def headline(run: Run) -> Markup:
    """Return what was done and what came of it, in plain English."""
    return Markup("{}. {}").format(_summary(run), _outcome(run))


def _summary(run: Run) -> str:
    references = {
        "zero_shot": "The pretrained model as it is, without any fine-tuned weights",
        "individual": "Every task with its own fine-tuned model, none of them merged",
        "joint": "One model trained on the labelled images of all tasks",
    }
    if (method := run_method(run)) in references:
        return references[method]
    tasks = _task_count(run)
    merged = f"{tasks} fine-tuned models were merged into one" if tasks else "A merged model"
    return merged + _learning(run)


def _task_count(run: Run) -> int:
    if run.lambdas:
        return len(run.lambdas.tasks)
    if run.results and run.results.tasks:
        return len(run.results.tasks)
    return len(run.metrics.entropy) if run.metrics else 0


def _learning(run: Run) -> str:
    """Return such as ", with 8 × 52 coefficients learned in 500 steps from unlabeled images"."""
    if not run.metrics:
        return ""
    images = "labelled" if run.settings.objective == "cross_entropy" else "unlabeled"
    steps = f"learned in {plural(len(run.metrics.steps), 'step')} from {images} images"
    if not run.lambdas:
        return f", with coefficients {steps}"
    if run.lambdas.is_task_wise:
        return f", with one coefficient for each model, {steps}"
    tasks, layers = len(run.lambdas.tasks), len(run.lambdas.layers)
    return f", with {tasks * layers:,} coefficients ({tasks} models × {layers} layers) {steps}"


def _outcome(run: Run) -> str:
    if run.results is None or run.results.average.top1 is None:
        return "No task has test data, so there is no accuracy."
    tested = sum(score.top1 is not None for score in run.results.tasks.values())
    over = f", on average over {plural(tested, 'task')}" if tested > 1 else ""
    share = percent(run.results.average.top1)
    return Markup("It classifies <strong>{} %</strong> of the test images correctly{}.").format(
        share, over
    )
