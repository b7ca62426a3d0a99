"""The benchmarks still run: their imports exist, each explains itself, two measure a tiny case."""

from __future__ import annotations

import ast
import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
FILES = sorted(FOLDER.rglob("*.py"))
SCRIPTS = [path for path in FILES if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
SHARED = [path for path in FILES if path not in SCRIPTS]


def _name(path: Path) -> str:
    return path.relative_to(FOLDER).as_posix()


def _run(path: Path, *arguments: object) -> str:
    command = [sys.executable, str(path), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_benchmark_is_found() -> None:
    assert len(SCRIPTS) >= 15
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    children = {"one_step.py"}  # step.py starts it
    for path in SCRIPTS:
        if path.parent == FOLDER and path.name not in children:
            assert path.name in page, path.name


@pytest.mark.parametrize("path", SCRIPTS, ids=_name)
def test_help_of_a_benchmark_works(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script runs in this process, which has torch loaded already."""
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.syspath_prepend(path.parent)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    for shared in SHARED:  # the next folder may have a module of this name too
        sys.modules.pop(shared.stem, None)
    assert end.value.code == 0
    head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert head is not None
    assert head.splitlines()[0] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_names_imported_from_raymerge_exist(path: Path) -> None:
    """Imports inside functions are read from the source, as ``--help`` does not reach them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("raymerge"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Constant) and str(node.value).startswith("import raymerge"):
            importlib.import_module(str(node.value).removeprefix("import "))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    root = tmp_path_factory.mktemp("cases")
    return ["--arch", "tiny", "--tasks", 2, "--batch", 2, "--steps", 2, "--root", root]


@pytest.mark.slow
def test_a_step_is_measured_on_a_tiny_model(tiny: list[object]) -> None:
    output = _run(FOLDER / "step.py", *tiny, "--threads", 1, "--cases", "bare", "raymerge")
    machine, bare, own = (json.loads(line) for line in output.splitlines())
    assert machine["read_gb_s"] > 0
    assert (bare["case"], own["case"]) == ("bare", "raymerge")
    assert own["median_s"] > 0
    assert own["lambda_difference"] == 0
    assert own["phases"].keys() >= {"merge", "compute", "inner_products"}


@pytest.mark.slow
def test_scaling_is_measured_on_a_tiny_model(tiny: list[object]) -> None:
    output = _run(FOLDER / "scaling.py", *tiny, "--workers", 1, "--shards", 1)
    row = json.loads(output.splitlines()[-1])
    assert row["case"] == "W=1 S=1"
    assert row["formula_mb"] == 0
    assert row["request_bytes"] > 0
