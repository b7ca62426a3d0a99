"""Pages from the Jinja2 templates in ``templates``; every text from a file is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from raymerge.report.data import Metrics, Provenance
from raymerge.report.formats import seconds
from raymerge.report.tables import facts, number_facts
from raymerge.report.theme import DARK, LIGHT

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from raymerge.report.inline_svg import inline_svg

    templates = Environment(
        loader=PackageLoader("raymerge.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["inline_svg"] = inline_svg
    templates.globals.update(light=LIGHT, dark=DARK)
    return templates


def render(
    template: str,
    folder: Path,
    provenance: Provenance,
    metrics: Metrics | None = None,
    **content: object,
) -> str:
    """Return a page: ``content`` is what its own template shows, the rest what all pages show.

    Every page has a ``title`` and a ``headline``.
    """
    return (
        _templates()
        .get_template(template)
        .render(
            folder=folder.resolve().name,
            **_provenance(provenance, metrics),
            **content,
        )
    )


def _provenance(provenance: Provenance, metrics: Metrics | None) -> dict[str, object]:
    """Return the tables of timings, failures, versions and hashes, None where one is empty."""
    times = {name: seconds(value) for name, value in provenance.seconds.items()}
    if metrics and (median := _median_step_s(metrics)) is not None:
        times["one step (median)"] = seconds(median)
    failures = {
        f"{number}. {incident.what}": f"a worker {incident.reason}"
        for number, incident in enumerate(provenance.incidents, start=1)
    }
    versions, hashes = provenance.versions, provenance.hashes
    return {
        "times": number_facts(times, ("Phase", "Time")) if times else None,
        "failures": facts(failures, ("In", "")) if failures else None,
        "config": provenance.config,
        "versions": facts(versions, ("", "Version")) if versions else None,
        "hashes": facts(hashes, ("File", "SHA-256"), "code") if hashes else None,
    }


def _median_step_s(metrics: Metrics) -> float | None:
    durations = sorted(value for value in metrics.seconds if value is not None)
    return durations[len(durations) // 2] if durations else None
