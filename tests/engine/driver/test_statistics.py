"""Fisher, RegMean and RegMean++ from the config to the file, against open_clip's own modules."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from direct import Direct, State, tower
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from world import MODEL_CFG, RESNET, World, make_world, write_model

from raymerge.data.slots import step_images
from raymerge.distributed.placement import Resources
from raymerge.errors import UserError
from raymerge.merging.fisher import FisherSum, fisher_diagonal, task_weight
from raymerge.runs.merge import merge
from raymerge.runs.plan.make import make_plan

WEIGHTS = "open_clip_model.safetensors"
ONE_BLOCK = {**MODEL_CFG, "vision_cfg": {**MODEL_CFG["vision_cfg"], "layers": 1}}
CONVNEXT = {
    "embed_dim": 24,
    "vision_cfg": {"timm_model_name": "convnext_atto", "timm_pool": "", "image_size": 32},
    "text_cfg": MODEL_CFG["text_cfg"],
}
BLOCK = "transformer.resblocks.0."
LINEAR = {
    f"{BLOCK}attn.in_proj_weight",
    f"{BLOCK}attn.out_proj.weight",
    f"{BLOCK}mlp.c_fc.weight",
    f"{BLOCK}mlp.c_proj.weight",
    "proj",
}
ALPHA = 0.9

pytestmark = pytest.mark.usefixtures("only_the_merge")

Merge = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three experts of a tower with one block."""
    return make_world(tmp_path_factory.mktemp("small"), tasks=3, model_cfg=ONE_BLOCK)


@pytest.fixture(scope="module")
def direct(small: World) -> Direct:
    return Direct(small.root / "pretrained")


@pytest.fixture
def merged(small: World, tmp_path: Path) -> Merge:
    """The visual tower that a merge writes, in float64; ``checkpoints`` replace the tasks' own."""

    def merged(
        checkpoints: list[Path] | None = None, seed: int = 1, **method: Any
    ) -> dict[str, Tensor]:
        tasks = [{k: v for k, v in t.items() if k != "test"} for t in small.config["tasks"]]
        for task, path in zip(tasks, checkpoints or [], strict=False):
            task["checkpoint"] = str(path)
        output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        merge(small.parse(output, tasks=tasks, method=method, seed=seed))
        return tower(output / WEIGHTS)

    return merged


def _experts(world: World) -> list[dict[str, Tensor]]:
    return [tower(task["checkpoint"]) for task in world.config["tasks"]]


def _mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}


# --- Fisher ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "samples"), [(256, "exact"), (5, "exact"), (7, 2)])
def test_fisher_is_the_sum_of_diagonals_of_open_clips_own_modules(
    small: World, direct: Direct, merged: Merge, images: int, samples: int | str
) -> None:
    total: FisherSum | None = None
    for task, expert in zip(small.config["tasks"], _experts(small), strict=True):
        chosen = np.sort(step_images(1, task["name"], 0, min(images, 12), 12))
        head_DC = direct.head(task)
        diagonal = fisher_diagonal(
            lambda state, some, head_DC=head_DC: direct.logits(state, some, head_DC),
            expert,
            direct.images(task["adapt"])[chosen],
            samples=None if samples == "exact" else int(samples),
            generator=torch.Generator().manual_seed(1),
        )
        fisher_P = torch.cat([diagonal[name].flatten() for name in expert]).float()
        vector_P = torch.cat([t.flatten() for t in expert.values()]).float()
        total = total or FisherSum(len(vector_P))
        total.add(fisher_P, vector_P, task_weight(fisher_P))
    assert total is not None
    got = merged(name="fisher", images=images, samples=samples)
    got_P = torch.cat([got[name].flatten() for name in expert])
    mean_P = torch.cat([t.flatten() for t in _mean(_experts(small)).values()])
    assert_close(got_P, total.delta().double(), rtol=0, atol=1e-5)
    assert (got_P - mean_P).abs().max() > 1e-2  # it is not the plain average


