"""FW-Merging (Chen et al., ICCV 2025): min ℓ(θ) over the convex hull of the fine-tuned models.

Every point of the hull is θ₀ + Σ_k λ_k (θ_k − θ₀), so a Frank-Wolfe step is arithmetic on λ, and
what chooses a vertex is the gradient that λ has anyway: ⟨g, θ_k⟩ = ⟨g, θ₀⟩ + ∂ℒ/∂λ_k per layer.

Legend: K models, L layers, J candidates (the models, and the model that the run started from).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


def vertices(lambdas_KL: Tensor) -> Tensor:
    """The candidates as coefficients (J, K, L): each model alone, then ``lambdas_KL`` itself."""
    models, layers = lambdas_KL.shape
    alone = torch.eye(models, dtype=lambdas_KL.dtype).unsqueeze(2).expand(-1, -1, layers)
    return torch.cat([alone, lambdas_KL.unsqueeze(0)])


def products(gradient_KL: Tensor, vertices_JKL: Tensor) -> Tensor:
    """⟨g, θ_j − θ₀⟩ per layer, (J, L): the true oracle's scores but for what all share."""
    return torch.einsum("jkl,kl->jl", vertices_JKL, gradient_KL)


def cosines(
    products_JL: Tensor, gradient_base_L: Tensor, gradient_square_L: Tensor, square_JL: Tensor
) -> Tensor:
    """cos(g, θ_j) per layer, (J, L), as the released code scores; 0 where either is zero."""
    norms_JL = (gradient_square_L * square_JL).sqrt()
    scores_JL = (products_JL + gradient_base_L) / norms_JL
    return torch.where(norms_JL > 0, scores_JL, torch.zeros_like(scores_JL))


def choose(scores_JL: Tensor, whole: bool, excluded: Collection[int] = ()) -> Tensor:
    """(L,) int64: the candidate of the lowest score, one for all layers (``whole``) or for each.

    The first of equals. ``excluded``: candidates that may not be chosen.
    """
    if whole:
        scores_JL = scores_JL.sum(1, keepdim=True).expand_as(scores_JL)
    scores_JL = scores_JL.clone()
    scores_JL[list(excluded)] = torch.inf
    return scores_JL.argmin(0)


def vertex(choice_L: Tensor, vertices_JKL: Tensor) -> Tensor:
    """The chosen candidates' coefficients, (K, L)."""
    layers = torch.arange(len(choice_L))
    return vertices_JKL[choice_L, :, layers].t()


def gap(gradient_KL: Tensor, lambdas_KL: Tensor, vertex_KL: Tensor) -> float:
    """The Frank-Wolfe gap ⟨g, θ − s⟩: at least ℓ(θ) − min ℓ where ℓ is convex (Jaggi, 2013)."""
    return float((gradient_KL * (lambdas_KL - vertex_KL)).sum())


def move(lambdas_KL: Tensor, vertex_KL: Tensor, rate: float) -> Tensor:
    """θ + rate (s − θ) as coefficients; inside the hull for a rate in [0, 1]."""
    return lambdas_KL + rate * (vertex_KL - lambdas_KL)


def rate(iteration: int) -> float:
    """γ = 2/(t + 2) of iteration t = 0, 1, …"""
    return 2.0 / (iteration + 2.0)
