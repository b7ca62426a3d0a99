"""The criterion of collapse: entropy minimisation makes a task confidently wrong.

The guard is pure: a state in, a new state out. Reacting to a collapse is left to
``engine.driver.monitor``.

Legend: K tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GuardState:
    """Smoothed values after ``steps`` steps, and those at the start: (K,) float64 each, in nats."""

    entropy: Tensor
    marginal: Tensor
    start_entropy: Tensor
    start_marginal: Tensor
    steps: int = 0

    @classmethod
    def start(cls, tasks: int) -> GuardState:
        """Return the state before the first step; its zeros do not enter any average."""
        zero_K = torch.zeros(tasks, dtype=torch.float64)
        return cls(zero_K, zero_K, zero_K, zero_K)


@dataclass(frozen=True)
class CollapseGuard:
    """Compares each task's mean entropy E H(p) and marginal entropy H(E p) with those at its start.

    Minimising E H(p) alone has a trivial solution: the same confident answer to every image. (On
    EuroSAT under impulse noise task arithmetic has 49.1 % and AdaMerging 30.8 %.) On the way the
    answers concentrate on few classes, so H(E p) falls together with E H(p); in healthy adaptation
    E H(p) falls alone. A task is collapsing while both are below their start, H(E p) by
    ``collapse_fraction``. The ratio needs no ln C, so one setting serves 10 and 397 classes.

    It misses confident errors that stay spread over the classes (H(E p) is unchanged), and a task
    that had collapsed before the start. It gives a false alarm if few of the classes occur among
    the images but the model's first answers were spread over all of them.

    The marginal must be of E p averaged over many batches: one batch of B ≪ C images has
    H(mean p) ≤ mean H + ln B, which falls in healthy adaptation too.
    """

    collapse_fraction: float = 0.5
    """Collapsing is H(E p) below this fraction of its start: of 10 classes, about 3 left in use."""
    momentum: float = 0.1
    """The weight of a step in the smoothed values, so small that no single batch is a collapse."""
    warmup_steps: int = 10
    """The mean of these first steps is the start; no collapse is reported in them."""

    def observe(
        self, state: GuardState, entropy_K: Tensor, marginal_K: Tensor
    ) -> tuple[GuardState, list[int]]:
        """Add one step's E H(p) and H(E p), (K,) in nats; return the tasks collapsing now."""
        steps = state.steps + 1
        weight = 1 / steps if steps <= self.warmup_steps else self.momentum
        entropy_K = state.entropy + weight * (entropy_K.double() - state.entropy)
        marginal_K = state.marginal + weight * (marginal_K.double() - state.marginal)
        if steps <= self.warmup_steps:
            return GuardState(entropy_K, marginal_K, entropy_K, marginal_K, steps), []
        collapsing_K = (marginal_K < self.collapse_fraction * state.start_marginal) & (
            entropy_K < state.start_entropy
        )
        after = GuardState(entropy_K, marginal_K, state.start_entropy, state.start_marginal, steps)
        return after, collapsing_K.nonzero().flatten().tolist()
