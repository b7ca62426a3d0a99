"""Reading written files: what is accepted, and one clear line for what is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from report_samples import dump, write_experiment

from raymerge.errors import UserError
from raymerge.report import write_plots, write_report
from raymerge.report.data import load
from raymerge.report.records import Results, Scan, read, read_config, read_steps, validate

SCORES = {"method": "ties", "tasks": {"mnist": {"top1": 0.5}}}
BROKEN = {
    "not JSON": ("results.json", "{", "line 1 is not valid JSON"),
    "not an object": ("results.json", "[1]", "the content must be an object, got [1]"),
    "a percentage": (
        "results.json",
        json.dumps({"tasks": {"mnist": {"top1": 83.4}}}),
        "tasks.mnist.top1 must be less than or equal to 1, got 83.4",
    ),
    "text for a number": (
        "results.json",
        json.dumps({"tasks": {"mnist": {"loss": "low"}}}),
        "tasks.mnist.loss must be a valid number, got 'low'",
    ),
    "half an example": (
        "results.json",
        json.dumps({"tasks": {"mnist": {"examples": 1.5}}}),
        "tasks.mnist.examples must be a valid integer, got 1.5",
    ),
    "a missing row of λ": (
        "lambdas.json",
        json.dumps({"tasks": ["a", "b"], "layers": ["all"], "values": [[0.3]]}),
        "values must be 2 rows (tasks) of 1 numbers (layers), with at least one of each, "
        "got 1 rows of length [1]",
    ),
    "λ not a number": (
        "lambdas.json",
        '{"tasks": ["a"], "layers": ["x", "y"], "values": [[0.3, NaN]]}',
        "values[0][1] must be a finite number, got nan",
    ),
    "no tasks": (
        "lambdas.json",
        '{"tasks": [], "layers": [], "values": []}',
        "values must be 0 rows (tasks) of 0 numbers (layers), with at least one of each, got 0",
    ),
    "a step without its number": (
        "metrics.jsonl",
        '{"step": 1}\n{"loss": 2.0}\n',
        "line 2: step is missing",
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
        "scalings and top1 must be of the same length, and at least 1, got 2 and 1",
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


def test_bytes_that_are_not_utf8_are_an_error(tmp_path):
    (tmp_path / "results.json").write_bytes(b'{"method": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8"):
        write_report(tmp_path)


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


def test_a_killed_run_leaves_half_a_line_that_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste', encoding="utf-8")
    assert [line.step for line in read_steps(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_last_line_without_its_newline_is_read_if_it_is_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\n{"step": 2}', encoding="utf-8")
    assert [line.step for line in read_steps(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_diverged_measurement_is_a_gap(tmp_path):
    text = '{"step": 1, "loss": NaN, "entropy": {"a": Infinity, "b": null}, "seconds": null}\n'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    (line,) = read_steps(tmp_path / "metrics.jsonl")
    assert (line.loss, line.entropy, line.seconds) == (None, {"a": None, "b": None}, None)


def test_null_reads_as_absent():
    content: Any = {"method": None, "tasks": {"a": None}, "average": None, "timings": None}
    results = validate(Results, content, "results")
    assert results == validate(Results, {"tasks": {"a": {}}}, "results")
    assert (results.method, results.average.top1, results.timings.seconds) == ("", None, {})


def test_an_absent_average_is_the_mean_of_the_tasks_with_test_data():
    tasks = {"a": {"top1": 0.5, "loss": 1.0}, "b": {"top1": 0.7}, "c": {}}
    average = validate(Results, {"tasks": tasks}, "results").average
    assert average.top1 == pytest.approx(0.6)
    assert average.loss == 1.0
    assert average.entropy is None


def test_a_written_average_is_kept():
    results = validate(Results, {**SCORES, "average": {"top1": 0.25}}, "results")
    assert results.average.top1 == 0.25


def test_the_best_scaling_is_the_smaller_one_at_a_tie():
    scan = validate(Scan, {"scalings": [0.4, 0.1, 0.3], "top1": [0.7, 0.5, 0.7]}, "scan")
    assert scan.points == [(0.1, 0.5), (0.3, 0.7), (0.4, 0.7)]
    assert scan.best == (0.3, 0.7)


def test_a_config_names_its_method_in_either_form(tmp_path):
    for text in ("method: ties\n", "method: {name: ties, scaling: 0.3}\n"):
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        written, settings = read_config(tmp_path / "config.yaml")
        assert (written, settings.name, settings.granularity) == (text, "ties", "")


def test_absent_files_are_none_or_empty(tmp_path):
    assert read(Results, tmp_path / "results.json") is None
    assert read_steps(tmp_path / "metrics.jsonl") == []
    assert read_config(tmp_path / "config.yaml")[0] == ""


MALFORMED_EXPERIMENTS: list[tuple[tuple[str | int, ...], object, str]] = [
    (
        ("tables", 0, "rows", "ties"),
        [0.1],
        r"tables\[0\]: rows\.ties has length 1, but .* 11 columns",
    ),
    (
        ("tables", 0, "rows", "ties", 0),
        [],
        r"rows\.ties\[0\]: a cell must be text or a number, got \[\]",
    ),
    (("tables", 1, "title"), 3, r"tables\[1\]\.title must be a valid string, got 3"),
    (
        ("curves", 1, "series", "files"),
        [1],
        r"curves\[1\]: series\.files has length 1, but there are 3 values of x",
    ),
    (("curves", 1, "x", 0), "a", r"x\[0\] must be a valid number, got 'a'"),
    (("notes",), "n", r"notes must be a valid tuple"),
]


@pytest.mark.parametrize(("path", "value", "message"), MALFORMED_EXPERIMENTS)
def test_a_malformed_experiment_is_an_error_with_its_key(tmp_path, path, value, message):
    record: Any = json.loads((write_experiment(tmp_path) / "experiment.json").read_text())
    node = record
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    dump(tmp_path / "experiment.json", record)
    with pytest.raises(UserError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
