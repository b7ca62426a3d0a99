"""RegMean's closed form against least squares, and the effect of its ridge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from raymerge.merging.regmean import RegMeanSum, shrink

TASKS, ROWS, INPUTS, OUTPUTS = 3, 50, 6, 4


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INPUTS_KNI = _normal(TASKS, ROWS, INPUTS) @ _normal(TASKS, INPUTS, INPUTS, seed=1)
WEIGHTS_KIO = _normal(TASKS, INPUTS, OUTPUTS, seed=2)


def _merged(
    inputs_KNI: Tensor, weights_KIO: Tensor, alpha: float = 0.95, ridge: float = 1e-6
) -> Tensor:
    total = RegMeanSum(*weights_KIO.shape[1:], alpha)
    for inputs_NI, weight_IO in zip(inputs_KNI, weights_KIO, strict=True):
        total.add(inputs_NI.t() @ inputs_NI / len(inputs_NI), weight_IO)
    return total.solve(ridge)


def test_shrinking_keeps_the_diagonal():
    gram_II = INPUTS_KNI[0].t() @ INPUTS_KNI[0]
    assert torch.equal(shrink(gram_II, 1.0), gram_II)
    assert torch.equal(shrink(gram_II, 0.0), gram_II.diagonal().diag())
    expected_II = 0.3 * gram_II + 0.7 * gram_II.diagonal().diag()
    assert_close(shrink(gram_II, 0.3), expected_II)


def test_without_shrinking_it_is_stacked_least_squares():
    """argmin Σ_k ‖X_k W − X_k W_k‖²: one regression on all tasks' inputs and experts' outputs."""
    outputs_KNO = INPUTS_KNI @ WEIGHTS_KIO
    expected_IO = torch.linalg.lstsq(INPUTS_KNI.flatten(0, 1), outputs_KNO.flatten(0, 1)).solution
    assert_close(_merged(INPUTS_KNI, WEIGHTS_KIO, 1.0, 1e-13), expected_IO)


def test_with_the_diagonal_alone_each_feature_is_a_weighted_mean():
    energy_KI1 = INPUTS_KNI.square().sum(1)[..., None]
    expected_IO = (energy_KI1 * WEIGHTS_KIO).sum(0) / energy_KI1.sum(0)
    assert_close(_merged(INPUTS_KNI, WEIGHTS_KIO, 0.0, 1e-13), expected_IO)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("ridge", [1e-6, 10.0])
def test_a_weight_that_all_experts_share_is_a_fixed_point(alpha, ridge):
    """A large ridge keeps it too, because it pulls towards the mean and not towards zero."""
    same_KIO = WEIGHTS_KIO[:1].expand(TASKS, INPUTS, OUTPUTS)
    assert_close(_merged(INPUTS_KNI, same_KIO, alpha, ridge), WEIGHTS_KIO[0])


def test_one_expert_is_returned():
    assert_close(_merged(INPUTS_KNI[:1], WEIGHTS_KIO[:1]), WEIGHTS_KIO[0])


def test_task_vectors_give_the_merged_task_vector():
    pretrained_IO = _normal(INPUTS, OUTPUTS, seed=3)
    vectors_KIO = WEIGHTS_KIO - pretrained_IO
    assert_close(pretrained_IO + _merged(INPUTS_KNI, vectors_KIO), _merged(INPUTS_KNI, WEIGHTS_KIO))


def test_a_packed_projection_is_three_separate_solves():
    """q, k and v rows of ``in_proj_weight``, which share their input."""
    q, k, v = (_normal(TASKS, INPUTS, OUTPUTS, seed=seed) for seed in (4, 5, 6))
    packed = _merged(INPUTS_KNI, torch.cat([q, k, v], dim=2))
    assert_close(packed, torch.cat([_merged(INPUTS_KNI, part) for part in (q, k, v)], dim=1))


@pytest.mark.parametrize("alpha", [0.0, 0.95, 1.0])
def test_a_feature_that_is_dead_in_all_tasks_gets_the_mean(alpha):
    """The plain inverse does not exist; the other features are as if the dead one were not."""
    inputs_KNI = INPUTS_KNI.clone()
    inputs_KNI[..., 2] = 0.0
    alive = [i for i in range(INPUTS) if i != 2]
    merged_IO = _merged(inputs_KNI, WEIGHTS_KIO, alpha)
    assert_close(merged_IO[2], WEIGHTS_KIO[:, 2].mean(0))
    rest_IO = _merged(inputs_KNI[..., alive], WEIGHTS_KIO[:, alive], alpha)
    assert_close(merged_IO[alive], rest_IO, rtol=0, atol=1e-4)


def test_a_feature_that_one_task_alone_uses_gets_that_tasks_weight():
    inputs_KNI = INPUTS_KNI.clone()
    inputs_KNI[1:, :, 2] = 0.0
    assert_close(_merged(inputs_KNI, WEIGHTS_KIO, 0.0, 1e-13)[2], WEIGHTS_KIO[0, 2])


def test_where_every_feature_is_dead_the_weights_are_averaged():
    assert_close(_merged(torch.zeros(TASKS, ROWS, INPUTS), WEIGHTS_KIO), WEIGHTS_KIO.mean(0))


def test_fewer_tokens_than_features_summed_in_float32():
    """Rounding leaves negative eigenvalues larger than the ridge, which grows beyond them."""
    inputs_KNI, weights_KIO = _normal(TASKS, 4, 96).float(), _normal(TASKS, 96, OUTPUTS, seed=1)
    grams_KII = inputs_KNI.mT @ inputs_KNI / 4
    assert torch.linalg.eigvalsh(grams_KII.double().sum(0))[0] < -1e-8
    merged_IO = _merged(inputs_KNI, weights_KIO, 1.0, 1e-12)
    exact_IO = _merged(inputs_KNI.double(), weights_KIO, 1.0, 1e-12)
    assert_close(merged_IO, exact_IO, rtol=0, atol=0.05)


def test_the_order_of_the_tasks_does_not_matter():
    order = [2, 0, 1]
    assert_close(_merged(INPUTS_KNI[order], WEIGHTS_KIO[order]), _merged(INPUTS_KNI, WEIGHTS_KIO))


def test_larger_inputs_weigh_more():
    """Inputs times s weigh a task s² times; in the limit it is the only one."""
    scale_K = torch.tensor([1e4, 1.0, 1.0], dtype=torch.float64)
    scaled_KNI = scale_K[:, None, None] * INPUTS_KNI
    assert_close(_merged(scaled_KNI, WEIGHTS_KIO), WEIGHTS_KIO[0], rtol=0, atol=1e-4)
    twice = _merged(INPUTS_KNI * (2.0**0.5), WEIGHTS_KIO)
    assert_close(twice, _merged(INPUTS_KNI, WEIGHTS_KIO))
    repeated = [0, 0, 1, 2]  # a repeated task equals one with √2 times the inputs
    scale_K = torch.tensor([2.0**0.5, 1.0, 1.0], dtype=torch.float64)
    assert_close(
        _merged(INPUTS_KNI[repeated], WEIGHTS_KIO[repeated], ridge=1e-13),
        _merged(scale_K[:, None, None] * INPUTS_KNI, WEIGHTS_KIO, ridge=1e-13),
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_overflown_gram_is_refused(value):
    inputs_KNI = INPUTS_KNI.clone()
    inputs_KNI[1, 0, 0] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        _merged(inputs_KNI, WEIGHTS_KIO)
