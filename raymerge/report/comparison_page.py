"""The report of a comparison of methods: which is best, on which tasks, and how each learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from markupsafe import Markup

from raymerge.report.charts import mean_entropy_chart, method_bars, scan_chart
from raymerge.report.data import Comparison
from raymerge.report.formats import percent, short
from raymerge.report.names import is_merged, method_title
from raymerge.report.ranking import leaders, mean_top1, task_names
from raymerge.report.records import Scan
from raymerge.report.render import render
from raymerge.report.run_page import learned
from raymerge.report.tables import Table, methods_table, number_facts


def comparison_page(comparison: Comparison) -> str:
    count = len(comparison.methods)
    test_images = _test_images(comparison)
    return render(
        "comparison.html",
        comparison.folder,
        comparison.provenance,
        title=f"{count} methods compared" if count > 1 else "One method",
        headline=headline(comparison),
        bars=method_bars(comparison),
        top1=methods_table(comparison.methods, "top1"),
        top1_note=best_note(comparison.methods, "references that merge nothing"),
        test_images=number_facts(test_images, ("Task", "Test images")) if test_images else None,
        scan=scan_chart(comparison),
        scan_note=_scan_note(comparison.scan) if comparison.scan else "",
        entropy=mean_entropy_chart(comparison),
        learned=[
            {"title": method_title(name), **learned(run)}
            for name, run in comparison.runs.items()
            if run.metrics
        ],
        other_scores=_other_scores(comparison),
        remarks=comparison.notes,
    )


def headline(comparison: Comparison) -> Markup:
    """Return the best merged model, against the usual references."""
    top1 = mean_top1(comparison.methods)
    best = leaders(top1)
    if not best:
        return Markup("No merged model has an accuracy.")
    score = top1[min(best)] or 0.0
    tasks = len(task_names(comparison.methods))
    over = f", on average over {tasks} tasks" if tasks > 1 else ""
    outcome = Markup("{} of the test images classified correctly{}.{}")
    return outcome.format(best_models(best, score), over, _against(top1, score))


def best_models(best: frozenset[str], score: float) -> Markup:
    """Return such as "TIES gives the best merged model: 83.4 %"."""
    names = " and ".join(map(method_title, sorted(best)))
    verb = "gives the best merged model" if len(best) == 1 else "give the best merged models"
    return Markup("{} {}: <strong>{} %</strong>").format(names, verb, percent(score))


def best_note(names: Mapping[str, object], references: str, bold: bool = True) -> str:
    """Return the legend of a table by methods: which numbers are bold, which grey."""
    legend = "Bold: the best merged model." if bold else ""
    grey = f" Grey: {references}." if not all(map(is_merged, names)) else ""
    return legend + grey


def _against(top1: Mapping[str, float | None], score: float) -> str:
    """Return " That is 15.0 points above task arithmetic and 6.2 below the individual experts."."""
    phrases = {"task_arithmetic": "task arithmetic", "individual": "the individual experts"}
    gaps = {phrase: score - value for m, phrase in phrases.items() if (value := top1.get(m))}
    parts = [
        f"{percent(abs(gap))} points {'above' if gap > 0 else 'below'} {phrase}"
        for phrase, gap in gaps.items()
        if percent(abs(gap)) != "0.0"
    ]
    return f" That is {' and '.join(parts)}." if parts else ""


def _test_images(comparison: Comparison) -> dict[str, str]:
    """Return each task's number of test images, all the numbers where methods differ."""
    numbers: dict[str, dict[str, None]] = {}
    for results in comparison.methods.values():
        for task, score in results.tasks.items():
            if score.examples is not None:
                numbers.setdefault(task, {})[f"{score.examples:,}"] = None
    return {task: " / ".join(each) for task, each in numbers.items()}


def _scan_note(scan: Scan) -> str:
    scaling, top1 = scan.best
    return f"The best single λ of those tried is {short(scaling)}: {percent(top1)} %."


def _other_scores(comparison: Comparison) -> list[Table]:
    """Return the tables of loss and entropy, as far as any score has them."""
    scores = [score for each in comparison.methods.values() for score in each.tasks.values()]
    keys: tuple[Literal["loss", "entropy"], ...] = ("loss", "entropy")
    metrics = [key for key in keys if any(getattr(score, key) is not None for score in scores)]
    return [methods_table(comparison.methods, key) for key in metrics]
