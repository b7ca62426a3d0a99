"""The page and the PNG files, as text and bytes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from report_page import EVIL, Page
from report_samples import (
    EIGHT,
    METHODS,
    TWENTY,
    dump,
    vit_layers,
    write_comparison,
    write_run,
)

from raymerge.errors import RunError
from raymerge.report import write_plots, write_report
from raymerge.report.markup import compact


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def rounded(scores: dict, examples: bool = True) -> list[str]:
    texts = [f"{100 * scores['top1']:.1f}", f"{scores['loss']:.3f}", f"{scores['entropy']:.3f}"]
    return texts + ([f"{scores['examples']:,}"] if examples else [])


def test_every_number_of_a_run_is_in_its_report(tmp_path):
    write_run(tmp_path, steps=60)
    page = page_of(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    for task, scores in results["tasks"].items():
        start = page.cell_texts.index(task)
        assert page.cell_texts[start + 1 : start + 5] == rounded(scores)
    assert f"{100 * results['average']['top1']:.1f} %" in page.texts
    titles = set(page.texts)
    lambdas = json.loads((tmp_path / "lambdas.json").read_text())
    for task, row in zip(lambdas["tasks"], lambdas["values"], strict=True):
        for layer, value in zip(lambdas["layers"], row, strict=True):
            assert f"{task} · {layer}: {value:.4f}" in titles


@pytest.mark.parametrize("tasks", [EIGHT, TWENTY], ids=["wide", "tall"])
def test_every_number_of_a_comparison_is_in_its_report(tmp_path, tasks):
    write_comparison(tmp_path, tasks=tasks, steps=5)
    page = page_of(tmp_path)
    cells = page.cell_texts
    methods = json.loads((tmp_path / "comparison.json").read_text())["methods"]
    for results in methods.values():
        assert f"{100 * results['average']['top1']:.1f}" in cells
        for scores in results["tasks"].values():
            assert set(rounded(scores)) <= set(cells)


def test_the_best_merged_model_is_bold_and_references_do_not_compete(tmp_path):
    def scored(x, y):
        return {"tasks": {"a": {"top1": x}, "b": {"top1": y}}}

    methods = {"individual": scored(0.99, 0.98), "ties": scored(0.71, 0.42)}
    methods |= {"my_own": scored(0.63, 0.54), "average": scored(0.71, 0.11)}
    dump(tmp_path / "comparison.json", {"methods": methods})
    best = [text for class_, text in page_of(tmp_path).cells if "best" in class_.split()]
    assert best == ["71.0", "54.0", "58.5", "71.0"]


def test_numbers_are_right_aligned(tmp_path):
    write_run(tmp_path, steps=3)
    page = page_of(tmp_path)
    numbers = [class_ for class_, text in page.cells if re.fullmatch(r"[\d.,]+", text)]
    measured = [class_ for class_ in numbers if class_]
    assert len(measured) >= 8 * 4
    assert all("number" in class_.split() for class_ in measured)
    assert ".number { text-align: right; }" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("write", [write_run, write_comparison])
def test_the_page_requests_nothing(tmp_path, write):
    write(tmp_path, steps=60)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    for name, attributes in page.tags:
        assert name not in {"script", "link", "img", "iframe", "object", "embed", "image", "use"}
        assert not {"src", "href", "xlink:href", "data", "onload"} & attributes.keys()
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


def test_the_headline_says_in_english_what_was_done(tmp_path):
    write_run(tmp_path, steps=60)
    text = "".join(page_of(tmp_path).texts)
    assert "AdaMerging (layer-wise)" in text
    assert (
        "8 fine-tuned models were merged into one, with 416 coefficients (8 models × 52 layers) "
        "learned in 60 steps from unlabeled images. It classifies "
    ) in text


def test_a_run_without_test_data_says_so(tmp_path):
    write_run(tmp_path, steps=3)
    (tmp_path / "results.json").unlink()
    text = "".join(page_of(tmp_path).texts)
    assert "No task has test data, so there is no accuracy." in text
    assert "Accuracy by task" not in text


def test_a_static_method_has_accuracies_only(tmp_path):
    scores = {"method": "ties", "tasks": {"mnist": {"top1": 0.5}, "untested": {}}}
    dump(tmp_path / "results.json", scores)
    page = page_of(tmp_path)
    text = "".join(page.texts)
    assert "TIES" in text
    assert "while learning" not in text
    assert page.cell_texts[page.cell_texts.index("untested") + 1] == "–"
    assert write_plots(tmp_path) == []


def test_a_task_wise_run_draws_bars(tmp_path):
    write_run(tmp_path, layers=["all"], steps=3)
    page = page_of(tmp_path)
    lambdas = json.loads((tmp_path / "lambdas.json").read_text())
    shown = [f"{row[0]:.3f}" for row in lambdas["values"]]
    assert set(shown) <= set(page.texts)
    assert "bar merged" in {attributes.get("class") for _, attributes in page.tags}


def test_a_single_step_is_drawn_as_points(tmp_path):
    write_run(tmp_path, steps=1)
    circles = [tag for tag, _ in page_of(tmp_path).tags if tag == "circle"]
    assert len(circles) == (8 + 1) + 8


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


def test_a_large_heat_map_has_a_cell_a_value_and_a_label_a_block(tmp_path):
    layers = vit_layers(24)
    write_run(tmp_path, tasks=TWENTY, layers=layers, steps=2)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert len(layers) == 296
    titles = re.findall(r"<title>[^<]+ · [^<]+: [\d.]+</title>", html)
    assert len(titles) == 20 * 296
    labels = re.findall(r'class="tick" text-anchor="middle">(\d+)</text>', html)
    assert set(map(str, range(24))) <= set(labels)
    assert len(html) < 1_500_000


def test_a_comparison_report_names_methods_and_the_best_uniform_lambda(tmp_path):
    write_comparison(tmp_path, steps=3)
    text = "".join(page_of(tmp_path).texts)
    for title in ("AdaMerging (layer-wise)", "AdaMerging++ (layer-wise)", "TIES"):
        assert title in text
    assert "The best single λ of those tried is 0.3: 70.0 %." in text
    assert "Glyph images at 32 × 32 pixels." in text


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


def test_importing_the_report_loads_no_heavy_module():
    heavy = ("torch", "ray", "matplotlib", "numpy", "yaml", "open_clip")
    code = f"import sys, raymerge.report; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_drawing_a_report_needs_neither_torch_nor_ray_nor_pyplot(tmp_path):
    write_run(tmp_path, steps=2)
    code = (
        "import sys; from raymerge.report import write_plots, write_report\n"
        f"write_report({str(tmp_path)!r}); write_plots({str(tmp_path)!r})\n"
        "print([m for m in ('torch', 'ray', 'matplotlib.pyplot') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_coordinates_are_short():
    assert [compact(v) for v in (3, 3.0, 0.5, 1 / 3, -0.001, 100.0)] == [
        *("3", "3", "0.5", "0.33", "0", "100"),
    ]
