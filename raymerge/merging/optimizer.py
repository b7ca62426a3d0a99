"""Adam on λ, with the three clamps in use. It is pure: a state in, a new state out.

Everything is float64 and tiny (K·L numbers), so the driver's arithmetic adds no noise of its own.
Gradients are left to the loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raymerge.config.methods import Clamp


@dataclass(frozen=True)
class AdamState:
    """λ (K, L) float64 with its two moments, after ``step`` steps.

    ``skipped``: the number of steps that did not update λ.
    """

    lambdas: Tensor
    mean: Tensor
    square: Tensor
    step: int = 0
    skipped: int = 0

    @property
    def updates(self) -> int:
        """The number of updates of λ: one in every step but the skipped ones."""
        return self.step - self.skipped

    @classmethod
    def start(cls, lambdas_KL: Tensor) -> AdamState:
        lambdas_KL = lambdas_KL.double()
        return cls(lambdas_KL, torch.zeros_like(lambdas_KL), torch.zeros_like(lambdas_KL))


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba, 2015) without weight decay, as ``torch.optim.Adam``.

    ``clamp``: ``projected`` clamps λ itself to [0, 1] after each step; ``forward`` (the released
    AdaMerging code) clamps only the λ that the merge uses, so a λ outside [0, 1] gets no gradient
    and moves by its moments alone; ``none`` leaves λ free.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clamp: Clamp = "projected"
    decay_steps: int | None = None
    """Steps over which the rate falls from ``lr`` to 0 along half a cosine; None: constant."""
    sharpness: float = 0.0
    """ρ of a sharpness-aware step (Foret et al., ICLR 2021); 0: a plain one."""

    def rate(self, step: int) -> float:
        """Return the learning rate of the update after ``step`` steps."""
        if self.decay_steps is None:
            return self.lr
        progress = min(step / self.decay_steps, 1.0)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def effective(self, lambdas_KL: Tensor) -> Tensor:
        """Return the coefficients that the merge uses."""
        return lambdas_KL.clamp(0, 1) if self.clamp == "forward" else lambdas_KL

    def ascend(self, lambdas_KL: Tensor, gradient_KL: Tensor) -> Tensor:
        """Return λ + ρ g/‖g‖, where a sharpness-aware step takes its gradient."""
        norm = gradient_KL.norm()
        return lambdas_KL + self.sharpness * gradient_KL / norm if norm > 0 else lambdas_KL

    def update(self, state: AdamState, gradient_KL: Tensor) -> AdamState:
        """Return the state after one step along ``gradient_KL``, ∂ℒ/∂(effective λ)."""
        if self.clamp == "forward":
            gradient_KL = gradient_KL * clamp_gradient(state.lambdas)
        beta1, beta2 = self.betas
        updates = state.updates + 1
        mean = beta1 * state.mean + (1 - beta1) * gradient_KL
        square = beta2 * state.square + (1 - beta2) * gradient_KL.square()
        rate = self.rate(state.step) / (1 - beta1**updates)
        denominator = (square / (1 - beta2**updates)).sqrt() + self.eps
        lambdas = state.lambdas - rate * mean / denominator
        if self.clamp == "projected":
            lambdas = lambdas.clamp(0, 1)
        return AdamState(lambdas, mean, square, state.step + 1, state.skipped)


def clamp_gradient(lambdas_KL: Tensor) -> Tensor:
    """Return d clamp(λ, 0, 1)/dλ: 1 on the closed interval [0, 1], 0 outside it."""
    return ((lambdas_KL >= 0) & (lambdas_KL <= 1)).to(lambdas_KL.dtype)
