"""TIES and Φ against an independent whole-vector TIES."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raymerge.merging.ties import (
    TiesStatistics,
    disjoint,
    elect_sign,
    entries,
    phi,
    trim,
    trim_threshold,
)

T1 = torch.tensor([3.0, -2.0, 1.0, 0.5, 0.1])
T2 = torch.tensor([-1.0, -4.0, 2.0, 0.2, -0.3])


def disjoint_merge(phi_KN, how):
    """TIES's last step, literally: the sum, or the mean over the tasks with an entry."""
    total_N = phi_KN.sum(0)
    return total_N if how == "sum" else total_N / (phi_KN != 0).sum(0).clamp(min=1)


def _threshold(vector: Tensor, density: float) -> float:
    return trim_threshold(lambda: iter([vector]), len(vector), density)


def _vectors(tasks: int = 4, columns: int = 503, seed: int = 0) -> Tensor:
    """Rounded, so that columns cancel to exactly zero and magnitudes repeat."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(tasks, columns, generator=generator)).round() / 4


def _ours(vectors_KN: Tensor, density: float) -> Tensor:
    thresholds_K = torch.tensor([_threshold(row, density) for row in vectors_KN])
    balance = elect_sign(trim(vectors_KN, thresholds_K), 0.0).sum()
    return phi(vectors_KN, thresholds_K, float(balance.sign()))


def _reference_phi(vectors_KN: Tensor, density: float) -> Tensor:
    """TIES in plain Python, entry by entry, from the paper and the released selection rule."""
    trimmed = []
    for row in vectors_KN.tolist():
        magnitudes = sorted(abs(x) for x in row)
        cut = magnitudes[len(row) - math.floor(density * len(row)) - 1]
        trimmed.append([x if abs(x) >= cut else 0.0 for x in row])
    signs = []
    for column in zip(*trimmed, strict=True):
        total = sum(column)
        signs.append((total > 0) - (total < 0))
    majority = (sum(signs) > 0) - (sum(signs) < 0)
    signs = [s or majority for s in signs]
    kept = [
        [
            x if (x > 0 and s > 0) or (x < 0 and s < 0) else 0.0
            for x, s in zip(row, signs, strict=True)
        ]
        for row in trimmed
    ]
    return torch.tensor(kept)


def test_the_example():
    """Density 40 %, the official rule keeps three entries."""
    vectors_KN = torch.stack([T1, T2])
    thresholds_K = torch.tensor([_threshold(T1, 0.4), _threshold(T2, 0.4)])
    assert trim(vectors_KN, thresholds_K).tolist() == [[3, -2, 1, 0, 0], [-1, -4, 2, 0, 0]]
    phi_KN = phi(vectors_KN, thresholds_K, majority=-1.0)
    assert phi_KN.tolist() == [[3, -2, 1, 0, 0], [0, -4, 2, 0, 0]]
    assert disjoint_merge(phi_KN, "sum").tolist() == [3, -6, 3, 0, 0]
    assert disjoint_merge(phi_KN, "mean").tolist() == [3, -3, 1.5, 0, 0]
    for mean, expected in ((False, [3, -6, 3, 0, 0]), (True, [3, -3, 1.5, 0, 0])):
        statistics = TiesStatistics(((1.0,), (1.0,)), mean=mean)
        assert statistics.phi(vectors_KN, 0).sum(0).tolist() == expected


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_phi_is_the_reference_ties(density, tasks):
    vectors_KN = _vectors(tasks)
    assert torch.equal(_ours(vectors_KN, density), _reference_phi(vectors_KN, density))


@pytest.mark.parametrize("density", [0.01, 0.2, 0.4, 0.99])
def test_distinct_magnitudes_keep_floor_density_d_plus_one(density):
    """The (d − ⌊ρd⌋)-th smallest is itself kept."""
    vector = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    kept = trim(vector[None], torch.tensor([_threshold(vector, density)]))
    assert kept.count_nonzero() == math.floor(density * 1000) + 1
    dropped = vector[kept[0] == 0].abs().max()
    assert dropped < kept[kept != 0].abs().min()


def test_density_one_keeps_everything():
    """There the official code crashes."""
    assert _threshold(T1, 1.0) == 0.0
    assert torch.equal(trim(T1[None], torch.tensor([_threshold(T1, 1.0)]))[0], T1)


def test_equal_magnitudes_at_the_threshold_are_all_kept():
    vector = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.1])
    assert _threshold(vector, 0.2) == 1.0
    assert trim(vector[None], torch.tensor([1.0])).tolist() == [[1.0, -1.0, 1.0, 1.0, 0.0]]


def test_a_vector_that_is_mostly_zero_keeps_all_its_entries():
    vector = torch.zeros(100)
    vector[3], vector[70] = 1e-30, -2.0
    assert torch.equal(trim(vector[None], torch.tensor([_threshold(vector, 0.2)]))[0], vector)


def test_one_task_is_trimmed_only():
    vectors_1N = _vectors(tasks=1)
    only_trimmed = trim(vectors_1N, torch.tensor([_threshold(vectors_1N[0], 0.2)]))
    assert torch.equal(_ours(vectors_1N, 0.2), only_trimmed)
    assert torch.equal(disjoint_merge(only_trimmed, "mean"), only_trimmed[0])


def test_permuting_the_tasks_permutes_phi_and_leaves_the_merge():
    vectors_KN, order = _vectors(), [2, 0, 3, 1]
    phi_KN = _ours(vectors_KN, 0.3)
    permuted_KN = _ours(vectors_KN[order], 0.3)
    assert torch.equal(permuted_KN, phi_KN[order])
    for how in ("sum", "mean"):
        assert torch.equal(disjoint_merge(permuted_KN, how), disjoint_merge(phi_KN, how))


@pytest.mark.parametrize(("majority", "kept"), [(1.0, [2.0, 0.0]), (-1.0, [0.0, -2.0])])
def test_a_column_that_cancels_takes_the_majority_sign(majority, kept):
    column_KN = torch.tensor([[2.0], [-2.0]])
    assert elect_sign(column_KN, majority).tolist() == [majority]
    assert disjoint(column_KN, elect_sign(column_KN, majority)).flatten().tolist() == kept


def test_without_any_majority_a_cancelling_column_keeps_nothing():
    """The official code keeps the negative entries there; we document that nothing agrees."""
    column_KN = torch.tensor([[2.0], [-2.0]])
    assert disjoint(column_KN, elect_sign(column_KN, 0.0)).count_nonzero() == 0


def test_phi_agrees_in_sign_in_every_column():
    phi_KN = _ours(_vectors(tasks=8), 0.4)
    assert not ((phi_KN > 0).any(0) & (phi_KN < 0).any(0)).any()
    assert torch.equal(phi_KN.sum(0).sign(), phi_KN.sign().sum(0).sign())


def test_entries_count_the_tasks_that_agree_and_are_at_least_one():
    phi_KN = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, 0.0]])
    assert entries(phi_KN).tolist() == [2, 1, 1]


def test_statistics_give_the_same_phi_on_any_slice():
    """The statistics contain all that a column needs of the whole vectors."""
    vectors_KN = _vectors(tasks=3, columns=90)
    thresholds = tuple((_threshold(row, 0.3), 0.0) for row in vectors_KN)
    statistics = TiesStatistics(thresholds, majority=-1.0)
    whole_KN = statistics.phi(vectors_KN, tensor=0)
    slices = [statistics.phi(part, tensor=0) for part in vectors_KN.split(13, dim=1)]
    assert torch.equal(torch.cat(slices, 1), whole_KN)
    assert torch.equal(
        whole_KN, phi(vectors_KN, torch.tensor([row[0] for row in thresholds]), -1.0)
    )


def test_statistics_use_the_threshold_of_their_own_tensor():
    statistics = TiesStatistics(((0.0, 10.0),))
    assert torch.equal(statistics.phi(T1[None], tensor=0)[0], T1)
    assert statistics.phi(T1[None], tensor=1).count_nonzero() == 0


def test_with_mean_the_sum_of_phi_is_the_disjoint_mean():
    vectors_KN = _vectors(tasks=4)
    thresholds = tuple((_threshold(row, 0.3),) for row in vectors_KN)
    sums_KN = TiesStatistics(thresholds, 1.0).phi(vectors_KN, 0)
    means_KN = TiesStatistics(thresholds, 1.0, mean=True).phi(vectors_KN, 0)
    torch.testing.assert_close(means_KN.sum(0), disjoint_merge(sums_KN, "mean"))
    columns = zip(sums_KN.t().tolist(), means_KN.sum(0).tolist(), strict=True)
    for column, mean in columns:
        kept = [x for x in column if x]
        assert mean == pytest.approx(sum(kept) / len(kept) if kept else 0.0, abs=1e-6)


# --- the one-pass formulas are the definitions -------------------------------------------------

EDGES = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 0.5, -0.5, 0.49999997, 0.50000006, -3.0, 3e38])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.0, 1e-45, 0.5, -0.0, 3.0, 3e38, torch.inf])
def test_trim_is_its_definition_at_ties_and_zeros_too(threshold, dtype):
    vectors_KN = EDGES.to(dtype).repeat(2, 1)
    thresholds_K = torch.tensor([threshold, 0.25], dtype=dtype)
    before = vectors_KN.clone()
    literal = torch.where(vectors_KN.abs() >= thresholds_K[:, None], vectors_KN, 0)
    trimmed_KN = trim(vectors_KN, thresholds_K)
    assert trimmed_KN.dtype == dtype
    assert torch.equal(trimmed_KN, literal)
    assert torch.equal(vectors_KN, before)


def test_trim_separates_float64_neighbours_of_the_threshold():
    at = torch.tensor(0.1, dtype=torch.float64)
    below, above = (torch.nextafter(at, at + side) for side in (-1, 1))
    row = torch.stack([below, at, above, -below, -at])
    assert (trim(row[None], at[None]) != 0).tolist() == [[False, True, True, False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_disjoint_is_its_definition_for_every_pair_of_signs(dtype):
    sign_N = torch.tensor([-1.0, -0.0, 0.0, 1.0], dtype=dtype).repeat_interleave(len(EDGES))
    entries_KN = EDGES.to(dtype).repeat(4)[None]
    literal = torch.where(entries_KN.sign() * sign_N > 0, entries_KN, 0)
    assert torch.equal(disjoint(entries_KN, sign_N), literal)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_phi_in_float64_is_the_reference(density):
    vectors_KN = _vectors(3).double()
    thresholds_K = torch.tensor([_threshold(row, density) for row in vectors_KN]).double()
    expected = _reference_phi(vectors_KN, min(density, 0.9999)).double()
    majority = float(elect_sign(trim(vectors_KN, thresholds_K), 0.0).sum().sign())
    assert torch.equal(phi(vectors_KN, thresholds_K, majority), expected)
