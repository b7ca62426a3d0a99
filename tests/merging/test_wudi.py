"""WUDI-Merging: its objective, its minima, its first step and the flow in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raymerge.merging.wudi import aswudi, quadratic, swudi, wudi


def _matrices(tasks: int = 4, shape: tuple[int, int] = (9, 14), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, *shape, generator=generator, dtype=torch.float64)


def _disturbance(merged_MN: Tensor, matrices_KMN: Tensor) -> Tensor:
    """The objective, literally: Σ_k ‖(m − T_k)·T_kᵀ‖² / ‖T_k‖²."""
    terms = [
        ((merged_MN - matrix_MN) @ matrix_MN.T).square().sum() / matrix_MN.square().sum()
        for matrix_MN in matrices_KMN
    ]
    return torch.stack(terms).sum()


def _autograd(merged_MN: Tensor, matrices_KMN: Tensor) -> Tensor:
    merged_MN = merged_MN.clone().requires_grad_(True)
    return torch.autograd.grad(_disturbance(merged_MN, matrices_KMN), merged_MN)[0]


def _separate_inputs() -> Tensor:
    """Three tasks that read disjoint inputs: T_j·T_kᵀ is exactly zero."""
    matrices_KMN = _matrices(3, (7, 12)).float()
    for k, matrix_MN in enumerate(matrices_KMN):
        inputs = torch.arange(12) // 4 != k
        matrix_MN[:, inputs] = 0
    return matrices_KMN


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (1, 5), (5, 1)])
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_the_gradient_is_autograd_of_the_definition(tasks, shape):
    matrices_KMN = _matrices(tasks, shape)
    at_MN = _matrices(1, shape, seed=1)[0]
    curvature_NN, pull_MN = quadratic(matrices_KMN)
    gradient_MN = (at_MN - matrices_KMN.sum(0)) @ curvature_NN + pull_MN
    expected_MN = _autograd(at_MN, matrices_KMN)
    torch.testing.assert_close(gradient_MN, expected_MN, rtol=1e-12, atol=1e-12)


def test_the_gradient_at_the_sum_is_the_pull():
    matrices_KMN = _matrices()
    expected_MN = _autograd(matrices_KMN.sum(0), matrices_KMN)
    torch.testing.assert_close(quadratic(matrices_KMN)[1], expected_MN, rtol=1e-12, atol=1e-12)


def test_the_disturbance_falls_and_goes_on_falling():
    matrices_KMN = _matrices()
    losses = [
        float(_disturbance(wudi(matrices_KMN, iterations, lr=1e-3), matrices_KMN))
        for iterations in (0, 1, 10, 100, 300)
    ]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(losses)


def test_many_iterations_reach_the_least_squares_solution():
    """m·A = B: the gradient is zero there, and the disturbance is as small as it can be."""
    matrices_KMN = _matrices(3, (6, 8))
    curvature_NN, pull_MN = quadratic(matrices_KMN)
    best_MN = matrices_KMN.sum(0) - pull_MN @ torch.linalg.inv(curvature_NN)
    merged_MN = wudi(matrices_KMN, iterations=3000, lr=1e-2)
    torch.testing.assert_close(merged_MN, best_MN, rtol=0, atol=1e-3)
    assert _autograd(best_MN, matrices_KMN).abs().max() < 1e-12


def test_wudi_is_torchs_adam_on_the_definition():
    matrices_KMN = _matrices()
    merged_MN = matrices_KMN.sum(0).requires_grad_(True)
    adam = torch.optim.Adam([merged_MN], lr=1e-3)
    for _ in range(50):
        merged_MN.grad = _autograd(merged_MN.detach(), matrices_KMN)
        adam.step()
    ours_MN = wudi(matrices_KMN, iterations=50, lr=1e-3)
    torch.testing.assert_close(ours_MN, merged_MN.detach(), rtol=0, atol=1e-10)


def test_no_iterations_is_task_arithmetic():
    matrices_KMN = _matrices()
    assert torch.equal(wudi(matrices_KMN, iterations=0), matrices_KMN.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_task_stays_where_it_is_bit_for_bit(dtype):
    matrices_1MN = _matrices(1).to(dtype)
    assert torch.equal(wudi(matrices_1MN), matrices_1MN[0])


def test_tasks_that_read_separate_inputs_do_not_disturb_each_other():
    """Their sum is already a minimum without disturbance, so it stays bit for bit."""
    matrices_KMN = _separate_inputs()
    assert _disturbance(matrices_KMN.sum(0), matrices_KMN) == 0
    assert torch.equal(wudi(matrices_KMN), matrices_KMN.sum(0))


def test_the_first_step_moves_every_entry_by_lr():
    """Every entry moves against the sign of its gradient."""
    matrices_KMN = _matrices()
    gradient_MN = _autograd(matrices_KMN.sum(0), matrices_KMN)
    assert gradient_MN.abs().min() > 1e-3
    moved_MN = wudi(matrices_KMN, iterations=1, lr=1e-4) - matrices_KMN.sum(0)
    torch.testing.assert_close(moved_MN, -1e-4 * gradient_MN.sign(), rtol=2e-5, atol=0)


def test_tasks_that_did_not_move_are_left_out():
    matrices_KMN = _matrices(3)
    with_zero_KMN = torch.cat([matrices_KMN, torch.zeros(1, 9, 14, dtype=torch.float64)])
    assert torch.equal(wudi(with_zero_KMN), wudi(matrices_KMN))
    assert not wudi(torch.zeros(3, 4, 5)).any()


def test_the_order_of_tasks_does_not_matter():
    matrices_KMN = _matrices()
    permuted_MN = wudi(matrices_KMN[[2, 0, 3, 1]], lr=1e-3)
    torch.testing.assert_close(permuted_MN, wudi(matrices_KMN, lr=1e-3), rtol=0, atol=1e-12)


def test_rotating_the_outputs_of_the_objective_changes_nothing():
    """The objective uses only norms of the outputs, so the minimiser rotates with them."""
    matrices_KMN = _matrices(3, (6, 8))
    rotation_MM = torch.linalg.qr(_matrices(1, (6, 6), seed=1)[0])[0]
    curvature_NN, pull_MN = quadratic(matrices_KMN)
    rotated_NN, turned_MN = quadratic(rotation_MM @ matrices_KMN)
    torch.testing.assert_close(rotated_NN, curvature_NN)
    torch.testing.assert_close(turned_MN, rotation_MM @ pull_MN)


def test_float32_in_float32_out_and_the_input_is_left_alone():
    matrices_KMN = _matrices().float()
    before_KMN = matrices_KMN.clone()
    assert wudi(matrices_KMN, iterations=5).dtype == torch.float32
    assert torch.equal(matrices_KMN, before_KMN)


# --- the flow in closed form ---------------------------------------------------------------------


def _flow(matrices_KMN: Tensor, time: float, steps: int) -> Tensor:
    """The gradient's flow dm/dt = Σ_k T_k·C_k − m·C from Σ_k T_k, by steps of Runge and Kutta."""
    merged_MN = matrices_KMN.sum(0)
    rate = time / steps
    slope = lambda at_MN: -0.5 * _autograd(at_MN, matrices_KMN)  # noqa: E731
    for _ in range(steps):
        first_MN = slope(merged_MN)
        second_MN = slope(merged_MN + rate / 2 * first_MN)
        third_MN = slope(merged_MN + rate / 2 * second_MN)
        fourth_MN = slope(merged_MN + rate * third_MN)
        merged_MN = merged_MN + rate / 6 * (first_MN + 2 * second_MN + 2 * third_MN + fourth_MN)
    return merged_MN


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_swudi_is_the_gradients_flow_stopped_in_time(shape):
    matrices_KMN = _matrices(3, shape)
    merged_MN = swudi(matrices_KMN, time=4.0, fraction=1.0).sum(0)
    torch.testing.assert_close(merged_MN, _flow(matrices_KMN, 4.0, 400), rtol=1e-6, atol=1e-8)


