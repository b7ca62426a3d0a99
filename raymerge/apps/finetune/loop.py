"""The training loop shared by experts, the joint reference and the demo zoo.

A step sets the learning rate, runs a backward pass, clips the gradient's norm and updates. Batches,
losses and state are the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from raymerge.errors import RunError

R = TypeVar("R")


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over ``warmup`` steps, then half a cosine to zero at ``steps``."""

    steps: int
    warmup: int = 0

    def factor(self, step: int) -> float:
        """Return the factor on the learning rate of ``step``, which counts from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done))


def train(
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    backward: Callable[[int], R],
    observe: Callable[[int, R], None] = lambda step, result: None,
    *,
    start: int = 0,
    clip_norm: float = 1.0,
) -> None:
    """Take the steps ``start`` to ``schedule.steps``.

    ``backward(step)`` adds the gradient of the step's loss to the parameters' own and returns the
    result that ``observe`` receives after the update. A step whose gradient is not finite raises
    :class:`RunError` and changes nothing. The groups' learning rates are those of factor 1; they
    are restored at the end, also after an error.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for step in range(start, schedule.steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule.factor(step)
            # The gradient, with its norm clipped.
            optimizer.zero_grad(set_to_none=False)  # gradients may be views into a flat vector
            result = backward(step)
            norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
            if not torch.isfinite(norm):
                raise RunError(
                    f"step {step + 1}: the gradient is NaN or infinite; lower the learning rate"
                )
            # Only a finite gradient changes the weights.
            optimizer.step()
            observe(step, result)
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
