"""The report of one run."""

from __future__ import annotations

from raymerge.report.data import Run
from raymerge.report.formats import percent
from raymerge.report.markup import Markup, join, tag
from raymerge.report.names import run_method, run_title
from raymerge.report.sections import (
    entropy_chart,
    lambda_curves,
    learned_lambdas,
    page,
    provenance_sections,
    section,
)
from raymerge.report.tables import score_table


def run_page(run: Run) -> str:
    title = run_title(run)
    header = tag("header", tag("h1", title), tag("p", *headline(run), class_="lead"))
    folder = run.folder.resolve().name
    return page(f"{title} · {folder}", header, _body(run), folder)


def _body(run: Run) -> Markup:
    results, metrics, lambdas = run.results, run.metrics, run.lambdas
    return join(
        section("Accuracy by task", score_table(results) if results and results.tasks else None),
        section("Entropy while learning", entropy_chart(metrics) if metrics else None),
        section(
            "Coefficients while learning", lambda_curves(metrics, lambdas) if metrics else None
        ),
        section("Learned coefficients", learned_lambdas(lambdas) if lambdas else None),
        provenance_sections(run.provenance, metrics),
    )


def headline(run: Run) -> list[str]:
    """What was done and what came of it, in plain English."""
    return [f"{_deed(run)}. ", *_outcome(run)]


def _deed(run: Run) -> str:
    fixed = {
        "zero_shot": "The pretrained model as it is, without any fine-tuned weights",
        "individual": "Every task with its own fine-tuned model, none of them merged",
        "joint": "One model trained on the labelled images of all tasks",
    }
    if (method := run_method(run)) in fixed:
        return fixed[method]
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
    """ ", with 8 × 52 coefficients learned in 500 steps from unlabeled images"."""
    if not run.metrics:
        return ""
    images = "labelled" if run.settings.objective == "cross_entropy" else "unlabeled"
    steps = f"learned in {_plural(len(run.metrics.steps), 'step')} from {images} images"
    if not run.lambdas:
        return f", with coefficients {steps}"
    tasks, layers = len(run.lambdas.tasks), len(run.lambdas.layers)
    if run.lambdas.task_wise:
        return f", with one coefficient for each model, {steps}"
    return f", with {tasks * layers:,} coefficients ({tasks} models × {layers} layers) {steps}"


def _outcome(run: Run) -> list[str]:
    if run.results is None or run.results.average.top1 is None:
        return ["No task has test data, so there is no accuracy."]
    tested = sum(score.top1 is not None for score in run.results.tasks.values())
    over = f", on average over {_plural(tested, 'task')}" if tested > 1 else ""
    share = tag("strong", f"{percent(run.results.average.top1)} %")
    return ["It classifies ", share, f" of the test images correctly{over}."]


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
