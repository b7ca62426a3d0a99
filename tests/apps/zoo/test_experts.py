"""The zoo's experts, trained bit for bit as before the shared loop, and its joint reference."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from raymerge.apps.zoo import (
    ExpertRecipe,
    PretrainRecipe,
    ZooPaths,
    ZooRecipe,
    build_zoo,
    train_expert,
)
from raymerge.apps.zoo.experts import expert_loss, expert_optimizer, rehearse, zero_shot_head
from raymerge.apps.zoo.images import FAMILIES, draw_images
from raymerge.apps.zoo.joint import joint_loss
from raymerge.apps.zoo.pretrain import build_tokenizer, to_tensor
from raymerge.files.threads import torch_threads
from raymerge.merging.layout import ParameterLayout
from raymerge.models.checkpoints.visual_tower import open_visual


def _recipe() -> ZooRecipe:
    return replace(
        ZooRecipe(),
        pretrain=replace(PretrainRecipe(), steps=2, warmup=1, batch=16, images_per_style=10),
        expert=replace(ExpertRecipe(), steps=22, images=24, rehearsal_images=2, batch=8),
        adapt_images=2,
        test_images=120,
    )


def _model(root: Path) -> nn.Module:
    model = open_clip.create_model(f"local-dir:{root / 'pretrained'}")
    model.eval().requires_grad_(False)
    model.visual.requires_grad_(True)
    return model


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> ZooPaths:
    # One step for the other experts: this fixture wants the pretrained model.
    recipe = replace(_recipe(), expert=replace(_recipe().expert, steps=1))
    return build_zoo(tmp_path_factory.mktemp("zoo") / "z", recipe=recipe, progress=False)


def test_an_expert_equals_the_loop_written_out(zoo: ZooPaths, tmp_path: Path) -> None:
    """torch's own scheduler and clip, as the zoo's published experts were trained."""
    recipe, task = _recipe().expert, "signs"
    root = tmp_path / "again"
    (root / "experts").mkdir(parents=True)
    (root / "pretrained").symlink_to(zoo.pretrained)
    ours = load_file(train_expert(root, task, 0, _recipe()))

    model = _model(zoo.root)
    head_DC = zero_shot_head(model, build_tokenizer(_recipe().model), task)
    images, labels = draw_images(0, task, "train", recipe.images)
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(task.encode()))
        rehearsal, target_ND = rehearse(model, 0, recipe)
        shown, target_B = to_tensor(images), torch.from_numpy(labels)
        loss = expert_loss(head_DC, shown, target_B, rehearsal, target_ND)
        optimizer = expert_optimizer(model, recipe)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(recipe.steps))
        for _ in range(recipe.steps):
            optimizer.zero_grad()
            loss(model, recipe).backward()
            nn.utils.clip_grad_norm_(model.visual.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    for name, tensor in model.visual.state_dict().items():
        assert torch.equal(ours[f"visual.{name}"], tensor), name


def _cosine(steps: int):  # type: ignore[no-untyped-def]
    import math

    warmup = steps // 20

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def test_the_fingerprint_of_a_world_leaves_the_joint_reference_out() -> None:
    """Worlds that were built before there was one stay valid."""
    recipe = ZooRecipe()
    other = replace(recipe, joint=replace(recipe.joint, batch=3))
    assert recipe.fingerprint(0) == other.fingerprint(0) == "da68ed3fe23f2320"
    assert recipe.joint_fingerprint(0) != other.joint_fingerprint(0)
    assert recipe.joint_fingerprint(0) != recipe.joint_fingerprint(1)


def test_the_joint_reference_fits_and_moves_only_the_tower(zoo: ZooPaths) -> None:
    model = _model(zoo.root)
    open_visual(str(zoo.joint), ParameterLayout.of(model.visual.state_dict()))
    joint = load_file(zoo.joint)
    assert set(joint) == {f"visual.{name}" for name in model.visual.state_dict()}
    moved = [not torch.equal(joint[f"visual.{k}"], v) for k, v in model.visual.state_dict().items()]
    assert all(moved)


def test_a_world_without_a_joint_reference_gets_one_and_keeps_the_rest(zoo: ZooPaths) -> None:
    recipe = replace(_recipe(), expert=replace(_recipe().expert, steps=1))
    content, made = zoo.joint.read_bytes(), zoo.joint.stat().st_mtime_ns
    before = {path: path.stat().st_mtime_ns for path in zoo.root.rglob("*.png")}
    build_zoo(zoo.root, recipe=recipe, progress=False)
    assert zoo.joint.stat().st_mtime_ns == made
    zoo.joint.unlink()
    build_zoo(zoo.root, recipe=recipe, progress=False)
    assert zoo.joint.read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_joint_loss_is_the_mean_over_all_tasks(zoo: ZooPaths) -> None:
    model = _model(zoo.root)
    tokenizer = build_tokenizer(_recipe().model)
    heads = [zero_shot_head(model, tokenizer, task) for task in FAMILIES]
    drawn = [draw_images(0, task, "train", 2) for task in FAMILIES]
    pixels = [to_tensor(images) for images, _ in drawn]
    targets = [torch.from_numpy(labels) for _, labels in drawn]
    alone = [
        joint_loss(model, pixels[k], targets[k : k + 1], heads[k : k + 1])
        for k in range(len(heads))
    ]
    together = joint_loss(model, torch.cat(pixels), targets, heads)
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_early_layers_have_their_own_rate_and_only_matrices_decay(zoo: ZooPaths) -> None:
    model = _model(zoo.root)
    recipe = replace(_recipe().expert, lr=0.5, early_lr_factor=4.0, weight_decay=0.25)
    names = {id(p): name for name, p in model.visual.named_parameters()}
    rates = {
        names[id(p)]: (group["initial_lr"] if "initial_lr" in group else group["lr"])
        for group in expert_optimizer(model, recipe).param_groups
        for p in group["params"]
    }
    assert set(rates) == set(names.values())
    early = {name for name, rate in rates.items() if rate == 2.0}
    assert {name for name, rate in rates.items() if rate == 0.5} == set(names.values()) - early
    stem = {"conv1.weight", "class_embedding", "positional_embedding", "ln_pre.weight"}
    assert stem | {"transformer.resblocks.0.attn.in_proj_weight"} <= early
    assert not any(
        name.startswith(("transformer.resblocks.1.", "ln_post", "proj")) for name in early
    )
    for group in expert_optimizer(model, recipe).param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.25) for p in group["params"])
