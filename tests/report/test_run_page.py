"""The page of one run: every number, in tables and charts."""

from __future__ import annotations

import json
import re

from report_page import page_of
from report_samples import TWENTY, dump, vit_layers, write_run

from raymerge.report import write_plots, write_report


def rounded(scores: dict) -> list[str]:
    texts = [f"{100 * scores['top1']:.1f}", f"{scores['loss']:.3f}", f"{scores['entropy']:.3f}"]
    return [*texts, f"{scores['examples']:,}"]


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
    assert page.classes.count("bar") == len(lambdas["tasks"])


def test_a_constant_lambda_is_a_sentence_and_no_picture(tmp_path):
    values = [[0.3, 0.3], [0.3, 0.3]]
    dump(tmp_path / "lambdas.json", {"tasks": ["a", "b"], "layers": ["x", "y"], "values": values})
    page = page_of(tmp_path)
    assert "Every λ is 0.300." in page.texts
    assert "svg" not in {tag for tag, _ in page.tags}


def test_a_single_step_is_drawn_as_points(tmp_path):
    write_run(tmp_path, steps=1)
    circles = [tag for tag, _ in page_of(tmp_path).tags if tag == "circle"]
    assert len(circles) == (8 + 1) + 8


def test_a_large_heat_map_has_a_cell_a_value_and_a_label_a_block(tmp_path):
    layers = vit_layers(24)
    write_run(tmp_path, tasks=TWENTY, layers=layers, steps=2)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert len(layers) == 296
    titles = re.findall(r"<title>[^<]+ · [^<]+: [\d.]+</title>", html)
    assert len(titles) == 20 * 296
    labels = re.findall(r"text-anchor: middle[^>]*>(\d+)</text>", html)
    assert set(map(str, range(24))) <= set(labels)
    assert len(html) < 1_500_000


def test_failures_that_the_run_survived_are_numbered(tmp_path):
    incidents = [{"what": "step 3", "reason": "died"}, {"what": "step 3", "reason": "left"}]
    dump(tmp_path / "results.json", {"method": "ties", "tasks": {}, "incidents": incidents})
    cells = page_of(tmp_path).cell_texts
    start = cells.index("1. step 3")
    assert cells[start : start + 4] == ["1. step 3", "a worker died", "2. step 3", "a worker left"]