@pytest.mark.parametrize("name", ["fisher", "regmean", "regmean_pp"])
def test_the_seed_decides_which_images(merged: Merge, name: str) -> None:
    first, again = merged(name=name, images=4), merged(name=name, images=4)
    other = merged(name=name, images=4, seed=2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[f"{BLOCK}mlp.c_fc.weight"], other[f"{BLOCK}mlp.c_fc.weight"])


# --- RegMean -----------------------------------------------------------------------------------


def _inputs(direct: Direct, state: State, images: Tensor) -> dict[str, Tensor]:
    """The inputs (n, I) of every linear weight of the one block, and of ``proj``, from hooks."""
    direct.visual.load_state_dict(dict(state))
    block, seen = direct.visual.transformer.resblocks[0], {}
    handles = [
        block.ln_1.register_forward_hook(
            lambda _, args, out: seen.update({f"{BLOCK}attn.in_proj_weight": out})
        ),
        block.attn.register_forward_hook(
            lambda _, args, out: seen.update({f"{BLOCK}attn.out_proj.weight": out[0]})
        ),
        block.mlp.c_fc.register_forward_pre_hook(
            lambda _, args: seen.update({f"{BLOCK}mlp.c_fc.weight": args[0]})
        ),
        block.mlp.c_proj.register_forward_pre_hook(
            lambda _, args: seen.update({f"{BLOCK}mlp.c_proj.weight": args[0]})
        ),
        direct.visual.ln_post.register_forward_hook(
            lambda _, args, out: seen.update({"proj": out[:, 0]})
        ),
    ]
    with torch.no_grad():
        direct.visual(images)
    for handle in handles:
        handle.remove()
    # Torch computes attention and its projection as one: the input follows from the output.
    name = f"{BLOCK}attn.out_proj.weight"
    shifted = seen[name] - state[f"{BLOCK}attn.out_proj.bias"]
    seen[name] = torch.linalg.solve(state[name], shifted.flatten(0, -2).t()).t()
    return {name: x.flatten(0, -2) for name, x in seen.items()}


def _solve(inputs: list[Tensor], weights_IO: list[Tensor], alpha: float = ALPHA) -> Tensor:
    """(Σ G̃)⁻¹ Σ G̃ W with the small ridge towards the mean."""
    grams = [alpha * x.t() @ x / len(x) for x in inputs]
    for gram, x in zip(grams, inputs, strict=True):
        gram.diagonal().add_((1 - alpha) * x.square().mean(0))
    total = torch.stack(grams).sum(0)
    ridge = 1e-6 * total.diagonal().mean()
    total.diagonal().add_(ridge)
    right = sum(g @ w for g, w in zip(grams, weights_IO, strict=True))
    return torch.linalg.solve(total, right + ridge * torch.stack(weights_IO).mean(0))


def _in_by_out(name: str, weight: Tensor) -> Tensor:
    return weight if name == "proj" else weight.t()


def _solved(name: str, inputs: list[dict[str, Tensor]], experts: list[dict[str, Tensor]]) -> Tensor:
    weights = [_in_by_out(name, expert[name]) for expert in experts]
    return _in_by_out(name, _solve([x[name] for x in inputs], weights))


def test_regmean_solves_every_linear_layer_and_averages_the_rest(
    small: World, direct: Direct, merged: Merge
) -> None:
    experts, tasks = _experts(small), small.config["tasks"]
    inputs = [
        _inputs(direct, expert, direct.images(task["adapt"]))
        for expert, task in zip(experts, tasks, strict=True)
    ]
    got, mean = merged(name="regmean", alpha=ALPHA), _mean(experts)
    assert inputs[0].keys() == LINEAR
    for name in mean.keys() - LINEAR:
        assert_close(got[name], mean[name], rtol=0, atol=1e-6)
    for name in LINEAR:
        assert_close(got[name], _solved(name, inputs, experts), rtol=0, atol=1e-5)
        assert (got[name] - mean[name]).abs().max() > 1e-4