def test_swudi_without_a_stop_is_the_minimum_that_wudi_approaches():
    matrices_KMN = _matrices(3, (6, 8))
    merged_MN = swudi(matrices_KMN, time=1e9, fraction=1.0).sum(0)
    assert _autograd(merged_MN, matrices_KMN).abs().max() < 1e-12
    iterated_MN = wudi(matrices_KMN, iterations=3000, lr=1e-2)
    torch.testing.assert_close(merged_MN, iterated_MN, rtol=0, atol=1e-3)


def test_swudi_leaves_the_sum_where_it_does_not_flow():
    """The part of ΣT_k outside the largest eigenvectors stays; inside it is the minimum's."""
    matrices_KMN = _matrices(3, (9, 10))
    curvature_NN, _ = quadratic(matrices_KMN)
    vectors_NN = torch.linalg.eigh(curvature_NN)[1]
    small_N4, large_N6 = vectors_NN.split([4, 6], 1)
    merged_MN = swudi(matrices_KMN, time=1e9, fraction=0.6).sum(0)
    minimum_MN = swudi(matrices_KMN, time=1e9, fraction=1.0).sum(0)
    torch.testing.assert_close(merged_MN @ small_N4, matrices_KMN.sum(0) @ small_N4)
    torch.testing.assert_close(merged_MN @ large_N6, minimum_MN @ large_N6)


