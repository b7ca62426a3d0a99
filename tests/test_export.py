"""The written model: θ₀ + Σ λ V from files, and a folder that open_clip loads as it is."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from raymerge.checkpoints.task_vectors import ties_statistics
from raymerge.checkpoints.visual import open_visual
from raymerge.config import ModelConfig
from raymerge.export import merged_visual, write_model
from raymerge.models import ResolvedModel, open_pretrained, resolve_model


@pytest.fixture(scope="module")
def resolved(world) -> ResolvedModel:
    return resolve_model(ModelConfig(arch=f"local-dir:{world.root / 'pretrained'}"))


@pytest.fixture(scope="module")
def opened(world, resolved):
    pretrained, _ = open_pretrained(resolved)
    paths = [task["checkpoint"] for task in world.config["tasks"]]
    return pretrained, [open_visual(path, pretrained.layout) for path in paths]


def _flat(checkpoint) -> Tensor:
    return torch.cat([checkpoint.read(t) for t in range(len(checkpoint.layout.names))])


def _merged(opened, lambdas_KL: Tensor, granularity: str = "tensor", ties=None) -> Tensor:
    pretrained, experts = opened
    layers = pretrained.layout.layers(granularity)
    lambdas_KL = lambdas_KL.expand(len(experts), len(layers.names)).double()
    return merged_visual(pretrained, experts, lambdas_KL, layers, ties)


# --- oracle 2 on files -------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
def test_lambda_zero_is_the_pretrained_model_bit_for_bit(opened, granularity):
    assert torch.equal(_merged(opened, torch.zeros(4, 1), granularity), _flat(opened[0]))


@pytest.mark.parametrize("k", range(4))
def test_lambda_unit_vector_is_that_expert(opened, k):
    merged_P = _merged(opened, torch.eye(4)[:, k : k + 1])
    torch.testing.assert_close(merged_P, _flat(opened[1][k]), rtol=0, atol=5e-7)


def test_lambda_one_over_k_is_the_average(opened):
    mean_P = torch.stack([_flat(expert).double() for expert in opened[1]]).mean(0)
    merged_P = _merged(opened, torch.full((4, 1), 0.25))
    torch.testing.assert_close(merged_P.double(), mean_P, rtol=0, atol=1e-6)


def test_one_task_with_lambda_one_is_its_expert(opened):
    merged_P = _merged((opened[0], opened[1][2:3]), torch.ones(1, 1))
    torch.testing.assert_close(merged_P, _flat(opened[1][2]), rtol=0, atol=5e-7)


def test_every_layer_takes_its_own_coefficients(opened):
    pretrained, experts = opened
    layers = pretrained.layout.layers("tensor")
    lambdas_KL = torch.rand(4, len(layers.names), generator=torch.Generator().manual_seed(0))
    merged_P = _merged(opened, lambdas_KL)
    merged = pretrained.layout.views(merged_P)
    for t, name in enumerate(layers.names):
        base = pretrained.read(t).double()
        terms = zip(lambdas_KL[:, t].double(), experts, strict=True)
        expected = base + sum(x * (expert.read(t).double() - base) for x, expert in terms)
        torch.testing.assert_close(merged[name].flatten().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mean", [False, True])
def test_ties_is_the_sum_of_phi(opened, mean):
    pretrained, experts = opened
    statistics = ties_statistics(pretrained, experts, density=0.2, scope="visual", mean=mean)
    merged_P = _merged(opened, torch.full((4, 1), 0.3), ties=statistics)
    vectors_KP = torch.stack([_flat(expert) for expert in experts]) - _flat(pretrained)
    phi_KP = statistics.phi(vectors_KP, 0)
    expected_P = _flat(pretrained) + 0.3 * phi_KP.sum(0)
    torch.testing.assert_close(merged_P, expected_P, rtol=0, atol=1e-6)
    changed = (merged_P != _flat(pretrained)).double().mean()
    assert 0.2 < changed < 0.8  # between one task's entries and all four disjoint


# --- the folder --------------------------------------------------------------------------------


def test_open_clip_loads_the_folder_with_the_merged_tower_and_the_old_text(
    opened, resolved, world, tmp_path
):
    theta_P = _merged(opened, torch.full((4, 1), 0.3))
    write_model(tmp_path, resolved, opened[0], theta_P)
    loaded, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    visual = loaded.visual.state_dict()
    views = opened[0].layout.views(theta_P)
    assert visual.keys() == views.keys()
    assert all(torch.equal(visual[name], view) for name, view in views.items())

    before, _, transform_before = open_clip.create_model_and_transforms(resolved.name)
    text = {k: v for k, v in before.state_dict().items() if not k.startswith("visual.")}
    assert text
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in text.items())
    with Image.open(next((world.root / "data").rglob("*.png"))) as image:
        assert torch.equal(transform(image), transform_before(image))
    written = load_file(tmp_path / "open_clip_model.safetensors")
    assert written.keys() == before.state_dict().keys()


def test_writing_twice_gives_the_same_bytes(opened, resolved, tmp_path):
    theta_P = _merged(opened, torch.full((4, 1), 0.3))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, resolved, opened[0], theta_P)
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_pretrained_file_with_a_module_prefix_is_written_without_it(world, resolved, tmp_path):
    weights: Path = tmp_path / "w.safetensors"
    state = load_file(resolved.weights)
    save_file({f"module.{key}": value for key, value in state.items()}, weights)
    wrapped = ResolvedModel("x", resolved.model_cfg, resolved.preprocess_cfg, weights, "")
    pretrained, _ = open_pretrained(wrapped)
    (tmp_path / "out").mkdir()
    write_model(tmp_path / "out", wrapped, pretrained, _flat(pretrained))
    written = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)
