"""The joint reference (Traditional MTL): one visual tower trained on all tasks' shifted images.

It lies beside the world and has a fingerprint of its own, so worlds built earlier stay valid.

Legend: B images of one task in a step, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from open_clip.model import CLIP
from safetensors import safe_open
from torch import Tensor, nn

from raymerge.apps.finetune.loop import Schedule, train
from raymerge.apps.zoo.experts import expert_optimizer, zero_shot_head
from raymerge.apps.zoo.images import FAMILIES, draw_images
from raymerge.apps.zoo.pretrain import (
    build_tokenizer,
    normalise,
    open_for_training,
    save_tower,
    to_tensor,
)
from raymerge.apps.zoo.recipe import ZooRecipe
from raymerge.files.threads import torch_threads

_FINGERPRINT = "zoo_joint"


def train_joint(root: Path, seed: int, recipe: ZooRecipe) -> Path:
    """Train on all tasks and return ``root/joint.safetensors``; does nothing if it is there."""
    path = root / "joint.safetensors"
    fingerprint = recipe.joint_fingerprint(seed)
    if path.exists() and _fingerprint(path) == fingerprint:
        return path
    with torch_threads(recipe.joint.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_for_training(root)
        _train(model, seed, recipe)
    save_tower(path, model, {_FINGERPRINT: fingerprint})
    return path


def _fingerprint(path: Path) -> str | None:
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get(_FINGERPRINT)


def _train(model: CLIP, seed: int, recipe: ZooRecipe) -> None:
    expert, batch = replace(recipe.expert, lr=recipe.joint.lr), recipe.joint.batch
    tokenizer = build_tokenizer(recipe.model)
    heads = [zero_shot_head(model, tokenizer, task) for task in FAMILIES]
    parts = [draw_images(seed, task, "train", expert.images) for task in FAMILIES]
    images = [to_tensor(pixels) for pixels, _ in parts]
    labels = [torch.from_numpy(classes) for _, classes in parts]

    def backward(step: int) -> None:
        indices = [torch.randint(len(each), (batch,)) for each in labels]
        pixels = torch.cat([each[i] for each, i in zip(images, indices, strict=True)])
        targets = [each[i] for each, i in zip(labels, indices, strict=True)]
        joint_loss(model, pixels, targets, heads).backward()

    schedule = Schedule(expert.steps, expert.steps // 20)
    train(list(model.visual.parameters()), expert_optimizer(model, expert), schedule, backward)


def joint_loss(
    model: CLIP, pixels: Tensor, targets: Sequence[Tensor], heads: Sequence[Tensor]
) -> Tensor:
    """Return the mean of the tasks' cross-entropies.

    ``pixels``: uint8, task by task; ``targets`` (B,) and ``heads`` (D, C) for each task.
    """
    features = model.encode_image(normalise(pixels), normalize=True)
    parts = features.split([len(each) for each in targets])
    losses = [
        nn.functional.cross_entropy(part_BD @ head_DC, target_B)
        for part_BD, head_DC, target_B in zip(parts, heads, targets, strict=True)
    ]
    return torch.stack(losses).mean()
