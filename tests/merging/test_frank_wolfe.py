"""Frank-Wolfe on coefficients: its known rate, its gap, and its two oracles."""

from __future__ import annotations

import pytest
import torch

from raymerge.merging.frank_wolfe import (
    choose,
    cosines,
    gap,
    move,
    products,
    rate,
    vertex,
    vertices,
)

CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
TARGET = torch.tensor([0.3, 0.4], dtype=torch.float64)


def _point(lambdas_K: torch.Tensor) -> torch.Tensor:
    """θ of coefficients, with θ₀ = 0 and three corners."""
    return (lambdas_K[:, None] * CORNERS).sum(0)


def _gradient(theta: torch.Tensor) -> torch.Tensor:
    """∂/∂λ_k of f = ½‖θ − target‖²: ⟨θ − target, corner_k⟩, one layer."""
    return (CORNERS @ (theta - TARGET))[:, None]


def test_the_objective_falls_as_fast_as_the_theorem_says_and_the_gap_bounds_it() -> None:
    """f − f* ≤ 2LD²/(t + 2) with L = 1 and D² = 2 for this triangle (Jaggi, 2013)."""
    lambdas_KL = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    for t in range(200):
        theta = _point(lambdas_KL[:, 0])
        excess = float((theta - TARGET).square().sum() / 2)
        gradient_KL = _gradient(theta)
        candidates = vertices(lambdas_KL)[:3]
        chosen = vertex(choose(products(gradient_KL, candidates), whole=True), candidates)
        assert gap(gradient_KL, lambdas_KL, chosen) >= excess - 1e-12
        if t:
            assert excess <= 4 / (t + 2)
        lambdas_KL = move(lambdas_KL, chosen, rate(t))
        assert float(lambdas_KL.sum()) == pytest.approx(1)
        assert (lambdas_KL >= 0).all()


def test_the_first_full_step_reaches_the_chosen_model() -> None:
    assert rate(0) == 1
    start = torch.zeros(1, 3)
    candidates = vertices(start)[:1]
    chosen = vertex(torch.zeros(3, dtype=torch.int64), candidates)
    assert torch.equal(move(start, chosen, rate(0)), torch.ones(1, 3))


def test_each_layer_may_choose_its_own_model() -> None:
    scores_JL = torch.tensor([[1.0, -5.0, 0.0], [0.0, 2.0, 0.0], [3.0, 0.0, -1.0]])
    assert choose(scores_JL, whole=False).tolist() == [1, 0, 2]
    assert choose(scores_JL, whole=True).tolist() == [0, 0, 0]
    chosen_KL = vertex(choose(scores_JL, whole=False), vertices(torch.full((2, 3), 0.25)))
    assert chosen_KL.tolist() == [[0.0, 1.0, 0.25], [1.0, 0.0, 0.25]]


def test_products_and_cosines_are_those_of_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, dtype=torch.float64, generator=generator)
    models = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    g = torch.randn(4, dtype=torch.float64, generator=generator)
    start_KL = torch.full((3, 1), 0.2, dtype=torch.float64)
    start = base + (start_KL * (models - base)).sum(0)
    points = torch.stack([*models, start])
    gradient_KL = ((models - base) @ g)[:, None]
    products_JL = products(gradient_KL, vertices(start_KL))
    torch.testing.assert_close(products_JL[:, 0] + base @ g, points @ g)
    square_JL = points.square().sum(1)[:, None]
    scores_JL = cosines(products_JL, (base @ g)[None], g.square().sum()[None], square_JL)
    torch.testing.assert_close(scores_JL[:, 0], torch.cosine_similarity(points, g[None], dim=1))


def test_a_tensor_of_zeros_scores_zero_not_nan() -> None:
    zero = torch.zeros(2, 1)
    assert cosines(zero, zero[0], torch.ones(1), zero).tolist() == [[0.0], [0.0]]
    assert cosines(zero, zero[0], zero[0], torch.ones(2, 1)).tolist() == [[0.0], [0.0]]
