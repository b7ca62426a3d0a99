"""The page of an experiment: every number, what is best, and what it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_page import EVIL, Page, page_of
from report_samples import EIGHT, dump, write_experiment

from raymerge.apps.experiments.findings import Curves, Findings, Table
from raymerge.report import write_plots, write_report


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "experiment.json").read_text())


def test_every_cell_is_in_the_page_and_fractions_are_percentages(tmp_path: Path) -> None:
    cells = page_of(write_experiment(tmp_path)).cell_texts
    for table in _record(tmp_path)["tables"]:
        for row in table["rows"].values():
            for cell in row:
                text = "–" if cell is None else cell
                assert (text if isinstance(text, str) else f"{100 * text:.1f}") in cells


def test_titles_captions_notes_config_versions_and_timings_are_in_it(tmp_path: Path) -> None:
    page = page_of(write_experiment(tmp_path))
    texts, record = set(page.texts), _record(tmp_path)
    for part in [*record["tables"], *record["curves"]]:
        assert part["title"] in texts
        assert any(part["caption"] in text for text in texts)
    assert set(record["notes"]) <= texts
    assert any("seed: 7" in text for text in texts)
    assert {"torch", "2.9.0", "3.2 s", "12 min 34 s"} <= set(page.cell_texts)
    assert "81.1 %" in texts


def _best(folder: Path, tables: list[Table]) -> list[str]:
    dump(folder / "experiment.json", Findings("F", tables=tables).to_json())
    return [text for class_, text in page_of(folder).cells if "best" in class_.split()]


def test_the_best_merged_model_of_a_column_is_bold(tmp_path: Path) -> None:
    rows = {"individual": [0.99, 0.9, "1"], "ties": [0.5, 0.6, "3"], "average": [0.4, 0.7, "2"]}
    assert _best(tmp_path, [Table("T", ["a", "b", "c"], rows)]) == ["50.0", "70.0"]


def test_where_methods_are_columns_the_best_of_a_row_is_bold(tmp_path: Path) -> None:
    rows = {"clean": [0.9, 0.95, 0.99], "blur": [0.6, 0.5, 0.99], "noise": [0.1, 0.1, None]}
    table = Table("T", ["ties", "adamerging", "published"], rows)
    assert _best(tmp_path, [table]) == ["95.0", "60.0", "10.0", "10.0"]


def test_what_is_no_method_or_alone_does_not_compete(tmp_path: Path) -> None:
    bins = Table("T", ["a"], {"low": [0.1], "high": [0.9]})
    alone = Table("T", ["a"], {"individual": [0.9], "ties": [0.1], "dare": [None]})
    assert _best(tmp_path, [bins, alone]) == []


def test_names_that_the_config_gives_compete_too(tmp_path: Path) -> None:
    table = Table("T", ["a"], {"mine": [0.1], "yours": [0.2]})
    config = {"methods": {"mine": {}, "yours": {}}}
    dump(tmp_path / "experiment.json", {**Findings("F", [table]).to_json(), "config": config})
    assert [t for c, t in page_of(tmp_path).cells if "best" in c.split()] == ["20.0"]


def test_curves_have_a_line_each_and_accuracies_are_percentages(tmp_path: Path) -> None:
    page = page_of(write_experiment(tmp_path))
    assert page.classes.count("line") == len(EIGHT) + 1
    assert {"top-1, %", "peak, MB", *EIGHT} <= set(page.texts)
    assert any(text == "files: 300 → 310" for text in page.texts)


@pytest.mark.parametrize(
    "place", ["title", "column", "row", "cell", "caption", "series", "label", "note", "config"]
)
def test_text_from_the_file_is_escaped(tmp_path: Path, place: str) -> None:
    def put(where: str) -> str:
        return EVIL if where == place else "x"

    table = Table(put("title"), [put("column")], {put("row"): [put("cell")]}, put("caption"))
    curves = Curves("c", put("label"), "y", [0, 1], {put("series"): [1, 2]})
    findings = Findings("F", [table], [curves], [put("note")]).to_json()
    dump(tmp_path / "experiment.json", {**findings, "config": {"base": put("config")}})
    html = write_report(tmp_path).read_text(encoding="utf-8")
    Page(html)
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_findings_without_anything_are_still_apage_of(tmp_path: Path) -> None:
    dump(tmp_path / "experiment.json", {"title": "Nothing"})
    assert "Nothing" in page_of(tmp_path).texts
    assert write_plots(tmp_path) == []
