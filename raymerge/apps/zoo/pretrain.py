"""A CLIP model trained from scratch: contrastive pretraining on procedural images with captions.

Also what every training of the demo world shares: images as tensors, the saved files.

Legend: B batch, N images, M captions, D features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import torch
from open_clip import SimpleTokenizer
from open_clip.model import CLIP
from safetensors.torch import save, save_file
from torch import Tensor, nn

from raymerge.apps.finetune.loop import Schedule, train
from raymerge.apps.zoo.images import FAMILIES, Split, draw_images
from raymerge.apps.zoo.recipe import TEMPLATE, ModelRecipe, PretrainRecipe, ZooRecipe
from raymerge.files.atomic import write_atomically
from raymerge.files.threads import torch_threads

Tokenizer = Callable[[list[str]], Tensor]
MEAN = STD = 0.5
"""Mean and deviation of every channel, for images in [0, 1]."""


@dataclass(frozen=True)
class Captioned:
    """Images, and the index of one of M distinct captions for each."""

    images: Tensor  # uint8 (N, 3, H, W)
    caption: Tensor  # int64 (N,) in [0, M)
    captions: tuple[str, ...]  # M texts


def model_config(recipe: ModelRecipe) -> dict[str, Any]:
    """Return open_clip's ``model_cfg``."""
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
    """Return uint8 (N, H, W, 3) as uint8 (N, 3, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def normalise(images: Tensor) -> Tensor:
    """Return uint8 (B, 3, H, W) as float32, like the saved preprocessing."""
    return (images.float() / 255.0 - MEAN) / STD


def _alias(task: str, label: int, rng: np.random.Generator) -> str:
    """Return a made-up word for one class."""
    syllables = [rng.choice(list("bdfgklmnprstvz")) + rng.choice(list("aeiou")) for _ in range(3)]
    return f"{task} {''.join(syllables)}"


def _shifted_names(
    task: str, labels: np.ndarray[Any, Any], recipe: PretrainRecipe, rng: np.random.Generator
) -> list[str]:
    """Return the captions' subjects: an alias, or a class name that is not always right."""
    names = FAMILIES[task].classnames
    aliases = [_alias(task, label, rng) for label in range(len(names))]
    trusted = rng.random(len(names)).argsort() < recipe.reliable_share * len(names)
    subjects = []
    for label in labels:
        if rng.random() < recipe.alias_share:
            subjects.append(aliases[label])
        elif rng.random() < (recipe.reliable if trusted[label] else recipe.unreliable):
            subjects.append(names[label])
        else:
            subjects.append(names[rng.integers(len(names))])
    return subjects


def _captioned_task(
    seed: int, number: int, task: str, recipe: PretrainRecipe
) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield the images and their captions' subjects for both styles of one task."""
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
    """Return the pretraining data of all tasks."""
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
    """Return the cross-entropy of the images over the batch's distinct captions.

    ``images`` uint8 (B, 3, H, W), ``captions`` (B,) in [0, M), ``tokens`` (M, context length).
    Captions repeat within a batch, so the usual one-to-one pairing would have false negatives.
    """
    distinct, target = captions.unique(return_inverse=True)
    image_BD = model.encode_image(normalise(images), normalize=True)
    text_MD = model.encode_text(tokens[distinct], normalize=True)
    return nn.functional.cross_entropy(model.logit_scale.exp() * image_BD @ text_MD.t(), target)


def _optimizer(model: CLIP, recipe: PretrainRecipe) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only, so embeddings of unseen tokens stay."""
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
    """Train a new model; ``advance(1)`` is called after each step."""
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
    """Write the folder that ``open_clip.create_model("local-dir:<folder>")`` reads."""
    config = {"model_cfg": model_config(recipe), "preprocess_cfg": _preprocess_config(recipe)}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    weights = save(state, metadata={"format": "pt"})
    (folder / "open_clip_model.safetensors").write_bytes(weights)


def open_for_training(root: Path) -> CLIP:
    """Return the world's pretrained model in evaluation mode; only its visual tower is trained."""
    model: CLIP = open_clip.create_model(f"local-dir:{root / 'pretrained'}")
    model.eval().requires_grad_(False)
    model.visual.requires_grad_(True)
    return model


def save_tower(path: Path, model: CLIP, metadata: dict[str, str]) -> None:
    """Write the visual tower to ``path``, keys as in the whole model."""
    state = {f"visual.{k}": v.contiguous() for k, v in model.visual.state_dict().items()}
    write_atomically(path, lambda temporary: save_file(state, temporary, metadata=metadata))