def test_regmean_pp_feeds_each_layer_what_is_merged_before_it(
    small: World, direct: Direct, merged: Merge
) -> None:
    """Each expert's block behind the averaged stem; then ``proj`` behind the merged block."""
    experts, tasks = _experts(small), small.config["tasks"]
    images = [direct.images(task["adapt"]) for task in tasks]
    mean = _mean(experts)
    behind_the_stem = [
        _inputs(direct, {k: e[k] if k.startswith(BLOCK) else mean[k] for k in mean}, x)
        for e, x in zip(experts, images, strict=True)
    ]
    expected = dict(mean)
    for name in LINEAR - {"proj"}:
        expected[name] = _solved(name, behind_the_stem, experts)
    behind_the_block = [_inputs(direct, expected, x) for x in images]
    expected["proj"] = _solved("proj", behind_the_block, experts)
    got = merged(name="regmean_pp", alpha=ALPHA)
    for name, tensor in expected.items():
        assert_close(got[name], tensor, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_regmean_pp_is_regmean_where_all_share_the_stem(
    small: World, merged: Merge, tmp_path: Path
) -> None:
    """The tower has one block, and the experts differ in it alone."""
    pretrained = load_file(small.root / "pretrained" / WEIGHTS)
    checkpoints = []
    for k, task in enumerate(small.config["tasks"]):
        state = load_file(task["checkpoint"])
        for key in state:
            if not key.startswith(f"visual.{BLOCK}"):
                state[key] = pretrained[key]
        checkpoints.append(tmp_path / f"{k}.safetensors")
        save_file(state, checkpoints[-1])
    plain, blockwise = (
        merged(checkpoints, name=name, alpha=ALPHA) for name in ("regmean", "regmean_pp")
    )
    for name in plain:
        assert_close(blockwise[name], plain[name], rtol=0, atol=1e-6)
    apart = merged(name="regmean", alpha=ALPHA)
    assert not torch.allclose(apart["proj"], plain["proj"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "fisher"},
        {"name": "fisher", "samples": "exact"},
        {"name": "regmean"},
        {"name": "regmean", "alpha": 1.0},
        {"name": "regmean_pp"},
    ],
)
def test_identical_experts_are_reproduced(
    small: World, merged: Merge, method: dict[str, Any]
) -> None:
    """Equal experts give that expert, however the images weigh them."""
    path = Path(small.config["tasks"][0]["checkpoint"])
    got, expert = merged([path] * 3, **method), tower(path)
    for name in expert:
        assert_close(got[name], expert[name], rtol=0, atol=2e-6)


def test_a_task_that_is_only_tested_does_not_change_the_merge(
    small: World, merged: Merge, tmp_path: Path
) -> None:
    whole = merged(name="fisher")
    tasks = [dict(task) for task in small.config["tasks"]]
    only_tested = {"name": "more", "classnames": tasks[0]["classnames"], "test": tasks[0]["test"]}
    config = small.parse(tmp_path / "more", tasks=[only_tested, *tasks], method={"name": "fisher"})
    result = merge(config)
    got = tower(tmp_path / "more" / WEIGHTS)
    assert all(torch.equal(got[name], whole[name]) for name in whole)
    assert list(result.scores) == ["more", *(task["name"] for task in tasks)]


# --- towers that RegMean cannot solve for ------------------------------------------------------


@pytest.mark.parametrize("method", ["regmean", "regmean_pp"])
@pytest.mark.parametrize("cfg", [RESNET, CONVNEXT], ids=["resnet", "convnext"])
def test_plan_refuses_towers_without_transformer_blocks(
    small: World, tmp_path: Path, method: str, cfg: dict[str, Any]
) -> None:
    write_model(tmp_path / "other", cfg)
    shutil.copy(tmp_path / "other" / WEIGHTS, tmp_path / "expert.safetensors")
    tasks = [
        {**t, "checkpoint": str(tmp_path / "expert.safetensors")} for t in small.config["tasks"]
    ]
    settings = {"model": f"local-dir:{tmp_path / 'other'}", "tasks": tasks}
    config = small.parse(tmp_path / "out", method={"name": method}, **settings)
    with pytest.raises(UserError, match=rf"method\.name: {method} .*vision transformers.*fisher"):
        make_plan(config, Resources(cpus=2))
    with pytest.raises(UserError, match="choose another method"):
        merge(config)
    assert not (tmp_path / "out").exists()
    make_plan(small.parse(method={"name": "fisher"}, **settings), Resources(cpus=2))
