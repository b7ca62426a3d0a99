"""Adam on λ equals torch's, and the three clamps do what their names say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from raymerge.merging.optimizer import Adam, AdamState, clamp_gradient

K, L = 3, 4


def _gradients(steps: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.linspace(-6, 4, K * L, dtype=torch.float64).view(K, L)
    return [
        scales * torch.randn(K, L, generator=generator, dtype=torch.float64) for _ in range(steps)
    ]


def _start(value: float = 0.3) -> Tensor:
    return torch.full((K, L), value, dtype=torch.float64)


def _reference(
    start_KL: Tensor,
    gradients: list[Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    after: Callable[[Tensor], None] = lambda lambdas: None,
    **options: object,
) -> list[Tensor]:
    """The trajectory of torch.optim.Adam on a loss that is linear in what the merge sees."""
    lambdas = torch.nn.Parameter(start_KL.clone())
    optimizer = torch.optim.Adam([lambdas], **options)
    out = []
    for gradient_KL in gradients:
        optimizer.zero_grad()
        loss(lambdas, gradient_KL).backward()
        optimizer.step()
        with torch.no_grad():
            after(lambdas)
        out.append(lambdas.detach().clone())
    return out


def _trajectory(adam: Adam, start_KL: Tensor, gradients: list[Tensor]) -> list[AdamState]:
    state, out = AdamState.start(start_KL), []
    for gradient_KL in gradients:
        state = adam.update(state, gradient_KL)
        out.append(state)
    return out


@pytest.mark.parametrize("clamp", ["projected", "forward", "none"])
@pytest.mark.parametrize("lr", [1e-3, 0.02])
def test_the_first_step_moves_every_active_lambda_by_lr_along_the_sign(clamp, lr):
    """The size of the gradient does not matter, as long as it is far above eps."""
    (gradient_KL,) = _gradients(1)
    gradient_KL[0, 0] = 0.0
    after = Adam(lr=lr, eps=1e-16, clamp=clamp).update(AdamState.start(_start()), gradient_KL)
    expected = 0.3 - lr * gradient_KL.sign()
    torch.testing.assert_close(after.lambdas, expected, rtol=0, atol=1e-9)
    assert after.lambdas[0, 0] == 0.3
    assert after.step == 1


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.0)])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_the_whole_trajectory_is_torch_adam(betas, eps):
    gradients = _gradients(200)
    options = {"lr": 0.01, "betas": betas, "eps": eps}
    expected = _reference(_start(), gradients, lambda x, g: (x * g).sum(), **options)
    states = _trajectory(Adam(clamp="none", **options), _start(), gradients)
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours.lambdas, theirs, rtol=1e-12, atol=1e-13)


def test_the_defaults_are_torchs_with_the_papers_rate():
    theirs = torch.optim.Adam([torch.zeros(1)]).defaults
    ours = Adam()
    assert (ours.lr, ours.betas, ours.eps) == (theirs["lr"], theirs["betas"], theirs["eps"])
    assert theirs["weight_decay"] == 0


def test_projected_is_torch_adam_followed_by_clamping_the_parameter():
    gradients = _gradients(300)
    expected = _reference(
        _start(0.5), gradients, lambda x, g: (x * g).sum(), lambda x: x.clamp_(0, 1), lr=0.1
    )
    states = _trajectory(Adam(lr=0.1, clamp="projected"), _start(0.5), gradients)
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours.lambdas, theirs, rtol=1e-12, atol=1e-13)
    walked = torch.stack([s.lambdas for s in states])
    assert walked.min() == 0  # both walls were hit, so the clamp did work
    assert walked.max() == 1


def test_projected_brings_a_start_outside_back_into_the_interval():
    start_KL = torch.tensor([[-0.5, 1.5]])
    after = Adam(clamp="projected").update(AdamState.start(start_KL), torch.zeros(1, 2))
    assert after.lambdas.tolist() == [[0.0, 1.0]]


def test_projected_leaves_a_wall_as_soon_as_the_gradient_turns():
    adam = Adam(lr=0.01, betas=(0.0, 0.0), clamp="projected")
    state = AdamState.start(torch.tensor([[0.5]]))
    for _ in range(200):
        state = adam.update(state, torch.tensor([[1.0]], dtype=torch.float64))
    assert float(state.lambdas) == 0.0
    state = adam.update(state, torch.tensor([[-1.0]], dtype=torch.float64))
    assert float(state.lambdas) == pytest.approx(0.01, rel=1e-6)


def test_forward_clamp_gradient_is_one_on_the_closed_interval_only():
    lambdas = torch.tensor([[-0.1, 0.0, 0.5, 1.0, 1.1]], dtype=torch.float64)
    assert clamp_gradient(lambdas).tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]


def test_forward_is_torch_adam_through_a_clamp_in_the_forward_pass():
    gradients = _gradients(300, seed=3)
    expected = _reference(_start(0.5), gradients, lambda x, g: (x.clamp(0, 1) * g).sum(), lr=0.05)
    states = _trajectory(Adam(lr=0.05, clamp="forward"), _start(0.5), gradients)
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours.lambdas, theirs, rtol=1e-12, atol=1e-13)
    walked = torch.stack([s.lambdas for s in states])
    assert walked.min() < 0
    assert walked.max() > 1  # the raw value is not projected


def test_forward_lambda_outside_is_stuck_once_its_moments_are_spent():
    """In the released code no gradient reaches a λ below 0, so it never comes back."""
    adam = Adam(lr=0.05, betas=(0.0, 0.0), clamp="forward")
    state = AdamState.start(torch.tensor([[-0.1]]))
    for _ in range(50):
        state = adam.update(state, torch.tensor([[-1.0]], dtype=torch.float64))
    assert float(state.lambdas) == pytest.approx(-0.1, abs=1e-7)


@pytest.mark.parametrize(
    ("clamp", "seen"),
    [
        ("forward", [0.0, 0.0, 0.5, 1.0, 1.0]),
        ("projected", [-0.1, 0.0, 0.5, 1.0, 1.1]),
        ("none", [-0.1, 0.0, 0.5, 1.0, 1.1]),
    ],
)
def test_the_effective_lambdas_of_each_clamp(clamp, seen):
    lambdas = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1], dtype=torch.float64)
    assert Adam(clamp=clamp).effective(lambdas).tolist() == seen


def test_none_leaves_lambda_free_of_the_interval():
    adam = Adam(lr=1.0, clamp="none")
    down = adam.update(AdamState.start(torch.zeros(1, 1)), torch.ones(1, 1))
    up = adam.update(AdamState.start(torch.ones(1, 1)), -torch.ones(1, 1))
    assert float(down.lambdas) == pytest.approx(-1)
    assert float(up.lambdas) == pytest.approx(2)


def test_update_changes_nothing_of_the_old_state():
    adam, (g1, g2) = Adam(), _gradients(2)
    state = adam.update(AdamState.start(_start()), g1)
    before = [t.clone() for t in (state.lambdas, state.mean, state.square)]
    original = g2.clone()
    once, twice = adam.update(state, g2), adam.update(state, g2)
    assert all(
        torch.equal(a, b)
        for a, b in zip((state.lambdas, state.mean, state.square), before, strict=True)
    )
    assert torch.equal(g2, original)
    assert torch.equal(once.lambdas, twice.lambdas)
    assert (state.step, once.step) == (1, 2)


def test_start_is_float64_with_zero_moments():
    state = AdamState.start(torch.full((2, 3), 0.5))
    assert {t.dtype for t in (state.lambdas, state.mean, state.square)} == {torch.float64}
    assert state.lambdas.tolist() == [[0.5] * 3] * 2
    assert state.mean.count_nonzero() == state.square.count_nonzero() == state.step == 0


def test_resuming_from_a_state_is_the_same_as_not_stopping():
    gradients = _gradients(10)
    whole = _trajectory(Adam(), _start(), gradients)
    state = whole[3]
    for gradient_KL in gradients[4:]:
        state = Adam().update(state, gradient_KL)
    assert torch.equal(state.lambdas, whole[-1].lambdas)


def test_the_cosine_schedule_is_torchs():
    start, gradients = _start(0.5), _gradients(12)
    parameter = start.clone().requires_grad_()
    theirs = torch.optim.Adam([parameter], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=12)
    state, ours = AdamState.start(start), Adam(lr=0.02, clamp="none", decay_steps=12)
    for gradient_KL in gradients:
        parameter.grad = gradient_KL.clone()
        theirs.step()
        schedule.step()
        state = ours.update(state, gradient_KL)
        torch.testing.assert_close(state.lambdas, parameter.detach(), rtol=1e-12, atol=1e-14)
    assert ours.rate(12) == 0.0
