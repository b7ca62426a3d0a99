"""The joint reference (Traditional MTL): one visual tower trained on all tasks' shifted images.

It is a part of its own beside a finished world, so that worlds built before it stay valid.

Legend: B images of one task in a step, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from raymerge.apps.finetune.loop import Schedule, train
from raymerge.apps.zoo.experts import expert_optimizer, zero_shot_head
from raymerge.apps.zoo.images import FAMILIES, draw_images
from raymerge.apps.zoo.pretrain import build_tokenizer, normalise, to_tensor, torch_threads
from raymerge.apps.zoo.recipe import ZooRecipe

_FINGERPRINT = "zoo_joint"


def train_joint(root: Path, seed: int, recipe: ZooRecipe) -> Path:
    """Train on all tasks and write ``root/joint.safetensors``; nothing to do if it is there."""
    path = root / "joint.safetensors"
    fingerprint = recipe.joint_fingerprint(seed)
    if path.exists() and _fingerprint(path) == fingerprint:
        return path
    with torch_threads(recipe.joint.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{root / 'pretrained'}")
        model.eval().requires_grad_(False)
        model.visual.requires_grad_(True)
        _train(model, seed, recipe)
    state = {f"visual.{k}": v.contiguous() for k, v in model.visual.state_dict().items()}
    partial = path.with_suffix(".partial")
    partial.write_bytes(save(state, metadata={_FINGERPRINT: fingerprint}))
    partial.replace(path)
    return path


def _fingerprint(path: Path) -> str | None:
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get(_FINGERPRINT)


def _train(model: CLIP, seed: int, recipe: ZooRecipe) -> None:
    expert, batch = replace(recipe.expert, lr=recipe.joint.lr), recipe.joint.batch
    tokenizer = build_tokenizer(recipe.model)
    heads = [zero_shot_head(model, tokenizer, task) for task in FAMILIES]
    drawn = [draw_images(seed, task, "train", expert.images) for task in FAMILIES]
    images = [to_tensor(pixels) for pixels, _ in drawn]
    labels = [torch.from_numpy(classes) for _, classes in drawn]

    def backward(step: int) -> None:
        chosen = [torch.randint(len(each), (batch,)) for each in labels]
        pixels = torch.cat([each[i] for each, i in zip(images, chosen, strict=True)])
        targets = [each[i] for each, i in zip(labels, chosen, strict=True)]
        joint_loss(model, pixels, targets, heads).backward()

    schedule = Schedule(expert.steps, expert.steps // 20)
    train(list(model.visual.parameters()), expert_optimizer(model, expert), schedule, backward)


def joint_loss(
    model: CLIP, pixels: Tensor, targets: Sequence[Tensor], heads: Sequence[Tensor]
) -> Tensor:
    """The tasks' mean cross-entropy. ``pixels`` uint8, task by task; of each task, ``targets``
    (B,) and ``heads`` (D, C)."""
    features = model.encode_image(normalise(pixels), normalize=True)
    parts = features.split([len(each) for each in targets])
    losses = [
        nn.functional.cross_entropy(part_BD @ head_DC, target_B)
        for part_BD, head_DC, target_B in zip(parts, heads, targets, strict=True)
    ]
    return torch.stack(losses).mean()
