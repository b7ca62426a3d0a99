"""The report of a comparison of methods."""

from __future__ import annotations

from raymerge.report.curves import mean_entropy_series, scan_series
from raymerge.report.data import Comparison, Run
from raymerge.report.formats import percent, tick_text
from raymerge.report.markup import Markup, join, tag
from raymerge.report.names import NOT_MERGED, method_title
from raymerge.report.ranking import leaders, mean_top1, task_names
from raymerge.report.sections import (
    lambda_curves,
    learned_lambdas,
    note,
    page,
    provenance_sections,
    section,
)
from raymerge.report.svg import Bar, bar_chart, line_chart
from raymerge.report.tables import entropy_table, loss_table, number_facts, top1_table


def comparison_page(comparison: Comparison) -> str:
    count = len(comparison.methods)
    title = f"{count} methods compared" if count > 1 else "One method"
    header = tag("header", tag("h1", title), tag("p", *headline(comparison), class_="lead"))
    folder = comparison.folder.resolve().name
    return page(f"{title} · {folder}", header, _body(comparison), folder)


def _body(comparison: Comparison) -> Markup:
    return join(
        section("Mean accuracy", method_bars(comparison)),
        section("Accuracy by task", *_accuracy(comparison)),
        section("One coefficient for all", *_scan(comparison)),
        section("Entropy while learning", _entropy(comparison)),
        *(_learned(name, run) for name, run in comparison.runs.items() if run.metrics),
        section("Loss and entropy on the test images", _other_scores(comparison)),
        section("Notes", _notes(comparison)),
        provenance_sections(comparison.provenance),
    )


def headline(comparison: Comparison) -> list[str]:
    """The best merged model, against the usual references."""
    top1 = mean_top1(comparison.methods)
    best = sorted(leaders(top1))
    if not best:
        return ["No merged model has an accuracy."]
    score = top1[best[0]] or 0.0
    tasks = len(task_names(comparison.methods))
    over = f", on average over {tasks} tasks" if tasks > 1 else ""
    names = " and ".join(map(method_title, best))
    verb = "gives the best merged model" if len(best) == 1 else "give the best merged models"
    share = tag("strong", f"{percent(score)} %")
    rest = f" of the test images classified correctly{over}.{_against(top1, score)}"
    return [f"{names} {verb}: ", share, rest]


def _against(top1: dict[str, float | None], score: float) -> str:
    """ " That is 15.0 points above task arithmetic and 6.2 below the individual experts."."""
    phrases = {"task_arithmetic": "task arithmetic", "individual": "the individual experts"}
    gaps = {phrase: score - value for m, phrase in phrases.items() if (value := top1.get(m))}
    parts = [
        f"{percent(abs(gap))} points {'above' if gap > 0 else 'below'} {phrase}"
        for phrase, gap in gaps.items()
        if percent(abs(gap)) != "0.0"
    ]
    return f" That is {' and '.join(parts)}." if parts else ""


def method_bars(comparison: Comparison) -> Markup | None:
    top1 = mean_top1(comparison.methods)
    best = leaders(top1)
    bars = [
        Bar(method_title(name), value, f"{percent(value)} %", _kind(name, name in best))
        for name, value in top1.items()
        if value is not None
    ]
    return bar_chart(bars, label="Mean accuracy of every method", most=1.0) if bars else None


def _kind(method: str, best: bool) -> str:
    if method in NOT_MERGED:
        return "reference"
    return "best" if best else "merged"


def _accuracy(comparison: Comparison) -> list[Markup]:
    references = NOT_MERGED & comparison.methods.keys()
    legend = "Bold: the best merged model."
    grey = " Grey: references that merge nothing." if references else ""
    images = _test_images(comparison)
    counts = [
        tag(
            "details",
            tag("summary", "Test images of each task"),
            number_facts(images, ("Task", "Test images")),
        )
    ]
    return [top1_table(comparison.methods), note(legend + grey), *(counts if images else [])]


def _test_images(comparison: Comparison) -> dict[str, str]:
    """task → its number of test images; all the numbers, where methods differ."""
    found: dict[str, dict[str, None]] = {}
    for results in comparison.methods.values():
        for task, score in results.tasks.items():
            if score.examples is not None:
                found.setdefault(task, {})[f"{score.examples:,}"] = None
    return {task: " / ".join(numbers) for task, numbers in found.items()}


def _scan(comparison: Comparison) -> list[Markup | None]:
    """Accuracy against one λ for all tasks and layers, with the learned methods as levels."""
    scan = comparison.scan
    if scan is None:
        return []
    chart = line_chart(
        scan_series(comparison, scan),
        label="Mean accuracy against a single coefficient",
        x_label="λ, the same for every task and layer",
        y_label="mean top-1, %",
        y_text=lambda top1: tick_text(round(100 * top1, 1)),
    )
    scaling, top1 = scan.best
    text = f"The best single λ of those tried is {tick_text(scaling)}: {percent(top1)} %."
    return [chart, note(text)]


def _entropy(comparison: Comparison) -> Markup | None:
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


def _learned(name: str, run: Run) -> Markup | None:
    """What one method learned: its curves and its final coefficients."""
    return section(
        method_title(name),
        lambda_curves(run.metrics, run.lambdas) if run.metrics else None,
        learned_lambdas(run.lambdas) if run.lambdas else None,
    )


def _other_scores(comparison: Comparison) -> Markup | None:
    scores = [score for each in comparison.methods.values() for score in each.tasks.values()]
    losses = any(score.loss is not None for score in scores)
    entropies = any(score.entropy is not None for score in scores)
    if not losses and not entropies:
        return None
    return tag(
        "details",
        tag("summary", "Tables by method and task"),
        loss_table(comparison.methods) if losses else None,
        entropy_table(comparison.methods) if entropies else None,
    )


def _notes(comparison: Comparison) -> Markup | None:
    if not comparison.notes:
        return None
    return tag("ul", *(tag("li", each) for each in comparison.notes))