def test_aswudi_solves_along_the_effective_number_of_directions():
    """Two tasks with one direction each, of eigenvalue 1: r = (1 + 1)²/2 = 2, so both."""
    matrices_KMN = torch.zeros(2, 3, 5, dtype=torch.float64)
    matrices_KMN[0, 0, 1] = matrices_KMN[1, 2, 4] = 3
    assert torch.equal(aswudi(matrices_KMN).sum(0), matrices_KMN.sum(0))
    one_direction_KMN = matrices_KMN.clone()
    one_direction_KMN[1] = 0
    one_direction_KMN[1, 2, 1] = 1  # both read input 1: the minimum is the tasks' mean there
    merged_MN = aswudi(one_direction_KMN).sum(0)
    assert merged_MN[:, 1].tolist() == pytest.approx([1.5, 0, 0.5])


@pytest.mark.parametrize("method", [swudi, aswudi])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_spectral_basis_of_one_task_is_the_task(method, dtype):
    matrices_1MN = _matrices(1).to(dtype)
    torch.testing.assert_close(method(matrices_1MN), matrices_1MN, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [swudi, aswudi])
def test_spectral_rows_go_with_their_tasks_and_leave_out_those_that_did_not_move(method):
    matrices_KMN = _matrices(3)
    rows_KMN = method(matrices_KMN)
    torch.testing.assert_close(method(matrices_KMN[[2, 0, 1]]), rows_KMN[[2, 0, 1]])
    with_zero_KMN = torch.cat([matrices_KMN, torch.zeros(1, 9, 14, dtype=torch.float64)])
    torch.testing.assert_close(method(with_zero_KMN)[:3], rows_KMN)
    assert not method(with_zero_KMN)[3].any()
    assert not method(torch.zeros(3, 4, 5)).any()


@pytest.mark.parametrize("method", [swudi, aswudi])
def test_rounding_along_empty_directions_is_not_blown_up(method):
    """Adapters of rank 2 that read separate inputs: their sum, though r = 7 of 6 directions."""
    left_KMr = torch.linalg.qr(_matrices(3, (40, 2)))[0]
    right_NR = torch.linalg.qr(_matrices(1, (30, 6))[0])[0]
    matrices_KMN = torch.stack(
        [
            left_Mr @ right_rN
            for left_Mr, right_rN in zip(left_KMr, right_NR.T.split(2), strict=True)
        ]
    ).float()
    merged_MN = method(matrices_KMN).sum(0)
    torch.testing.assert_close(merged_MN, matrices_KMN.sum(0), rtol=0, atol=1e-5)
