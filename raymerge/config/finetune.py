"""The ``finetune`` section: how experts and the joint reference are trained.

The defaults are the recipe of the task-vectors code (Ilharco et al., ICLR 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from raymerge.config.methods import Betas, Frozen

_EPOCHS = 10
_DEFAULT = "default"


def _as_mapping(value: Any) -> Any:
    """``12`` is short for ``{default: 12}``."""
    return {_DEFAULT: value} if isinstance(value, int | float | str) else value


PerTask = Annotated[
    Mapping[str, Annotated[int, Field(ge=1)]], Field(min_length=1), BeforeValidator(_as_mapping)
]
"""A number, or one per task with ``default`` for the others."""


class FinetuneConfig(Frozen):
    """AdamW on the visual tower, with the zero-shot heads frozen."""

    targets: Literal["experts", "joint", "both"] = "experts"
    """``joint``: one encoder trained on all tasks at once (Traditional MTL)."""
    epochs: PerTask | None = None
    """Over each task's training images; default 10."""
    steps: PerTask | None = None
    """Instead of ``epochs``."""
    joint_steps: int | None = Field(default=None, ge=1)
    """Default: the most that one of its tasks takes alone."""
    batch_size: int = Field(default=128, ge=1)
    """Images of one task in a step; a step of the joint reference takes as many of every task."""
    lr: float = Field(default=1e-5, gt=0)
    betas: Betas = (0.9, 0.999)
    weight_decay: float = Field(default=0.1, ge=0)
    warmup_steps: int = Field(default=500, ge=0)
    """Over which the rate rises to ``lr``; it falls to 0 along half a cosine in the others."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Most that the gradient's norm may be; larger ones are scaled down to it."""
    augment: Literal["none", "open_clip"] = "none"
    """``none``: the validation preprocessing, as the task-vectors code does. ``open_clip``:
    open_clip's own training transform, a random crop of 90 to 100 % of the area."""
    state_every_steps: int = Field(default=100, ge=1)
    """How often the weights and the optimiser's moments are saved for ``--resume``."""

    @model_validator(mode="after")
    def _one_measure_of_length(self) -> FinetuneConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps say the same thing twice; give one of them")
        return self

    def steps_for(self, task: str, steps_per_epoch: int) -> int | None:
        """Of the expert of ``task``; None where ``steps`` names neither it nor a default."""
        if self.steps is not None:
            return self.steps.get(task, self.steps.get(_DEFAULT))
        epochs = self.epochs or {}
        return epochs.get(task, epochs.get(_DEFAULT, _EPOCHS)) * steps_per_epoch

    @property
    def named_tasks(self) -> dict[str, str]:
        """Task name → the key that names it."""
        given = {"epochs": self.epochs or {}, "steps": self.steps or {}}
        return {
            task: f"finetune.{key}.{task}"
            for key, values in given.items()
            for task in values
            if task != _DEFAULT
        }
