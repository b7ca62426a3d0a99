"""Reading of folders: what is accepted, and one clear line for what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_samples import EIGHT, dump, vit_layers, write_comparison, write_run

from raymerge.errors import UserError
from raymerge.report import write_plots, write_report
from raymerge.report.data import Comparison, Run, load, load_run
from raymerge.report.names import LayerGroup, layer_groups, method_title, run_title


def run_of(folder: Path) -> Run:
    run = load(folder)
    assert isinstance(run, Run)
    return run


def comparison_of(folder: Path) -> Comparison:
    comparison = load(folder)
    assert isinstance(comparison, Comparison)
    return comparison


SCORES = {"method": "ties", "tasks": {"mnist": {"top1": 0.5}}}
BROKEN = {
    "not JSON": ("results.json", "{", "line 1 is not valid JSON"),
    "not an object": ("results.json", "[1]", "the content must be an object, not [1]"),
    "a percentage": (
        "results.json",
        json.dumps({"tasks": {"mnist": {"top1": 83.4}}}),
        "tasks.mnist.top1 must be a finite number in [0, 1], not 83.4",
    ),
    "text for a number": (
        "results.json",
        json.dumps({"tasks": {"mnist": {"loss": "low"}}}),
        'tasks.mnist.loss must be a finite number, not "low"',
    ),
    "half an example": (
        "results.json",
        json.dumps({"tasks": {"mnist": {"examples": 1.5}}}),
        "tasks.mnist.examples must be a whole number, not 1.5",
    ),
    "a missing row of λ": (
        "lambdas.json",
        json.dumps({"tasks": ["a", "b"], "layers": ["all"], "values": [[0.3]]}),
        "values must be 2 rows (tasks) of 1 numbers (layers), not 1 rows of length [1]",
    ),
    "λ not a number": (
        "lambdas.json",
        '{"tasks": ["a"], "layers": ["x", "y"], "values": [[0.3, NaN]]}',
        "values[0][1] must be a finite number, not NaN",
    ),
    "no tasks": (
        "lambdas.json",
        '{"tasks": [], "layers": [], "values": []}',
        "has 0 tasks and 0 layers",
    ),
    "a step without its number": (
        "metrics.jsonl",
        '{"step": 1}\n{"loss": 2.0}\n',
        "line 2: step must be a finite number of at least 0, not null",
    ),
    "a broken line in the middle": (
        "metrics.jsonl",
        '{"step": 1}\n{"st\n{"step": 3}\n',
        "line 2 is not valid JSON",
    ),
    "YAML": ("config.yaml", "method: [", "not valid YAML"),
    "no methods": ("comparison.json", '{"methods": {}}', "methods is empty"),
    "a lopsided scan": (
        "comparison.json",
        json.dumps(
            {"methods": {"ties": SCORES}, "uniform_scan": {"scalings": [0.1, 0.2], "top1": [1]}}
        ),
        "as many scalings as top1 values, and at least one, not 2 and 1",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("write", [write_report, write_plots])
def test_malformed_input_is_one_line_that_names_the_file(tmp_path, case, write):
    name, text, message = BROKEN[case]
    dump(tmp_path / "results.json", SCORES)
    (tmp_path / name).write_text(text, encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        write(tmp_path)
    assert str(tmp_path / name) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_an_empty_or_absent_folder_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"nothing to draw.*output folder of a merge or a demo"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "absent")


def test_bytes_that_are_not_utf8_are_an_error(tmp_path):
    (tmp_path / "results.json").write_bytes(b'{"method": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8"):
        write_report(tmp_path)


def test_a_killed_run_leaves_half_a_line_that_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste', encoding="utf-8")
    metrics = run_of(tmp_path).metrics
    assert metrics is not None
    assert metrics.steps == (1, 2)


def test_a_resumed_run_counts_the_later_line_of_a_step(tmp_path):
    lines = [{"step": s, "loss": loss} for s, loss in [(1, 9.0), (2, 8.0), (3, 7.0), (2, 1.0)]]
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    metrics = run_of(tmp_path).metrics
    assert metrics is not None
    assert metrics.steps == (1, 2, 3)
    assert metrics.loss == (9.0, 1.0, 7.0)


def test_a_diverged_measurement_is_a_gap(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n', encoding="utf-8")
    metrics = run_of(tmp_path).metrics
    assert metrics is not None
    assert metrics.loss == (None,)


def test_an_absent_average_is_the_mean_of_the_tasks_with_test_data(tmp_path):
    tasks = {"a": {"top1": 0.5, "loss": 1.0}, "b": {"top1": 0.7}, "c": {}}
    dump(tmp_path / "results.json", {"method": "ties", "tasks": tasks})
    results = run_of(tmp_path).results
    assert results is not None
    assert results.average.top1 == pytest.approx(0.6)
    assert results.average.loss == 1.0


def test_a_given_average_is_kept(tmp_path):
    dump(tmp_path / "results.json", {**SCORES, "average": {"top1": 0.25}})
    results = run_of(tmp_path).results
    assert results is not None
    assert results.average.top1 == 0.25


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


def test_timings_and_hashes_are_found_wherever_they_are_nested(tmp_path):
    write_comparison(tmp_path, steps=2)
    found = comparison_of(tmp_path).provenance
    assert found.seconds == {"zoo": 61.5, "methods · adamerging": 31.2, "methods · ties": 0.6}
    assert list(found.hashes) == [f"ckpts/{task}/finetuned.pt" for task in EIGHT]
    assert "sources" not in found.versions


def test_survived_failures_are_listed_in_their_order(tmp_path):
    survived = [
        {"what": "step 3", "kind": "worker", "ranks": [1], "reason": "died", "workers": 2},
        {"what": "step 3", "kind": "preemption", "ranks": [0], "reason": "left", "workers": 1},
    ]
    dump(tmp_path / "results.json", {**SCORES, "incidents": survived})
    found = load_run(tmp_path).provenance.incidents
    assert list(found) == [("step 3", "a worker died"), ("step 3", "a worker left")]


@pytest.mark.parametrize(
    ("granularity", "task_vectors", "layers", "title"),
    [
        ("tensor", "raw", ["a", "b"], "AdaMerging (layer-wise)"),
        ("tensor", "ties", ["a", "b"], "AdaMerging++ (layer-wise)"),
        ("block", "raw", ["a", "b"], "AdaMerging (block-wise)"),
        ("task", "raw", ["all"], "AdaMerging (task-wise)"),
        ("task", "ties", ["all"], "AdaMerging++ (task-wise)"),
    ],
)
def test_a_run_is_named_by_granularity_and_task_vectors(
    tmp_path, granularity, task_vectors, layers, title
):
    dump(tmp_path / "results.json", {"method": "adamerging"})
    row = [0.3] * len(layers)
    dump(tmp_path / "lambdas.json", {"tasks": ["t"], "layers": layers, "values": [row]})
    config = f"method: {{granularity: {granularity}, task_vectors: {task_vectors}}}\n"
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    assert run_title(run_of(tmp_path)) == title


def test_an_unknown_method_keeps_its_name():
    assert method_title("my_own") == "my_own"


def test_layers_are_grouped_by_block_in_vit_resnet_and_block_names():
    groups = layer_groups(vit_layers(3))
    assert [group.label for group in groups] == ["pre", "0", "1", "2", "post"]
    assert groups[1] == LayerGroup(6, 18, "0")
    resnet = ["conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.x"]
    labels = [group.label for group in layer_groups(resnet)]
    assert labels == ["pre", "layer1.0", "layer1.1", "layer2.0"]
    blocks = ["embeddings", "transformer.resblocks.0", "transformer.resblocks.1", "proj"]
    assert [group.label for group in layer_groups(blocks)] == ["pre", "0", "1", "post"]


def test_groups_cover_every_layer_once():
    layers = vit_layers(24)
    groups = layer_groups(layers)
    columns = [column for group in groups for column in range(group.start, group.stop)]
    assert columns == list(range(len(layers)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", '{"average": {"top1": 1' + "0" * 400 + "}}"),
        ("metrics.jsonl", '{"step": 9223372036854775807, "loss": 1, "entropy": {"a": 1}}\n'),
        ("metrics.jsonl", "[" * 100_000),
        ("metrics.jsonl", "[" * 100_000 + "\n"),
        ("config.yaml", "x: 2001-99-99"),
        ("config.yaml", "[" * 3000),
    ],
)
def test_numbers_and_nesting_without_end(tmp_path, name, content):
    (tmp_path / "lambdas.json").write_text('{"tasks": ["a"], "layers": ["x"], "values": [[0.1]]}')
    (tmp_path / name).write_text(content)
    if not content.endswith("\n") and name == "metrics.jsonl":
        load(tmp_path)  # half a last line, of a run that was killed
        return
    with pytest.raises(UserError, match=name) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_numbers_without_a_margin_are_drawn(tmp_path):
    step = '{"step": 1, "loss": 1, "entropy": {"a": 9223372036854775807}}\n'
    (tmp_path / "metrics.jsonl").write_text(step)
    assert write_report(tmp_path).stat().st_size > 0
