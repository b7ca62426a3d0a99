"""Folders as a report sees them: which files belong together, and what they mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_samples import EIGHT, dump, write_comparison, write_experiment, write_run

from raymerge.errors import UserError
from raymerge.report import write_report
from raymerge.report.data import Comparison, Experiment, Metrics, load, load_run

SCORES = {"method": "ties", "tasks": {"mnist": {"top1": 0.5}}}


def metrics_in(folder: Path) -> Metrics:
    metrics = load_run(folder).metrics
    assert metrics is not None
    return metrics


def comparison_of(folder: Path) -> Comparison:
    comparison = load(folder)
    assert isinstance(comparison, Comparison)
    return comparison


def test_an_empty_or_absent_folder_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"nothing to draw.*output folder of a merge or a demo"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "absent")


def test_a_resumed_run_counts_the_later_line_of_a_step(tmp_path):
    lines = [{"step": s, "loss": loss} for s, loss in [(1, 9.0), (2, 8.0), (3, 7.0), (2, 1.0)]]
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    metrics = metrics_in(tmp_path)
    assert metrics.steps == (1, 2, 3)
    assert metrics.loss == (9.0, 1.0, 7.0)


def test_a_task_that_a_line_lacks_is_a_gap(tmp_path):
    lines = [{"step": 1, "entropy": {"a": 1.0}}, {"step": 2, "entropy": {"b": 2.0}}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert metrics_in(tmp_path).entropy == {"a": (1.0, None), "b": (None, 2.0)}


def test_a_comparison_reads_the_runs_of_its_methods_only(tmp_path):
    write_comparison(tmp_path, steps=3)
    dump(tmp_path / "runs" / "stranger" / "lambdas.json", {"broken": True})
    comparison = comparison_of(tmp_path)
    assert list(comparison.runs) == ["adamerging_task", "adamerging", "adamerging_pp"]


def test_a_method_name_cannot_lead_out_of_the_folder(tmp_path):
    write_run(tmp_path / "outside", steps=2)
    dump(tmp_path / "demo" / "comparison.json", {"methods": {"../../outside": SCORES}})
    (tmp_path / "demo" / "runs").mkdir()
    assert comparison_of(tmp_path / "demo").runs == {}


def test_timings_hashes_and_versions_are_found(tmp_path):
    write_comparison(tmp_path, steps=2)
    provenance = comparison_of(tmp_path).provenance
    assert provenance.seconds == {"zoo": 61.5, "merges": 31.8}
    assert list(provenance.hashes) == [f"ckpts/{task}/finetuned.pt" for task in EIGHT]
    assert provenance.versions["torch"] == "2.9.0"
    assert "hashes" not in provenance.versions


def test_survived_failures_are_listed_in_their_order(tmp_path):
    survived = [
        {"what": "step 3", "kind": "worker", "ranks": [1], "reason": "died", "workers": 2},
        {"what": "step 3", "kind": "preemption", "ranks": [0], "reason": "left", "workers": 1},
    ]
    dump(tmp_path / "results.json", {**SCORES, "incidents": survived})
    incidents = load_run(tmp_path).provenance.incidents
    assert [(each.what, each.reason) for each in incidents] == [
        ("step 3", "died"),
        ("step 3", "left"),
    ]


def test_an_experiment_takes_its_versions_from_its_first_run(tmp_path):
    experiment = load(write_experiment(tmp_path))
    assert isinstance(experiment, Experiment)
    assert experiment.provenance.versions["torch"] == "2.9.0"
    assert "seed: 7" in experiment.provenance.config


def test_an_experiment_is_found_before_what_else_lies_there(tmp_path):
    write_experiment(tmp_path)
    dump(tmp_path / "results.json", SCORES)
    assert isinstance(load(tmp_path), Experiment)
