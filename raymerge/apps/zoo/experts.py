"""Experts: the visual tower fine-tuned on one task's shifted images with a frozen zero-shot head.

The loss adds the drift of rehearsal features, which limits how much experts interfere.

Legend: B batch, N images, C classes, D features.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from raymerge.apps.finetune.loop import Schedule, train
from raymerge.apps.zoo.images import FAMILIES, Split, draw_images
from raymerge.apps.zoo.pretrain import (
    Tokenizer,
    build_tokenizer,
    normalise,
    open_for_training,
    save_tower,
    to_tensor,
)
from raymerge.apps.zoo.recipe import TEMPLATE, ExpertRecipe, ZooRecipe
from raymerge.files.threads import torch_threads

_EARLY = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer.resblocks.0.")


@torch.no_grad()
def zero_shot_head(model: CLIP, tokenizer: Tokenizer, task: str) -> Tensor:
    """Return the text features (D, C) of the task's class names, times the logit scale."""
    texts = [TEMPLATE.format(name) for name in FAMILIES[task].classnames]
    text_CD = model.encode_text(tokenizer(texts), normalize=True)
    head_DC: Tensor = model.logit_scale.exp() * text_CD.t()
    return head_DC


def finetune(recipe: ZooRecipe, seed: int, task: str, model: CLIP) -> None:
    """Train ``model``'s visual tower on the task, in place."""
    expert = recipe.expert_for(task)
    head_DC = zero_shot_head(model, build_tokenizer(recipe.model), task)
    images, labels = draw_images(seed, task, "train", expert.images)
    fit(model, expert, head_DC, to_tensor(images), torch.from_numpy(labels), seed, task)


def fit(
    model: CLIP,
    recipe: ExpertRecipe,
    head_DC: Tensor,
    images: Tensor,
    labels: Tensor,
    seed: int,
    name: str,
) -> None:
    """Train the visual tower on labelled images, with the draws of ``seed`` and ``name``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()) + seed)
        rehearsal, target_ND = rehearse(model, seed, recipe)
        train_tower(model, recipe, expert_loss(head_DC, images, labels, rehearsal, target_ND))


@torch.no_grad()
def rehearse(model: CLIP, seed: int, recipe: ExpertRecipe) -> tuple[Tensor, Tensor]:
    """Return pretraining images of all tasks, uint8 (N, 3, H, W), and their features (N, D)."""
    styles: tuple[Split, ...] = ("plain", "shifted")
    parts = [
        to_tensor(draw_images(seed, task, style, recipe.rehearsal_images)[0])
        for task in FAMILIES
        for style in styles
    ]
    features = [model.encode_image(normalise(images), normalize=True) for images in parts]
    return torch.cat(parts), torch.cat(features)


def expert_loss(
    head_DC: Tensor, images: Tensor, labels: Tensor, rehearsal: Tensor, target_ND: Tensor
) -> Callable[[CLIP, ExpertRecipe], Tensor]:
    """Return the loss of a random batch: cross-entropy plus the drift of rehearsal features."""

    def loss(model: CLIP, recipe: ExpertRecipe) -> Tensor:
        own = torch.randint(len(images), (recipe.batch,))
        old = torch.randint(len(rehearsal), (recipe.rehearsal_batch,))
        pixels = normalise(torch.cat([images[own], rehearsal[old]]))
        features_BD = model.encode_image(pixels, normalize=True)
        own_BD, old_BD = features_BD.split([len(own), len(old)])
        task_loss = nn.functional.cross_entropy(own_BD @ head_DC, labels[own])
        drift: Tensor = (old_BD - target_ND[old]).square().sum(-1).mean()
        return task_loss + recipe.rehearsal_weight * drift

    return loss


def expert_optimizer(model: CLIP, recipe: ExpertRecipe) -> torch.optim.Optimizer:
    """Return the optimiser, with weight decay on matrices only and a rate for early layers."""
    groups: list[dict[str, Any]] = [
        {
            "params": [parameter],
            "lr": recipe.lr * (recipe.early_lr_factor if name.startswith(_EARLY) else 1.0),
            "weight_decay": recipe.weight_decay if parameter.ndim > 1 else 0.0,
        }
        for name, parameter in model.visual.named_parameters()
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=0.0)


def train_tower(
    model: CLIP, recipe: ExpertRecipe, loss: Callable[[CLIP, ExpertRecipe], Tensor]
) -> None:
    schedule = Schedule(recipe.steps, recipe.steps // 20)
    parameters = list(model.visual.parameters())
    train(
        parameters,
        expert_optimizer(model, recipe),
        schedule,
        lambda step: loss(model, recipe).backward(),
    )


def train_expert(root: Path, task: str, seed: int, recipe: ZooRecipe) -> Path:
    """Fine-tune on ``task`` and return ``root/experts/<task>.safetensors``; picklable.

    Does nothing if the file exists. Uses one thread, so that the result does not depend on how
    many experts are trained at the same time.
    """
    path = root / "experts" / f"{task}.safetensors"
    if path.exists():
        return path
    with torch_threads(1):
        model = open_for_training(root)
        finetune(recipe, seed, task, model)
    save_tower(path, model, {"format": "pt"})
    return path
