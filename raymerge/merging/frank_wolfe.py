"""FW-Merging (Chen et al., ICCV 2025): min ℓ(θ) over the convex hull of the fine-tuned models.

Every point of the hull is θ₀ + Σ_k λ_k (θ_k − θ₀), so a Frank-Wolfe step is arithmetic on λ, and
a vertex is chosen by the gradient of λ: ⟨g, θ_k⟩ = ⟨g, θ₀⟩ + ∂ℒ/∂λ_k per layer. The iterations are
left to ``engine.driver.frank_wolfe``.

Legend: K models, L layers, J candidates (the models, and the model that the run started from).
"""

from __future__ import annotations

import torch
from torch import Tensor


def vertices(lambdas_KL: Tensor) -> Tensor:
    """Return the candidates' coefficients (J, K, L): each model alone, then ``lambdas_KL``."""
    models, layers = lambdas_KL.shape
    alone = torch.eye(models, dtype=lambdas_KL.dtype).unsqueeze(2).expand(-1, -1, layers)
    return torch.cat([alone, lambdas_KL.unsqueeze(0)])


def products(gradient_KL: Tensor, vertices_JKL: Tensor) -> Tensor:
    """Return ⟨g, θ_j − θ₀⟩ per layer, (J, L): the true oracle's scores without the common term."""
    return torch.einsum("jkl,kl->jl", vertices_JKL, gradient_KL)


def cosines(
    products_JL: Tensor, gradient_base_L: Tensor, gradient_square_L: Tensor, square_JL: Tensor
) -> Tensor:
    """Return cos(g, θ_j) per layer, (J, L), the released code's score; 0 where either is zero."""
    norms_JL = (gradient_square_L * square_JL).sqrt()
    scores_JL = (products_JL + gradient_base_L) / norms_JL
    return torch.where(norms_JL > 0, scores_JL, torch.zeros_like(scores_JL))


def choose(scores_JL: Tensor, whole: bool) -> Tensor:
    """Return the candidate of the lowest score, (L,) int64, the first of equals.

    ``whole``: one candidate for all layers, by the sum of its scores; else one for each layer.
    """
    if whole:
        scores_JL = scores_JL.sum(1, keepdim=True).expand_as(scores_JL)
    return scores_JL.argmin(0)


def vertex(choice_L: Tensor, vertices_JKL: Tensor) -> Tensor:
    """Return the chosen candidates' coefficients, (K, L)."""
    layers = torch.arange(len(choice_L))
    return vertices_JKL[choice_L, :, layers].t()


def gap(gradient_KL: Tensor, lambdas_KL: Tensor, vertex_KL: Tensor) -> float:
    """Return the gap ⟨g, θ − s⟩: at least ℓ(θ) − min ℓ where ℓ is convex (Jaggi, 2013)."""
    return float((gradient_KL * (lambdas_KL - vertex_KL)).sum())


def move(lambdas_KL: Tensor, vertex_KL: Tensor, rate: float) -> Tensor:
    """Return θ + rate (s − θ) as coefficients; inside the hull for a rate in [0, 1]."""
    return lambdas_KL + rate * (vertex_KL - lambdas_KL)


def rate(iteration: int) -> float:
    """Return γ = 2/(t + 2) for iteration t = 0, 1, …"""
    return 2.0 / (iteration + 2.0)
