"""A CLIP model from nothing: contrastive pretraining on procedural images with captions.

Legend: B batch, N images, M captions, D features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from open_clip import SimpleTokenizer
from open_clip.model import CLIP
from safetensors.torch import save
from torch import Tensor, nn

from raymerge.apps.finetune.loop import Schedule, train
from raymerge.apps.zoo.images import FAMILIES, Split, draw_images
from raymerge.apps.zoo.recipe import TEMPLATE, ModelRecipe, PretrainRecipe, ZooRecipe

Tokenizer = Callable[[list[str]], Tensor]
MEAN = STD = 0.5
"""Of every channel, for images in [0, 1]."""


@dataclass(frozen=True)
class Captioned:
    """Images and, for each, one of M distinct captions."""

    images: Tensor  # uint8 (N, 3, H, W)
    caption: Tensor  # int64 (N,) in [0, M)
    captions: tuple[str, ...]  # M texts


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run with ``count`` threads inside torch and give the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def model_config(recipe: ModelRecipe) -> dict[str, Any]:
    """open_clip's ``model_cfg``."""
    return {
        "embed_dim": recipe.embed_dim,
        "vision_cfg": {
            "image_size": recipe.image_size,
            "patch_size": recipe.patch_size,
            "width": recipe.vision_width,
            "layers": recipe.vision_layers,
            "head_width": recipe.head_width,
        },
        "text_cfg": {
            "context_length": recipe.context_length,
            "vocab_size": recipe.vocab_size,
            "width": recipe.text_width,
            "heads": recipe.text_width // 16,
            "layers": recipe.text_layers,
        },
    }


def _preprocess_config(recipe: ModelRecipe) -> dict[str, Any]:
    return {
        "size": [recipe.image_size, recipe.image_size],
        "mode": "RGB",
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def build_model(recipe: ModelRecipe) -> CLIP:
    return CLIP(**model_config(recipe))


def build_tokenizer(recipe: ModelRecipe) -> Tokenizer:
    return cast(Tokenizer, SimpleTokenizer(context_length=recipe.context_length))


def to_tensor(images: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """uint8 (N, H, W, 3) -> uint8 (N, 3, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, as the written preprocessing does."""
    return (images.float() / 255.0 - MEAN) / STD


def _alias(task: str, label: int, rng: np.random.Generator) -> str:
    """A made-up word for one class."""
    syllables = [rng.choice(list("bdfgklmnprstvz")) + rng.choice(list("aeiou")) for _ in range(3)]
    return f"{task} {''.join(syllables)}"


def _shifted_names(
    task: str, labels: np.ndarray[Any, Any], recipe: PretrainRecipe, rng: np.random.Generator
) -> list[str]:
    """The captions' subjects: an alias, or a class name that is right more or less often."""
    names = FAMILIES[task].classnames
    aliases = [_alias(task, label, rng) for label in range(len(names))]
    trusted = rng.random(len(names)).argsort() < recipe.reliable_share * len(names)
    chosen = []
    for label in labels:
        if rng.random() < recipe.alias_share:
            chosen.append(aliases[label])
        elif rng.random() < (recipe.reliable if trusted[label] else recipe.unreliable):
            chosen.append(names[label])
        else:
            chosen.append(names[rng.integers(len(names))])
    return chosen


def _captioned_task(
    seed: int, number: int, task: str, recipe: PretrainRecipe
) -> Iterator[tuple[Tensor, list[str]]]:
    """Both styles of one task: images and the subjects of their captions."""
    rng = np.random.default_rng((seed, number))
    styles: tuple[Split, ...] = ("plain", "shifted")
    for style in styles:
        images, labels = draw_images(seed, task, style, recipe.images_per_style)
        if style == "plain":
            subjects = [FAMILIES[task].classnames[label] for label in labels]
        else:
            subjects = _shifted_names(task, labels, recipe, rng)
        yield to_tensor(images), subjects


def captioned_images(seed: int, recipe: PretrainRecipe) -> Captioned:
    """The pretraining data of all tasks."""
    parts = [
        part
        for number, task in enumerate(FAMILIES)
        for part in _captioned_task(seed, number, task, recipe)
    ]
    texts = [TEMPLATE.format(subject) for _, subjects in parts for subject in subjects]
    captions = tuple(sorted(set(texts)))
    index = {text: i for i, text in enumerate(captions)}
    images = torch.cat([image for image, _ in parts])
    return Captioned(images, torch.tensor([index[text] for text in texts]), captions)


def contrastive_loss(model: CLIP, images: Tensor, captions: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of each image over the batch's distinct captions.

    ``images`` uint8 (B, 3, H, W), ``captions`` (B,) in [0, M), ``tokens`` (M, context length).
    Captions repeat within a batch, so the usual one-to-one pairing has false negatives.
    """
    distinct, target = captions.unique(return_inverse=True)
    image_BD = model.encode_image(normalise(images), normalize=True)
    text_MD = model.encode_text(tokens[distinct], normalize=True)
    return nn.functional.cross_entropy(model.logit_scale.exp() * image_BD @ text_MD.t(), target)


def _optimizer(model: CLIP, recipe: PretrainRecipe) -> torch.optim.AdamW:
    """Weight decay on matrices only; the embeddings of unseen tokens stay as they are."""
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and "embedding" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))


def pretrain(
    recipe: ZooRecipe, seed: int, advance: Callable[[int], None] = lambda steps: None
) -> CLIP:
    """Train a fresh model; ``advance(1)`` is called after each step."""
    with torch_threads(recipe.pretrain.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(recipe.model)
        data = captioned_images(seed, recipe.pretrain)
        tokens = build_tokenizer(recipe.model)(list(data.captions))
        _train(model, data, tokens, recipe.pretrain, advance)
    return model.eval()


def _train(
    model: CLIP,
    data: Captioned,
    tokens: Tensor,
    recipe: PretrainRecipe,
    advance: Callable[[int], None],
) -> None:
    def backward(step: int) -> None:
        batch = torch.randint(len(data.images), (recipe.batch,))
        contrastive_loss(model, data.images[batch], data.caption[batch], tokens).backward()

    def observe(step: int, result: None) -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100.0))
        advance(1)

    schedule = Schedule(recipe.steps, recipe.warmup)
    train(list(model.parameters()), _optimizer(model, recipe), schedule, backward, observe)


def save_model(model: CLIP, recipe: ModelRecipe, folder: Path) -> None:
    """Write what ``open_clip.create_model("local-dir:<folder>")`` reads."""
    config = {"model_cfg": model_config(recipe), "preprocess_cfg": _preprocess_config(recipe)}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    weights = save(state, metadata={"format": "pt"})
    (folder / "open_clip_model.safetensors").write_bytes(weights)
