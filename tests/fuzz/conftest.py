"""The profiles of the fuzz tests, their working folder, and the table of counts.

``RAYMERGE_FUZZ=long`` generates thousands of new inputs per reader; without it there are few, and
always the same ones.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import COUNTS, Ground, little_memory
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent

_QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=40, derandomize=True, **_QUIET)
settings.register_profile("long", max_examples=2500, **_QUIET)
settings.load_profile(os.environ.get("RAYMERGE_FUZZ", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.fuzz)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A folder of its own, from which a relative path reaches nothing else."""
    root = tmp_path_factory.mktemp("ground")
    for name in ("outside", "cwd", "tmp", "cache"):
        (root / name).mkdir()
    (root / "outside" / "kept").write_text("as it was")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "cwd")
        patch.setattr(tempfile, "tempdir", str(root / "tmp"))
        patch.setenv("RAYMERGE_CACHE", str(root / "cache"))
        with little_memory():
            yield Ground(root)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counts, one row per reader."""
    if not COUNTS:
        return
    rows = [("reader", "inputs", "loaded", "refused"), ("---", "---:", "---:", "---:")]
    for reader, counts in sorted(COUNTS.items()):
        rows.append((reader, str(counts.total()), str(counts["loaded"]), str(counts["refused"])))
    terminalreporter.section("fuzz")
    for row in rows:
        terminalreporter.write_line(f"| {' | '.join(row)} |")
