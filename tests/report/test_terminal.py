"""The comparison as text: aligned, within 100 columns, with every number."""

from __future__ import annotations

import random
import re

import pytest
from report_samples import EIGHT, METHODS, TWENTY, results

from raymerge.errors import UserError
from raymerge.report import comparison_table


def methods_of(tasks: tuple[str, ...]) -> dict[str, dict]:
    rng = random.Random(3)
    return {name: results(rng, name, tasks, mean) for name, mean in METHODS.items()}


def rows_of(table: str) -> list[str]:
    """The header and the methods' lines."""
    lines = table.split("\n\n")[0].split("\n")
    return [lines[0], *lines[2:]]


@pytest.mark.parametrize("tasks", [EIGHT[:1], EIGHT[:3], EIGHT, TWENTY], ids=len)
def test_the_table_is_aligned_and_fits(tasks):
    rows = rows_of(comparison_table(methods_of(tasks)))
    assert len(rows) == 1 + len(METHODS)
    assert max(map(len, rows)) <= 100
    columns = [[m.end() for m in re.finditer(r"[\d.]+(?=[ *]|$)", row[26:])] for row in rows[1:]]
    assert all(ends == columns[0] for ends in columns)
    heads = [m.end() for m in re.finditer(r"\S+", rows[0][26:])]
    assert heads == columns[0]


def test_every_number_is_in_the_table():
    methods = methods_of(EIGHT)
    rows = rows_of(comparison_table(methods))
    for row, scores in zip(rows[1:], methods.values(), strict=True):
        values = [score["top1"] for score in [*scores["tasks"].values(), scores["average"]]]
        assert re.findall(r"\d+\.\d", row) == [f"{100 * value:.1f}" for value in values]


def test_only_long_names_are_cut():
    header = rows_of(comparison_table(methods_of(EIGHT)))[0]
    heads = header.split()[2:]
    cut = [head for head in heads if head not in {*EIGHT, "average"}]
    assert len(cut) == 1
    assert cut[0].startswith("stanf")
    assert "…" in cut[0]


def test_names_that_a_cut_would_make_alike_stay_different():
    tasks = tuple(f"corrupted_dataset_{index}" for index in range(8))
    heads = rows_of(comparison_table(methods_of(tasks)))[0].split()[2:-1]
    assert len(set(heads)) == 8


def test_tasks_beyond_the_width_are_counted():
    table = comparison_table(methods_of(TWENTY))
    shown = len(rows_of(table)[0].split()) - 3
    assert f"{20 - shown} more tasks are in the average and in the report" in table


def test_the_best_merged_model_has_the_star_and_references_do_not_compete():
    methods = {name: {"average": {"top1": top1}} for name, top1 in METHODS.items()}
    starred = [line for line in comparison_table(methods).split("\n") if line.endswith("*")]
    assert len(starred) == 1
    assert starred[0].split() == ["AdaMerging++", "(layer-wise)", "81.1*"]


def test_the_best_uniform_lambda_is_noted_where_it_was_scanned():
    scan = {"scalings": [0.5, 0.1, 0.3], "top1": [0.6, 0.65, 0.699]}
    note = "best uniform λ of 3 tried (task arithmetic): 0.3 gives 69.9 on average"
    assert note in comparison_table(methods_of(EIGHT), scan)
    assert "uniform" not in comparison_table(methods_of(EIGHT))


def test_a_task_that_a_method_lacks_has_a_dash():
    methods = {"ties": {"tasks": {"a": {"top1": 0.5}}}, "dare": {"tasks": {"b": {"top1": 0.4}}}}
    rows = rows_of(comparison_table(methods))
    assert rows[1].split() == ["TIES-Merging", "50.0", "–", "50.0*"]
    assert rows[2].split() == ["DARE", "–", "40.0", "40.0"]


def test_malformed_results_are_a_user_error():
    message = r"comparison: methods.ties.tasks.a.top1 must be less than or equal to 1, got 50"
    with pytest.raises(UserError, match=message):
        comparison_table({"ties": {"tasks": {"a": {"top1": 50}}}})
