"""Writing the page and the PNG files: whole or not at all, from the folder alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from report_page import EVIL, Page
from report_samples import (
    METHODS,
    dump,
    write_comparison,
    write_experiment,
    write_run,
)

from raymerge.errors import RunError
from raymerge.report import write_plots, write_report


def test_numbers_are_right_aligned(tmp_path):
    write_run(tmp_path, steps=3)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    numbers = [class_ for class_, text in page.cells if re.fullmatch(r"[\d.,]+", text)]
    measured = [class_ for class_ in numbers if class_]
    assert len(measured) >= 8 * 4
    assert all("number" in class_.split() for class_ in measured)
    assert ".number { text-align: right; }" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("write", [write_run, write_comparison, write_experiment])
def test_the_page_requests_nothing(tmp_path, write):
    html = write_report(write(tmp_path)).read_text(encoding="utf-8")
    page = Page(html)
    page.require_no_requests()
    assert not re.search(r"url\(|@import|https?:", html)
    policies = [a["content"] for _, a in page.tags if "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


@pytest.mark.parametrize("place", ["task", "layer", "method", "config", "version", "hash", "note"])
def test_text_from_files_is_escaped(tmp_path, place):
    def put(where: str, plain: str) -> str:
        return EVIL if where == place else plain

    task = put("task", "mnist")
    scores = {"method": put("method", "ties"), "tasks": {task: {"top1": 0.5}}}
    lambdas = {"tasks": [task], "layers": [put("layer", "a"), "b"], "values": [[0.1, 0.2]]}
    step = {"step": 1, "loss": 1.0, "entropy": {task: 0.5}, "lambdas": {task: 0.5}}
    run = tmp_path / "runs" / "m"
    for folder in (tmp_path, run):
        dump(folder / "lambdas.json", lambdas)
        dump(folder / "metrics.jsonl", step)
    dump(tmp_path / "results.json", scores)
    environment = {"torch": put("version", "2"), "hashes": {put("hash", "file"): "ff"}}
    dump(tmp_path / "environment.json", environment)
    (tmp_path / "config.yaml").write_text(f"# {put('config', 'x')}\n", encoding="utf-8")
    pages = [write_report(tmp_path).read_text(encoding="utf-8")]
    methods = {"m": scores, put("method", "n"): scores}
    dump(tmp_path / "comparison.json", {"methods": methods, "notes": [put("note", "fine")]})
    pages.append(write_report(tmp_path).read_text(encoding="utf-8"))
    for html in pages:
        assert "<script" not in html
        Page(html)
    assert "&lt;script&gt;" in "".join(pages)


ODD_RUNS = {
    "no entropies": ("metrics.jsonl", {"step": 1, "loss": 2.0}),
    "no measurements": ("metrics.jsonl", {"step": 1}),
    "λ all zero": ("lambdas.json", {"tasks": ["a"], "layers": ["x", "y"], "values": [[0, 0]]}),
    "negative λ": ("lambdas.json", {"tasks": ["a"], "layers": ["x", "y"], "values": [[-1, -2]]}),
    "a negative task λ": (
        "lambdas.json",
        {"tasks": ["a", "b"], "layers": ["all"], "values": [[-0.2], [0.4]]},
    ),
    "no tasks": ("results.json", {"method": "ties", "average": {"top1": None}, "tasks": {}}),
    "a method without scores": ("comparison.json", {"methods": {"ties": {}}}),
    "a scan of one": (
        "comparison.json",
        {"methods": {"ties": {}}, "uniform_scan": {"scalings": [0.3], "top1": [0.5]}},
    ),
}


@pytest.mark.parametrize("case", ODD_RUNS)
def test_odd_but_sound_folders_are_drawn(tmp_path, case):
    name, content = ODD_RUNS[case]
    dump(tmp_path / name, content)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    Page(html)
    assert not re.search(r"\b(nan|inf|None)\b", html.partition("</head>")[2])
    write_plots(tmp_path)


def test_numbers_without_a_margin_are_drawn(tmp_path):
    step = '{"step": 1, "loss": 1, "entropy": {"a": 9223372036854775807}}\n'
    (tmp_path / "metrics.jsonl").write_text(step)
    assert write_report(tmp_path).stat().st_size > 0


def test_drawing_again_gives_the_same_bytes_and_leaves_no_other_file(tmp_path):
    write_run(tmp_path, steps=3)
    first = write_report(tmp_path).read_bytes()
    before = set(tmp_path.iterdir())
    assert write_report(tmp_path).read_bytes() == first
    assert set(tmp_path.iterdir()) == before


def test_a_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    write_run(tmp_path, steps=3)
    first = write_report(tmp_path).read_bytes()
    before = set(tmp_path.iterdir())

    def full(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunError, match=r"report\.html: cannot be written: no space left"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first
    assert set(tmp_path.iterdir()) == before


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_plots_of_a_run_and_of_a_comparison(tmp_path):
    write_run(tmp_path / "run", steps=5)
    paths = write_plots(tmp_path / "run")
    assert [path.name for path in paths] == ["lambda_heatmap.png", "lambda_curves.png"]
    write_comparison(tmp_path / "demo", steps=5)
    demo = {str(path.relative_to(tmp_path / "demo")) for path in write_plots(tmp_path / "demo")}
    pair = ("lambda_heatmap.png", "lambda_curves.png")
    learned = [m for m in METHODS if m.startswith("ada")]
    inner = {f"runs/{method}/{name}" for method in learned for name in pair}
    assert demo == inner | {*pair, "comparison.png", "uniform_scan.png"}
    sizes = [png_size(path) for path in [*paths, *(tmp_path / "demo" / name for name in demo)]]
    assert all(width > 500 and height > 300 for width, height in sizes)


def test_a_constant_lambda_is_no_picture(tmp_path):
    write_run(tmp_path, steps=5)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "lambda_heatmap.png").unlink(missing_ok=True)
    assert write_plots(tmp_path) == []


def test_each_chart_of_an_experiment_is_a_png_too(tmp_path: Path) -> None:
    paths = write_plots(write_experiment(tmp_path))
    assert [path.name for path in paths] == ["curves_1.png", "curves_2.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_importing_the_report_loads_no_heavy_module():
    heavy = ("torch", "ray", "matplotlib", "numpy", "open_clip", "jinja2", "yaml")
    code = f"import sys, raymerge.report; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_page_without_a_chart_loads_no_matplotlib(tmp_path):
    values = [[0.3, 0.3]]
    dump(tmp_path / "lambdas.json", {"tasks": ["a"], "layers": ["x", "y"], "values": values})
    dump(tmp_path / "results.json", {"method": "ties", "tasks": {"a": {"top1": 0.5}}})
    code = (
        "import sys; from raymerge.report import write_plots, write_report\n"
        f"write_report({str(tmp_path)!r}); write_plots({str(tmp_path)!r})\n"
        "print('matplotlib' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_drawing_a_report_needs_neither_torch_nor_ray_nor_pyplot(tmp_path):
    write_run(tmp_path, steps=2)
    code = (
        "import sys; from raymerge.report import write_plots, write_report\n"
        f"write_report({str(tmp_path)!r}); write_plots({str(tmp_path)!r})\n"
        "print([m for m in ('torch', 'ray', 'matplotlib.pyplot') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
