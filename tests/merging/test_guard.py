"""The collapse guard: it reports predictions that concentrate on one class, and only those."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raymerge.merging.guard import CollapseGuard, GuardState
from raymerge.merging.objectives import (
    entropy,
    marginal_entropy,
    mix_marginal,
    momentum_at,
    probability_sum,
)

_IMAGES = 16


def _observe(
    guard: CollapseGuard, entropy_TK: Tensor, marginal_TK: Tensor
) -> tuple[GuardState, list[list[int]]]:
    state, verdicts = GuardState.start(entropy_TK.shape[1]), []
    for entropy_K, marginal_K in zip(entropy_TK, marginal_TK, strict=True):
        state, collapsing = guard.observe(state, entropy_K, marginal_K)
        verdicts.append(collapsing)
    return state, verdicts


def _first(verdicts: list[list[int]], task: int = 0) -> int | None:
    """The first step, from 1, at which the task is called collapsing."""
    return next((t for t, tasks in enumerate(verdicts, start=1) if task in tasks), None)


def _constant(steps: int, *values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).expand(steps, -1).clone()


def _adapt(classes: int, *, collapse: bool, steps: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Simulated batches of random labels: E H(p), H(m) of the averaged p, H of each batch: (T, 1).

    Healthy: the logit of the right class grows. Collapse: that of class 0 does, for all images.
    """
    generator = torch.Generator().manual_seed(0)
    m_C, rows = torch.full((classes,), 1 / classes, dtype=torch.float64), []
    for step in range(1, steps + 1):
        label_B = torch.randint(classes, (_IMAGES,), generator=generator)
        target_B = torch.zeros_like(label_B) if collapse else label_B
        one_hot_BC = torch.nn.functional.one_hot(target_B, classes).double()
        noise_BC = torch.randn(_IMAGES, classes, generator=generator, dtype=torch.float64)
        logits_BC = noise_BC + 15 * step / steps * one_hot_BC
        mean_p_C = probability_sum(logits_BC) / _IMAGES
        m_C = mix_marginal(m_C, mean_p_C, momentum_at(step, 0.1))
        mean = float(entropy(logits_BC).mean())
        rows.append([mean, marginal_entropy(m_C), marginal_entropy(mean_p_C)])
    entropy_T, averaged_T, batch_T = torch.tensor(rows, dtype=torch.float64).T
    return entropy_T[:, None], averaged_T[:, None], batch_T[:, None]


@pytest.mark.parametrize("classes", [2, 10, 397])
def test_a_collapse_is_reported_before_the_end_and_from_then_on(classes):
    entropy_T1, marginal_T1, _ = _adapt(classes, collapse=True)
    _, verdicts = _observe(CollapseGuard(), entropy_T1, marginal_T1)
    first = _first(verdicts)
    assert first is not None
    assert 10 < first < 190, first
    assert all(verdict == [0] for verdict in verdicts[first - 1 :])


@pytest.mark.parametrize("classes", [2, 10, 397])
def test_nothing_is_reported_where_the_entropy_falls_and_the_marginal_stays(classes):
    entropy_T1, marginal_T1, _ = _adapt(classes, collapse=False)
    assert entropy_T1[-1] < 0.1 * entropy_T1[0]
    state, verdicts = _observe(CollapseGuard(), entropy_T1, marginal_T1)
    assert not any(verdicts), _first(verdicts)
    assert state.marginal > 0.8 * state.start_marginal


def test_single_batches_of_few_images_would_warn_of_a_healthy_task():
    """So the marginal is averaged over steps: 16 images fill at most 16 of 397 classes."""
    entropy_T1, _, batch_T1 = _adapt(397, collapse=False)
    assert _first(_observe(CollapseGuard(), entropy_T1, batch_T1)[1]) is not None


def test_the_values_after_the_warm_up_are_the_mean_then_the_moving_average():
    values_T1 = torch.arange(1.0, 13.0, dtype=torch.float64)[:, None]
    state, _ = _observe(CollapseGuard(), values_T1, 2 * values_T1)
    expected = 5.5 + 0.1 * (11 - 5.5)
    expected += 0.1 * (12 - expected)
    assert state.steps == 12
    assert (state.start_entropy.item(), state.start_marginal.item()) == pytest.approx((5.5, 11.0))
    assert (state.entropy.item(), state.marginal.item()) == pytest.approx((expected, 2 * expected))


def test_one_batch_is_not_a_collapse_but_seven_in_a_row_are():
    """0.9⁶ = 0.531 > 0.5 > 0.9⁷ = 0.478."""
    level_TK = _constant(40, math.log(10))
    level_TK[20] = 0.0
    assert not any(_observe(CollapseGuard(), level_TK, level_TK)[1])
    level_TK[20:] = 0.0
    assert _first(_observe(CollapseGuard(), level_TK, level_TK)[1]) == 27


def test_only_collapsing_tasks_are_reported_and_only_while_they_are():
    marginal_TK = _constant(100, 2.0, 2.0, 2.0)
    marginal_TK[20:50, [0, 2]] = 0.1
    entropy_TK = _constant(100, 1.0, 1.0, 1.0)
    entropy_TK[20:] = 0.05
    _, verdicts = _observe(CollapseGuard(), entropy_TK, marginal_TK)
    assert {tuple(tasks) for tasks in verdicts} == {(), (0, 2)}
    assert verdicts[45] == [0, 2]
    assert verdicts[-1] == []


def test_a_marginal_that_falls_without_the_entropy_is_no_collapse():
    marginal_TK = _constant(60, 2.0)
    marginal_TK[20:] = 0.3
    assert not any(_observe(CollapseGuard(), _constant(60, 0.2), marginal_TK)[1])


def test_no_collapse_is_reported_during_the_warm_up():
    falling_TK = torch.linspace(2.0, 0.0, 10, dtype=torch.float64)[:, None]
    guard = CollapseGuard(momentum=1.0)
    assert not any(_observe(guard, falling_TK, falling_TK)[1])


def test_the_scale_of_the_entropies_does_not_matter():
    entropy_T1, marginal_T1, _ = _adapt(10, collapse=True)
    _, verdicts = _observe(CollapseGuard(), entropy_T1, marginal_T1)
    _, scaled = _observe(CollapseGuard(), entropy_T1 / 8, marginal_T1 / 8)
    assert scaled == verdicts


def test_observing_changes_no_state_and_repeats():
    guard = CollapseGuard()
    state, _ = _observe(guard, _constant(15, 1.0, 0.5), _constant(15, 2.0, 2.0))
    before = state.marginal.clone()
    step = torch.tensor([0.1, 0.1]), torch.tensor([0.0, 2.0])
    first, again = guard.observe(state, *step), guard.observe(state, *step)
    assert torch.equal(state.marginal, before)
    assert torch.equal(first[0].marginal, again[0].marginal)
    assert first[1] == again[1]
