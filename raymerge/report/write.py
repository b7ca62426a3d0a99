"""Writing a report beside the files it is drawn from."""

from __future__ import annotations

from pathlib import Path

from raymerge.files.atomic import write_text
from raymerge.report.comparison_page import comparison_page
from raymerge.report.data import Comparison, Experiment, Run, load
from raymerge.report.experiment_page import experiment_page
from raymerge.report.run_page import run_page


def write_report(folder: str | Path) -> Path:
    """Draws ``folder/report.html`` from what is in ``folder`` and returns its path.

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
