"""Entropy and its gradient."""

from __future__ import annotations

import math

import pytest
import torch

from raymerge.config import AdaMerging
from raymerge.merging.objectives import OBJECTIVES, entropy


def _logits(*shape: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_entropy_is_its_definition_in_nats():
    logits_BC = _logits(5, 7)
    p_BC = logits_BC.exp() / logits_BC.exp().sum(1, keepdim=True)
    expected_B = [-sum(p * math.log(p) for p in row) for row in p_BC.tolist()]
    assert entropy(logits_BC).tolist() == pytest.approx(expected_B, rel=1e-13)


@pytest.mark.parametrize("classes", [2, 10, 397])
@pytest.mark.parametrize("level", [-50.0, 0.0, 3.0])
def test_uniform_logits_have_the_entropy_log_c(classes, level):
    logits_BC = torch.full((3, classes), level, dtype=torch.float64)
    assert entropy(logits_BC).tolist() == pytest.approx([math.log(classes)] * 3, rel=1e-13)


def test_gradient_is_minus_p_times_log_p_plus_h():
    logits_BC = _logits(6, 11).requires_grad_(True)
    entropy(logits_BC).sum().backward()
    p_BC = torch.softmax(logits_BC.detach(), -1)
    h_B1 = -(p_BC * p_BC.log()).sum(-1, keepdim=True)
    torch.testing.assert_close(logits_BC.grad, -p_BC * (p_BC.log() + h_B1), rtol=1e-11, atol=1e-14)


def test_gradient_is_the_central_difference():
    assert torch.autograd.gradcheck(entropy, (_logits(3, 5).requires_grad_(True),))


def test_gradient_vanishes_at_uniform_logits_and_sums_to_zero_everywhere():
    uniform = torch.zeros(1, 9, dtype=torch.float64, requires_grad=True)
    entropy(uniform).sum().backward()
    assert uniform.grad.abs().max() < 1e-16
    logits_BC = _logits(4, 9).requires_grad_(True)
    entropy(logits_BC).sum().backward()
    assert logits_BC.grad.sum(1).abs().max() < 1e-14  # H(z + c) = H(z)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_logits_are_finite_with_a_finite_gradient(size, dtype):
    logits_BC = torch.tensor([[size, 0.0, -size], [-size, -size, 0.0]], dtype=dtype)
    logits_BC.requires_grad_(True)
    values_B = entropy(logits_BC)
    values_B.sum().backward()
    assert values_B.tolist() == pytest.approx([0.0, 0.0], abs=1e-30)
    assert torch.isfinite(logits_BC.grad).all()
    assert logits_BC.grad.abs().max() < 1e-30


def test_two_tied_saturated_logits_have_the_entropy_log_2():
    logits_BC = torch.tensor([[1e4, 1e4, -1e4]], requires_grad=True)
    value = entropy(logits_BC).sum()
    value.backward()
    assert value.item() == pytest.approx(math.log(2), rel=1e-6)
    assert torch.isfinite(logits_BC.grad).all()


def test_images_do_not_influence_each_other():
    logits_BC = _logits(4, 5)
    rows = [float(entropy(row[None])) for row in logits_BC]
    assert entropy(logits_BC).tolist() == pytest.approx(rows, rel=1e-15)


def test_every_objective_of_the_config_exists():
    assert set(OBJECTIVES) == set(AdaMerging.model_fields["objective"].annotation.__args__)
    assert OBJECTIVES["entropy"] is entropy
