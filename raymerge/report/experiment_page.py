"""The report of an experiment: its tables, its curves, and what a reader must know of them."""

from __future__ import annotations

from collections.abc import Callable

from raymerge.report.curves import found_series
from raymerge.report.data import Experiment, FoundCurves, FoundTable
from raymerge.report.formats import percent, tick_text
from raymerge.report.markup import Markup, join, tag
from raymerge.report.names import KNOWN_METHODS, NOT_MERGED, method_title
from raymerge.report.ranking import leaders
from raymerge.report.sections import note, page, provenance_sections, section
from raymerge.report.svg import line_chart
from raymerge.report.tables import found_table


def experiment_page(experiment: Experiment) -> str:
    header = tag(
        "header", tag("h1", experiment.title), tag("p", *headline(experiment), class_="lead")
    )
    folder = experiment.folder.resolve().name
    return page(f"{experiment.title} · {folder}", header, _body(experiment), folder)


def headline(experiment: Experiment) -> list[str]:
    """The best mean of a merged model, where a table has one; else how much there is to see."""
    methods = KNOWN_METHODS | experiment.methods
    for table in experiment.tables:
        means = _means(table, methods)
        if best := sorted(leaders(means)):
            verb = (
                "gives the best merged model" if len(best) == 1 else "give the best merged models"
            )
            share = tag("strong", f"{percent(means[best[0]])} %")
            names = " and ".join(map(method_title, best))
            return [f"{names} {verb}: ", share, f" in the mean. ({table.title}.)"]
    tables, charts = len(experiment.tables), len(experiment.curves)
    return [f"{_plural(tables, 'table')} and {_plural(charts, 'chart')}."]


def _means(table: FoundTable, methods: frozenset[str]) -> dict[str, float]:
    if "mean" not in table.columns:
        return {}
    column = table.columns.index("mean")
    found = {name: row[column] for name, row in table.rows.items() if name in methods}
    return {name: cell for name, cell in found.items() if isinstance(cell, float)}


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _body(experiment: Experiment) -> Markup:
    methods = KNOWN_METHODS | experiment.methods
    return join(
        section("Notes", _notes(experiment)),
        *(_table(found, methods) for found in experiment.tables),
        *(_chart(found) for found in experiment.curves),
        provenance_sections(experiment.provenance),
    )


def _notes(experiment: Experiment) -> Markup | None:
    if not experiment.notes:
        return None
    return tag("ul", *(tag("li", each) for each in experiment.notes))


def _table(found: FoundTable, methods: frozenset[str]) -> Markup | None:
    html = found_table(found, methods)
    marks = " Bold: the best merged model." if 'class="number best"' in html else ""
    grey = " Grey: nothing is merged." if NOT_MERGED & found.rows.keys() else ""
    caption = f"{found.caption}{marks}{grey}".strip()
    return section(found.title, html, note(caption) if caption else None)


def _chart(found: FoundCurves) -> Markup | None:
    y_label, y_text = _y_axis(found)
    chart = line_chart(
        found_series(found),
        label=found.title,
        x_label=found.x_label,
        y_label=y_label,
        y_text=y_text,
    )
    return chart and section(found.title, chart, note(found.caption) if found.caption else None)


def _y_axis(found: FoundCurves) -> tuple[str, Callable[[float], str]]:
    """Accuracies are shown as percentages, all else as it is."""
    if "top-1" not in found.y_label:
        return found.y_label, tick_text
    label = found.y_label if "%" in found.y_label else f"{found.y_label}, %"
    return label, lambda value: tick_text(round(100 * value, 1))
