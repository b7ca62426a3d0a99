"""The report of an experiment: its tables and curves, and what a reader must know of them."""

from __future__ import annotations

from markupsafe import Markup

from raymerge.report.charts import findings_chart
from raymerge.report.comparison_page import best_models, best_note
from raymerge.report.data import Experiment
from raymerge.report.formats import plural
from raymerge.report.names import known_methods
from raymerge.report.ranking import leaders
from raymerge.report.records import FindingsTable
from raymerge.report.render import render
from raymerge.report.tables import findings_table


def experiment_page(experiment: Experiment) -> str:
    methods = known_methods() | experiment.methods
    return render(
        "experiment.html",
        experiment.folder,
        experiment.provenance,
        title=experiment.title,
        headline=headline(experiment, methods),
        remarks=experiment.notes,
        tables=[_table_part(each, methods) for each in experiment.tables],
        charts=[
            {"title": each.title, "chart": findings_chart(each), "caption": each.caption}
            for each in experiment.curves
        ],
    )


def headline(experiment: Experiment, methods: frozenset[str]) -> Markup:
    """Return the best mean of a merged model, or else how much there is to see."""
    for table in experiment.tables:
        means = _means(table, methods)
        if best := leaders(means):
            models = best_models(best, means[min(best)])
            return Markup("{} in the mean. ({}.)").format(models, table.title)
    tables, charts = len(experiment.tables), len(experiment.curves)
    return Markup("{} and {}.").format(plural(tables, "table"), plural(charts, "chart"))


def _means(table: FindingsTable, methods: frozenset[str]) -> dict[str, float]:
    """Return the cells of the column "mean" that belong to methods."""
    if "mean" not in table.columns:
        return {}
    column = table.columns.index("mean")
    cells = {name: row[column] for name, row in table.rows.items() if name in methods}
    return {name: cell for name, cell in cells.items() if isinstance(cell, float)}


def _table_part(findings: FindingsTable, methods: frozenset[str]) -> dict[str, object]:
    table = findings_table(findings, methods)
    has_best = any("best" in cell.kind for row in table.rows for cell in row.cells)
    legend = best_note(findings.rows, "nothing is merged", has_best)
    caption = f"{findings.caption} {legend}".strip()
    return {"title": findings.title, "table": table, "caption": caption}
