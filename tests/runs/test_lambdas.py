"""Reading an earlier run's coefficients: by name, and only if they mean the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge.errors import UserError
from raymerge.runs.lambdas import read_lambdas

MODELS, LAYERS = ("sun", "cars", "dtd"), ("conv1.weight", "ln_pre.bias")
VALUES = [[0.1, 1 / 3], [0.3, -0.4], [0.5, 1e-300]]


def _run(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    content = {"tasks": MODELS, "layers": LAYERS, "values": VALUES, **changes}
    (folder / "lambdas.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", ["", "lambdas.json"])
def test_a_folder_or_its_file_is_read_bit_for_bit(tmp_path, name):
    lambdas_KL = read_lambdas(str(_run(tmp_path) / name), MODELS, LAYERS)
    assert lambdas_KL.dtype == torch.float64
    assert lambdas_KL.tolist() == VALUES


def test_rows_and_columns_are_matched_by_name(tmp_path):
    """The models are a subset in another order."""
    lambdas_KL = read_lambdas(str(_run(tmp_path)), ("dtd", "sun"), LAYERS[::-1])
    assert lambdas_KL.tolist() == [[1e-300, 0.5], [1 / 3, 0.1]]


@pytest.mark.parametrize(
    ("models", "layers", "missing"),
    [
        (("sun", "gtsrb"), LAYERS, "'gtsrb'"),
        (MODELS, ("conv1.weight", "proj"), "'proj'"),
        (("mnist", "svhn"), LAYERS, "'mnist'.* 1 more"),
    ],
)
def test_a_run_of_other_models_or_layers_is_refused_by_name(tmp_path, models, layers, missing):
    with pytest.raises(UserError, match=rf"method\.start: .*lambdas\.json.*{missing}"):
        read_lambdas(str(_run(tmp_path)), models, layers)


@pytest.mark.parametrize(
    "changes",
    [
        {"values": None},
        {"values": [[0.1, 0.2], [0.3]]},
        {"values": [["a", "b"]] * 3},
        {"values": VALUES[:1]},
        {"values": 3},
        {"tasks": None},
        {"tasks": 3},
        {"layers": {"conv1.weight": 0}},
    ],
)
def test_an_invalid_lambdas_json_is_refused_in_one_line(tmp_path, changes):
    with pytest.raises(UserError, match=r"method\.start: .*lambdas\.json: ") as raised:
        read_lambdas(str(_run(tmp_path, **changes)), MODELS, LAYERS)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\xff"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "lambdas.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"lambdas\.json: is not a lambdas\.json"):
        read_lambdas(str(tmp_path), MODELS, LAYERS)


def test_a_missing_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"gone/lambdas\.json|gone: No such file"):
        read_lambdas(str(tmp_path / "gone"), MODELS, LAYERS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_coefficients_that_are_not_numbers_are_refused(tmp_path, bad):
    run = _run(tmp_path, values=[[bad, 0.1], [0.2, 0.3], [0.4, 0.5]])
    with pytest.raises(UserError, match="holds NaN or Inf"):
        read_lambdas(str(run), MODELS, LAYERS)


@pytest.mark.parametrize(
    ("method", "fits"),
    [
        ({"name": "adamerging", "task_vectors": "raw"}, True),
        ({"name": "fw_hard"}, True),
        ({"name": "adamerging", "task_vectors": "ties"}, False),
        ({"name": "adamerging", "task_vectors": "tsv"}, False),
    ],
)
def test_coefficients_of_other_vectors_are_refused(tmp_path, method, fits):
    run = _run(tmp_path)
    (run / "config.yaml").write_text(json.dumps({"method": method}))  # JSON is YAML
    if fits:
        assert read_lambdas(str(run), MODELS, LAYERS).tolist() == VALUES
        return
    with pytest.raises(UserError, match=rf"multiplies {method['task_vectors']} vectors"):
        read_lambdas(str(run), MODELS, LAYERS)


@pytest.mark.parametrize(
    "values",
    [
        [[[0.1]] * 2] * 3,
        [[0.1] * 2] * 4,
        [[0.1] * 3] * 3,
        [[{}] * 2] * 3,
        [[10**400] * 2] * 3,
        [["0.1"] * 2] * 3,
    ],
)
def test_values_of_another_shape_or_type_are_refused(tmp_path, values):
    with pytest.raises(UserError, match=r"is not a lambdas\.json"):
        read_lambdas(str(_run(tmp_path, values=values)), MODELS, LAYERS)


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"method\.start: .*too long"):
        read_lambdas(str(tmp_path / ("x" * 5000)), MODELS, LAYERS)


def test_endless_nesting_is_refused(tmp_path):
    (tmp_path / "lambdas.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"is not a lambdas\.json"):
        read_lambdas(str(tmp_path), MODELS, LAYERS)
