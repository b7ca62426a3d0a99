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
    """Passes over each task's training images; default 10."""
    steps: PerTask | None = None
    """Steps of each task, instead of ``epochs``."""
    joint_steps: int | None = Field(default=None, ge=1)
    """Default: the largest number of steps of any task's expert."""
    batch_size: int = Field(default=128, ge=1)
    """Images per step of one task; a step of the joint reference takes as many of every task."""
    lr: float = Field(default=1e-5, gt=0)
    betas: Betas = (0.9, 0.999)
    weight_decay: float = Field(default=0.1, ge=0)
    warmup_steps: int = Field(default=500, ge=0)
    """Steps in which the rate rises to ``lr``; after them it falls to 0 along half a cosine."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; a larger one is scaled down to it."""
    augment: Literal["none", "open_clip"] = "none"
    """``none``: the validation preprocessing, as the task-vectors code does. ``open_clip``:
    open_clip's own training transform, a random crop of 90 to 100 % of the area."""
    state_every_steps: int = Field(default=100, ge=1)
    """Steps between two saves of the weights and the moments, for ``--resume``."""

    @model_validator(mode="after")
    def _one_measure_of_length(self) -> FinetuneConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps say the same thing twice; give one of them")
        return self

    def steps_for(self, task: str, steps_per_epoch: int) -> int | None:
        """Return the steps of a task's expert, or None if ``steps`` has no number for it."""
        if self.steps is not None:
            return self.steps.get(task, self.steps.get(_DEFAULT))
        epochs = self.epochs or {}
        return epochs.get(task, epochs.get(_DEFAULT, _EPOCHS)) * steps_per_epoch

    @property
    def named_tasks(self) -> dict[str, str]:
        """The tasks that the section names, with the key that names each."""
        sections = {"epochs": self.epochs or {}, "steps": self.steps or {}}
        return {
            task: f"finetune.{key}.{task}"
            for key, values in sections.items()
            for task in values
            if task != _DEFAULT
        }
