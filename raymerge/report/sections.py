"""Parts that the report of a run and that of a comparison share."""

from __future__ import annotations

from raymerge.report.curves import entropy_series, lambda_series, window
from raymerge.report.data import Lambdas, Metrics, Provenance
from raymerge.report.formats import decimal, seconds
from raymerge.report.markup import Markup, join, tag
from raymerge.report.svg import Bar, bar_chart, heat_map, line_chart
from raymerge.report.tables import facts, number_facts


def section(title: str, *parts: str | None) -> Markup | None:
    """A titled section; None where all its parts are."""
    if not any(parts):
        return None
    return tag("section", tag("h2", title), *parts)


def note(text: str) -> Markup:
    return tag("p", text, class_="note")


def entropy_chart(metrics: Metrics) -> Markup | None:
    """Each task's entropy while learning, with a caption."""
    chart = line_chart(
        entropy_series(metrics),
        label="Entropy of every task against the steps",
        x_label="step",
        y_label="entropy, nats",
    )
    return chart and join(chart, note(_entropy_caption(metrics)))


def _entropy_caption(metrics: Metrics) -> str:
    width = window(len(metrics.steps))
    smooth = f"Running means over {width} steps. " if width > 1 else ""
    losses = [loss for loss in metrics.loss if loss is not None]
    if not losses:
        return f"{smooth}Entropy of the predictions on each step's images."
    return (
        f"{smooth}Entropy of the predictions on each step's images. The loss went from "
        f"{decimal(losses[0])} at the first step to {decimal(losses[-1])} at the last."
    )


def lambda_curves(metrics: Metrics, lambdas: Lambdas | None) -> Markup | None:
    return line_chart(
        lambda_series(metrics),
        label="Coefficient of every task against the steps",
        x_label="step",
        y_label="λ" if lambdas and lambdas.task_wise else "λ, mean over layers",
    )


def learned_lambdas(lambdas: Lambdas) -> Markup:
    """The map of the learned λ, with its range as a caption."""
    return join(lambda_map(lambdas), note(_range_caption(lambdas)))


def lambda_map(lambdas: Lambdas) -> Markup:
    """The learned λ: a heat map, or one bar a task where λ has no layers."""
    if not lambdas.task_wise:
        return heat_map(lambdas, label="Coefficient of every task and layer")
    means_K = lambdas.means
    most = max(*means_K, 0.0) or 1.0
    bars = [
        Bar(task, value, decimal(value)) for task, value in zip(lambdas.tasks, means_K, strict=True)
    ]
    return bar_chart(bars, label="Coefficient of every task", most=most)


def _range_caption(lambdas: Lambdas) -> str:
    """One sentence on where the learned values lie."""
    cells = [
        (value, task, layer)
        for task, row_L in zip(lambdas.tasks, lambdas.values, strict=True)
        for layer, value in zip(lambdas.layers, row_L, strict=True)
    ]
    low, high = min(cells), max(cells)
    if low[0] == high[0]:
        return f"Every λ is {decimal(low[0])}."
    return f"From {_place(low, lambdas)} to {_place(high, lambdas)}."


def _place(cell: tuple[float, str, str], lambdas: Lambdas) -> str:
    value, task, layer = cell
    return f"{decimal(value)} ({task}{'' if lambdas.task_wise else ', ' + layer})"


def provenance_sections(provenance: Provenance, metrics: Metrics | None = None) -> Markup:
    """Timings, config, versions and hashes, as far as there are any."""
    timings = {name: seconds(value) for name, value in provenance.seconds.items()}
    if metrics and (median := _median_step_s(metrics)) is not None:
        timings["one step (median)"] = seconds(median)
    config = tag("details", tag("summary", "config.yaml, resolved"), tag("pre", provenance.config))
    versions = facts(provenance.versions, ("", "Version"))
    survived = {
        f"{number}. {what}": reason
        for number, (what, reason) in enumerate(provenance.incidents, start=1)
    }
    hashes = facts(provenance.hashes, ("File", "SHA-256"), code=True)
    return join(
        section("Time", number_facts(timings, ("Phase", "Time")) if timings else None),
        section("Failures survived", facts(survived, ("In", "")) if survived else None),
        section("Configuration", config if provenance.config else None),
        section("Software", versions if provenance.versions else None),
        section("Input files", hashes if provenance.hashes else None),
    )


def _median_step_s(metrics: Metrics) -> float | None:
    known = sorted(value for value in metrics.seconds if value is not None)
    return known[len(known) // 2] if known else None


def page(title: str, header: Markup, body: Markup, folder: str) -> str:
    """The whole document. Its policy forbids scripts and every request."""
    from raymerge.report.theme import style_sheet

    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(style_sheet())),
    )
    footer = tag("footer", note(f"Drawn by raymerge report from the files in {folder}."))
    main = tag("main", body)
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", header, main, footer), lang="en")
