"""The page of a comparison: every number, and what is best."""

from __future__ import annotations

import json

import pytest
from report_page import page_of
from report_samples import EIGHT, TWENTY, dump, write_comparison


@pytest.mark.parametrize("tasks", [EIGHT, TWENTY], ids=["wide", "tall"])
def test_every_number_of_a_comparison_is_in_its_report(tmp_path, tasks):
    write_comparison(tmp_path, tasks=tasks, steps=5)
    page = page_of(tmp_path)
    cells = page.cell_texts
    methods = json.loads((tmp_path / "comparison.json").read_text())["methods"]
    for results in methods.values():
        assert f"{100 * results['average']['top1']:.1f}" in cells
        for scores in results["tasks"].values():
            assert f"{100 * scores['top1']:.1f}" in cells
            assert {f"{scores['loss']:.3f}", f"{scores['entropy']:.3f}"} <= set(cells)
            assert f"{scores['examples']:,}" in cells


def test_the_best_merged_model_is_bold_and_references_do_not_compete(tmp_path):
    def scored(x, y):
        return {"tasks": {"a": {"top1": x}, "b": {"top1": y}}}

    methods = {"individual": scored(0.99, 0.98), "ties": scored(0.71, 0.42)}
    methods |= {"my_own": scored(0.63, 0.54), "average": scored(0.71, 0.11)}
    dump(tmp_path / "comparison.json", {"methods": methods})
    best = [text for class_, text in page_of(tmp_path).cells if "best" in class_.split()]
    assert best == ["71.0", "54.0", "58.5", "71.0"]


def test_a_comparison_report_names_methods_and_the_best_uniform_lambda(tmp_path):
    write_comparison(tmp_path, steps=3)
    text = "".join(page_of(tmp_path).texts)
    for title in ("AdaMerging (layer-wise)", "AdaMerging++ (layer-wise)", "TIES"):
        assert title in text
    assert "The best single λ of those tried is 0.3: 70.0 %." in text
    assert "Glyph images at 32 × 32 pixels." in text
