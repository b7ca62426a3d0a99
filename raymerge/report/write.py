"""Writing a report beside the files it is drawn from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from raymerge.report.comparison_page import comparison_page
from raymerge.report.data import Comparison, load
from raymerge.report.run_page import run_page


def write_report(folder: str | Path) -> Path:
    """Draws ``folder/report.html`` from the run or the comparison in ``folder``; returns it.

    The page is one file that requests nothing. It is replaced in one step, so that a reader
    never sees half a page. Raises ``UserError``, and writes nothing, if there is nothing to
    draw or a file is malformed.
    """
    folder = Path(folder)
    report = load(folder)
    html = comparison_page(report) if isinstance(report, Comparison) else run_page(report)
    return write_atomically(folder / "report.html", lambda file: _write(file, html))


def _write(file: BinaryIO, html: str) -> None:
    file.write(html.encode("utf-8"))


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> Path:
    """``write`` fills a temporary file in the same folder, which then replaces ``path``."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
