"""The whole run in this process: tasks are a set, and its output is what its λ says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raymerge.runs.merge import MergeResult, merge

ORDER = [2, 0, 3, 1]
METHODS = {
    "layer-wise": {"name": "adamerging"},
    "task-wise": {"name": "adamerging", "granularity": "task"},
    "++": {"name": "adamerging", "task_vectors": "ties"},
}


def _tasks(world, order: list[int], **changes) -> list[dict]:
    return [{**world.config["tasks"][k], "test": None, **changes} for k in order]


def _run(world, output: Path, order: list[int], **changes) -> MergeResult:
    return merge(world.parse(output, tasks=_tasks(world, order), **changes))


def _weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "open_clip_model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_permuting_the_tasks_permutes_the_learned_lambdas(world, tmp_path, method):
    """The order of the tasks decides neither the images nor the model."""
    changes = {"method": METHODS[method], "optimizer": {"steps": 4}}
    straight = _run(world, tmp_path / "a", [0, 1, 2, 3], **changes)
    permuted = _run(world, tmp_path / "b", ORDER, **changes)
    assert (straight.lambdas - 0.3).abs().max() > 0.01  # it did learn
    assert straight.lambdas[0].sub(straight.lambdas[2]).abs().max() > 0.005
    torch.testing.assert_close(permuted.lambdas, straight.lambdas[ORDER], rtol=0, atol=1e-6)
    one, two = _weights(tmp_path / "a"), _weights(tmp_path / "b")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)


def test_the_written_model_is_the_merge_with_the_written_lambdas(world, tmp_path):
    result = _run(world, tmp_path, [0, 1, 2, 3], optimizer={"steps": 3})
    written = json.loads((tmp_path / "lambdas.json").read_text())
    assert written["tasks"] == list(result.config.task_names)
    assert written["layers"] == list(result.layers)
    lambdas_KL = torch.tensor(written["values"], dtype=torch.float64)
    assert torch.equal(lambdas_KL, result.lambdas)

    base = load_file(world.root / "pretrained" / "open_clip_model.safetensors")
    experts = [load_file(task["checkpoint"]) for task in world.config["tasks"]]
    merged = _weights(tmp_path)
    for layer, name in enumerate(written["layers"]):
        key = f"visual.{name}"
        pretrained = base[key].double()
        expected = pretrained + sum(
            lambdas_KL[k, layer] * (expert[key].double() - pretrained)
            for k, expert in enumerate(experts)
        )
        torch.testing.assert_close(merged[key].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("zero_shot", lambda base, experts: base),
        ("average", lambda base, experts: sum(experts) / len(experts)),
        (
            {"name": "task_arithmetic", "scaling": 0.4},
            lambda base, experts: base + 0.4 * sum(e - base for e in experts),
        ),
    ],
)
def test_methods_without_learning_are_their_formula(world, tmp_path, method, expected):
    _run(world, tmp_path, [0, 1, 2, 3], method=method)
    base = load_file(world.root / "pretrained" / "open_clip_model.safetensors")
    experts = [load_file(task["checkpoint"]) for task in world.config["tasks"]]
    for key, tensor in _weights(tmp_path).items():
        if not key.startswith("visual."):
            assert torch.equal(tensor, base[key])
            continue
        formula = expected(base[key].double(), [expert[key].double() for expert in experts])
        torch.testing.assert_close(tensor.double(), formula, rtol=0, atol=1e-6)


def test_one_task_with_scaling_one_is_its_expert(world, tmp_path):
    _run(world, tmp_path, [2], method={"name": "task_arithmetic", "scaling": 1.0})
    expert = load_file(world.config["tasks"][2]["checkpoint"])
    merged = _weights(tmp_path)
    for key, tensor in expert.items():
        torch.testing.assert_close(merged[key], tensor, rtol=0, atol=5e-7)


def test_the_first_step_moves_every_lambda_by_the_learning_rate(world, tmp_path):
    """Adam's first step is lr · sign(g)."""
    result = _run(world, tmp_path, [0, 1, 2, 3], optimizer={"steps": 1, "lr": 0.01})
    moved = (result.lambdas - 0.3).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-2, atol=0)
    assert (result.lambdas > 0.3).any()
    assert (result.lambdas < 0.3).any()


def test_the_same_config_gives_the_same_lambdas_again(world, tmp_path):
    one = _run(world, tmp_path / "a", [0, 1, 2, 3], optimizer={"steps": 3})
    two = _run(world, tmp_path / "b", [0, 1, 2, 3], optimizer={"steps": 3})
    other = _run(world, tmp_path / "c", [0, 1, 2, 3], optimizer={"steps": 3}, seed=2)
    assert torch.equal(one.lambdas, two.lambdas)
    assert not torch.equal(one.lambdas, other.lambdas)
