"""Every number of the demo world, and the fingerprint that names a world made from them.

Changing a number changes the fingerprint, so a world is never mixed from two recipes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

TEMPLATE = "a photo of a {}."
FORMAT = 1
"""Raised when the images or the files change in a way that the numbers below do not show."""


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """A CLIP small enough to train from scratch on two cores."""

    embed_dim: int = 64
    image_size: int = 32
    patch_size: int = 8
    vision_width: int = 80
    vision_layers: int = 6
    head_width: int = 40
    context_length: int = 12
    text_width: int = 32
    text_layers: int = 2
    vocab_size: int = 49408
    """open_clip's own tokenizer, so that any tool can read the model."""


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """Contrastive pretraining on plain images and on shifted ones with unreliable captions.

    Shifted images need captions that are right but not reliable. Without captions the encoder
    never sees the style, its zero-shot predictions there are confidently wrong, and minimising the
    entropy cannot improve them.
    """

    steps: int = 1000
    batch: int = 128
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 50
    images_per_style: int = 2000
    """Per task, for each of the two styles."""
    alias_share: float = 0.5
    """Shifted images captioned with a made-up word: the class is learned, its name is not."""
    reliable_share: float = 0.4
    """Share of the classes whose other shifted captions are right with probability ``reliable``."""
    reliable: float = 0.9
    unreliable: float = 0.35
    threads: int = 2
    """Fixed, since the order of floating-point sums depends on it."""


@dataclass(frozen=True, kw_only=True)
class ExpertRecipe:
    """Fine-tuning one visual tower on one task, with its zero-shot head frozen.

    Rehearsal holds features of other tasks' images near the pretrained ones; less of it means
    experts that interfere more.
    """

    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 6e-4
    early_lr_factor: float = 1.0
    """Factor on the learning rate of the stem and the first block. Experts that change these layers
    much interfere more there than in later ones, so no single λ suits all layers."""
    steps: int = 220
    batch: int = 48
    weight_decay: float = 0.01
    images: int = 1500
    rehearsal_batch: int = 32
    rehearsal_weight: float = 12.0
    rehearsal_images: int = 100
    """Per task and style."""


@dataclass(frozen=True, kw_only=True)
class JointRecipe:
    """The joint reference; all other numbers are those of ``ZooRecipe.expert``."""

    lr: float = 1.5e-3
    batch: int = 12
    """Images of every task in a step."""
    threads: int = 2
    """Fixed, since the order of floating-point sums depends on it."""


@dataclass(frozen=True, kw_only=True)
class ZooRecipe:
    """The whole world. ``experts`` lists the tasks that do not use ``expert``."""

    model: ModelRecipe = field(default_factory=ModelRecipe)
    pretrain: PretrainRecipe = field(default_factory=PretrainRecipe)
    expert: ExpertRecipe = field(default_factory=ExpertRecipe)
    experts: tuple[tuple[str, ExpertRecipe], ...] = ()
    adapt_images: int = 300
    test_images: int = 500
    joint: JointRecipe = field(default_factory=JointRecipe)

    def expert_for(self, task: str) -> ExpertRecipe:
        return dict(self.experts).get(task, self.expert)

    def fingerprint(self, seed: int) -> str:
        """Return the digest of the format, the seed and every number but the joint reference's."""
        numbers = asdict(self)
        del numbers["joint"]
        return _digest({"format": FORMAT, "seed": seed, **numbers})

    def joint_fingerprint(self, seed: int) -> str:
        """Return the digest of the joint reference and the world that it is made from."""
        return _digest({"world": self.fingerprint(seed), **asdict(self.joint)})


WORLDS: Mapping[str, ZooRecipe] = {
    "demo": ZooRecipe(),
    "demo-interfering": ZooRecipe(expert=ExpertRecipe(early_lr_factor=4.0)),
}
"""The worlds that an experiment may name as its base. The second's experts interfere in early
layers: its best common λ is small, and a λ per layer is better (docs/experiments.md, seeds)."""


def _digest(numbers: Mapping[str, Any]) -> str:
    text = json.dumps(numbers, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
