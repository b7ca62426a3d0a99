"""The per-image losses, their gradients and their weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from raymerge.config.methods import AdaMerging
from raymerge.merging import objectives
from raymerge.merging.objectives import (
    cross_entropy,
    eata_weights,
    entropy,
    infomax,
    kl,
    marginal_entropy,
    mix_marginal,
    momentum_at,
    probability_sum,
    task_scale,
)


def _logits(*shape: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
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
    for name in AdaMerging.model_fields["objective"].annotation.__args__:
        assert callable(getattr(objectives, name))


def _gradient(loss: Callable[[Tensor], Tensor], logits_BC: Tensor) -> Tensor:
    """∂ Σ_i loss_i / ∂z, (B, C)."""
    logits_BC = logits_BC.detach().clone().requires_grad_(True)
    (gradient_BC,) = torch.autograd.grad(loss(logits_BC).sum(), logits_BC)
    return gradient_BC


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_kl_is_its_definition(temperature):
    logits_BC, expert_BC = _logits(6, 7), _logits(6, 7, seed=1)
    p_BC, q_BC = (
        (z / temperature).exp() / (z / temperature).exp().sum(1, keepdim=True)
        for z in (logits_BC, expert_BC)
    )
    expected_B = temperature**2 * (q_BC * (q_BC / p_BC).log()).sum(1)
    actual_B = kl(logits_BC, expert_BC, temperature)
    torch.testing.assert_close(actual_B, expected_B, rtol=1e-12, atol=1e-14)


def test_kl_is_zero_only_for_equal_predictions_and_positive_otherwise():
    logits_BC = _logits(50, 7)
    assert kl(logits_BC, logits_BC).abs().max() == 0
    assert kl(logits_BC, logits_BC + 3.0).abs().max() < 1e-13  # a shift changes no prediction
    for size in (1e-3, 1.0, 30.0):
        assert kl(logits_BC, logits_BC + size * _logits(50, 7, seed=1)).min() > 0


def test_kl_is_not_symmetric_the_expert_weighs_the_classes():
    sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert kl(sure, unsure, 1.0) > kl(unsure, sure, 1.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_kl_has_the_gradient_t_times_p_minus_q(temperature):
    logits_BC, expert_BC = _logits(6, 7), _logits(6, 7, seed=1)
    p_BC, q_BC = (torch.softmax(z / temperature, -1) for z in (logits_BC, expert_BC))
    gradient_BC = _gradient(lambda z: kl(z, expert_BC, temperature), logits_BC)
    torch.testing.assert_close(gradient_BC, temperature * (p_BC - q_BC), rtol=1e-12, atol=1e-13)


def test_kl_of_a_hot_temperature_is_half_the_variance_of_the_difference():
    logits_BC, expert_BC = _logits(6, 7), _logits(6, 7, seed=1)
    expected_B = (expert_BC - logits_BC).var(1, correction=0) / 2
    torch.testing.assert_close(kl(logits_BC, expert_BC, 1e4), expected_B, rtol=1e-2, atol=0)


def test_kl_takes_pinned_half_precision_experts():
    expert_BC = _logits(6, 7).half()
    assert kl(expert_BC.float(), expert_BC).abs().max() == 0


def test_kl_to_a_one_hot_expert_is_cross_entropy():
    logits_BC, labels_B = _logits(3, 7), torch.tensor([0, 6, 2])
    expert_BC = 1e4 * torch.nn.functional.one_hot(labels_B, 7).double()
    torch.testing.assert_close(kl(logits_BC, expert_BC, 1.0), cross_entropy(logits_BC, labels_B))


def test_cross_entropy_is_minus_log_p_of_the_label_with_gradient_p_minus_one_hot():
    logits_BC, labels_B = _logits(3, 7), torch.tensor([0, 6, 2])
    p_BC = torch.softmax(logits_BC, -1)
    expected_B = -p_BC[torch.arange(3), labels_B].log()
    torch.testing.assert_close(cross_entropy(logits_BC, labels_B), expected_B)
    one_hot_BC = torch.nn.functional.one_hot(labels_B, 7)
    gradient_BC = _gradient(lambda z: cross_entropy(z, labels_B), logits_BC)
    torch.testing.assert_close(gradient_BC, p_BC - one_hot_BC)


def update_marginal(marginal_C: Tensor, logits_BC: Tensor, momentum: float) -> Tensor:
    """Return the marginal with one whole batch added."""
    return mix_marginal(marginal_C, probability_sum(logits_BC) / len(logits_BC), momentum)


def _marginal(classes: int) -> Tensor:
    return torch.softmax(_logits(classes, scale=1.0, seed=2), 0)


def _entropy_of(p_C: Tensor) -> Tensor:
    return -(p_C * p_C.log()).sum()


@pytest.mark.parametrize("momentum", [0.01, 0.3, 1.0])
def test_infomax_has_the_gradient_of_shot_with_the_batch_as_the_whole_marginal(momentum):
    """mean H(p) − H(m)/μ, differentiated through m = (1−μ) m_old + μ mean p."""
    logits_BC, old_C = _logits(6, 7), _marginal(7)

    def shot(z_BC: Tensor) -> Tensor:
        mean_p_C = torch.softmax(z_BC, -1).mean(0)
        m_C = (1 - momentum) * old_C + momentum * mean_p_C
        return entropy(z_BC).mean() - _entropy_of(m_C) / momentum

    m_C = update_marginal(old_C, logits_BC, momentum)
    gradient_BC = _gradient(lambda z: infomax(z, m_C).mean(), logits_BC)
    torch.testing.assert_close(gradient_BC, _gradient(shot, logits_BC), rtol=1e-11, atol=1e-14)


def test_infomax_is_mean_entropy_less_the_marginals_where_the_batch_is_the_marginal():
    logits_BC = _logits(6, 7)
    m_C = update_marginal(_marginal(7), logits_BC, 1.0)
    expected = entropy(logits_BC).mean() - _entropy_of(m_C)
    torch.testing.assert_close(infomax(logits_BC, m_C).mean(), expected)


def test_infomax_is_minus_the_divergence_from_the_marginal_with_its_gradient():
    """∂/∂z_c = −p_c (log(p_c/m_c) − KL(p ‖ m))."""
    logits_BC, m_C = _logits(6, 7), _marginal(7)
    p_BC = torch.softmax(logits_BC, -1)
    divergence_B = (p_BC * (p_BC / m_C).log()).sum(1)
    torch.testing.assert_close(infomax(logits_BC, m_C), -divergence_B)
    expected_BC = -p_BC * ((p_BC / m_C).log() - divergence_B[:, None])
    gradient_BC = _gradient(lambda z: infomax(z, m_C), logits_BC)
    torch.testing.assert_close(gradient_BC, expected_BC, rtol=1e-11, atol=1e-14)


def test_infomax_with_a_uniform_marginal_has_the_gradient_of_entropy():
    logits_BC, uniform_C = _logits(6, 7), torch.full((7,), 1 / 7, dtype=torch.float64)
    gradient_BC = _gradient(lambda z: infomax(z, uniform_C), logits_BC)
    torch.testing.assert_close(gradient_BC, _gradient(entropy, logits_BC), rtol=1e-11, atol=1e-14)


def test_infomax_pushes_towards_the_rarer_of_two_equally_likely_classes():
    logits_BC = torch.zeros(1, 2, dtype=torch.float64)
    gradient_BC = _gradient(lambda z: infomax(z, torch.tensor([0.9, 0.1])), logits_BC)
    assert gradient_BC[0, 0] > 0 > gradient_BC[0, 1]


def test_infomax_treats_the_marginal_as_constant():
    m_C = _marginal(7).requires_grad_(True)
    assert not infomax(_logits(6, 7), m_C).requires_grad


def test_parts_of_a_batch_give_the_marginal_of_the_whole():
    logits_BC, old_C = _logits(6, 7), _marginal(7)
    sum_C = probability_sum(logits_BC[:2]) + probability_sum(logits_BC[2:])
    whole_C = update_marginal(old_C, logits_BC, 0.3)
    torch.testing.assert_close(mix_marginal(old_C, sum_C / 6, 0.3), whole_C, rtol=1e-14, atol=0)
    assert whole_C.sum().item() == pytest.approx(1.0, rel=1e-14)


def test_the_marginals_sum_is_detached_float64():
    sum_C = probability_sum(_logits(6, 7).float().requires_grad_(True))
    assert (sum_C.dtype, sum_C.requires_grad) == (torch.float64, False)


def test_the_first_momenta_make_a_plain_mean_without_the_initial_value():
    means = list(torch.softmax(_logits(4, 7), -1))
    m_C = _marginal(7)
    for step, mean_p_C in enumerate(means, start=1):
        m_C = mix_marginal(m_C, mean_p_C, momentum_at(step, 0.1))
    torch.testing.assert_close(m_C, torch.stack(means).mean(0), rtol=1e-14, atol=0)
    assert [momentum_at(step, 0.1) for step in (9, 10, 11, 500)] == [1 / 9, 0.1, 0.1, 0.1]


@pytest.mark.parametrize("classes", [2, 10, 397])
def test_marginal_entropy_is_log_c_when_uniform_and_zero_when_collapsed(classes):
    uniform_C = torch.full((classes,), 1 / classes, dtype=torch.float64)
    assert marginal_entropy(uniform_C) == pytest.approx(math.log(classes), rel=1e-13)
    assert marginal_entropy(torch.eye(classes)[0]) == 0


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_marginal_entropy_lies_between_the_mean_entropy_and_log_b_above_it(scale):
    logits_BC = _logits(16, 397, scale=scale)
    mean, marginal = float(entropy(logits_BC).mean()), probability_sum(logits_BC) / 16
    assert mean <= marginal_entropy(marginal) <= mean + math.log(16) + 1e-12


_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda z: kl(z, z.detach().flip(-1)),
    "kl at T=1": lambda z: kl(z, z.detach().roll(1, -1), 1.0),
    "kl to a uniform expert": lambda z: kl(z, torch.zeros_like(z)),
    "cross_entropy": lambda z: cross_entropy(z, torch.tensor([2, 0])),
    "infomax": lambda z: infomax(z, torch.tensor([0.5, 0.4, 0.1])),
    "infomax, underflowed": lambda z: infomax(z, torch.tensor([1.0, 0.0, 1e-300]).double()),
    "eata": lambda z: eata_weights(entropy(z), 3) * entropy(z),
}


@pytest.mark.parametrize("loss", _LOSSES.values(), ids=_LOSSES.keys())
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_loss_of_saturated_logits_is_finite_with_a_finite_gradient(loss, size, dtype):
    logits_BC = torch.tensor([[size, 0.0, -size], [-size, -size, 0.0]], dtype=dtype)
    assert torch.isfinite(loss(logits_BC)).all()
    assert torch.isfinite(_gradient(loss, logits_BC)).all()


@pytest.mark.parametrize("loss", _LOSSES.values(), ids=_LOSSES.keys())
def test_every_loss_ignores_a_shift_of_the_logits(loss):
    assert _gradient(loss, _logits(2, 3)).sum(1).abs().max() < 1e-13


def test_eata_weights_by_hand():
    """148 classes: E₀ = 0.4 ln 148 = 1.9989, between the third entropy and the fourth."""
    entropy_B = torch.tensor([0.0, 1.0, 1.998, 1.999, 4.0], dtype=torch.float64)
    limit = 0.4 * math.log(148)
    expected_B = [148**0.4, math.exp(limit - 1.0), math.exp(limit - 1.998), 0.0, 0.0]
    assert eata_weights(entropy_B, 148).tolist() == pytest.approx(expected_B, rel=1e-12)


def test_eata_keeps_nothing_at_the_limit_and_all_below_a_higher_one():
    entropy_B = torch.tensor([0.5 * math.log(10)], dtype=torch.float64)
    assert eata_weights(entropy_B, 10, fraction=0.5).tolist() == [0.0]
    assert eata_weights(entropy_B, 10, fraction=1.0).tolist() == pytest.approx([math.sqrt(10)])


def test_eata_weights_are_constants_to_the_gradient():
    logits_BC = _logits(6, 7).requires_grad_(True)
    assert not eata_weights(entropy(logits_BC), 7).requires_grad


@pytest.mark.parametrize("classes", [2, 10, 397])
def test_the_scaled_entropy_of_uniform_logits_is_one(classes):
    uniform_BC = torch.zeros(1, classes, dtype=torch.float64)
    assert task_scale(classes, True) * float(entropy(uniform_BC)) == pytest.approx(1.0, rel=1e-13)
    assert task_scale(classes, False) == 1.0


def test_a_task_of_one_class_needs_no_scale():
    assert task_scale(1, True) == 1.0
