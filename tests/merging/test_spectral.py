"""TSV-Merge, Iso-C and Iso-CTS: properties of their singular values and vectors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from raymerge.merging.spectral import iso_c, iso_cts, tsv

SHAPES = [(12, 12), (9, 20), (20, 9)]
BASES = [tsv, iso_cts]
METHODS = [*BASES, iso_c]


def _matrices(tasks: int, shape: tuple[int, int], rank: int | None = None, seed: int = 0) -> Tensor:
    """Return random matrices of full rank, or of ``rank``, without shared directions."""
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(tasks, *shape, generator=generator)
    left, right = (torch.randn(tasks, size, rank, generator=generator) for size in shape)
    return left @ right.mT


def _orthogonal_tasks(tasks: int, shape: tuple[int, int], rank: int, seed: int = 0) -> Tensor:
    """Tasks of that rank whose row spaces, and column spaces, are orthogonal to each other."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, tasks * rank, generator=generator))[0] for size in shape
    )
    cores = torch.randn(tasks, rank, rank, generator=generator)
    parts = zip(left.split(rank, 1), cores, right.split(rank, 1), strict=True)
    return torch.stack([u @ core @ v.T for u, core, v in parts])


def _merged(method: Callable[[Tensor], Tensor], matrices_KMN: Tensor) -> Tensor:
    out = method(matrices_KMN)
    return out if out.dim() == 2 else out.sum(0)


def _close(actual: Tensor, expected: Tensor, rtol: float = 2e-5) -> None:
    """Compare relative to the largest entry, which limits the accuracy of singular vectors."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * float(expected.abs().max()))


# --- all three ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", BASES)
def test_a_basis_has_the_tasks_shape_and_dtype(method, shape):
    basis_KMN = method(_matrices(3, shape))
    assert (basis_KMN.shape, basis_KMN.dtype) == ((3, *shape), torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", BASES)
def test_permuting_the_tasks_permutes_the_basis_and_leaves_the_sum(method, shape):
    matrices_KMN, order = _matrices(4, shape), [2, 0, 3, 1]
    basis_KMN, permuted_KMN = method(matrices_KMN), method(matrices_KMN[order])
    _close(permuted_KMN, basis_KMN[order])
    _close(permuted_KMN.sum(0), basis_KMN.sum(0))


@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e6])
@pytest.mark.parametrize("method", METHODS)
def test_scaling_all_tasks_scales_the_result(method, scale):
    matrices_KMN = _matrices(3, (9, 14))
    _close(method(scale * matrices_KMN), scale * method(matrices_KMN))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [tsv, iso_c])
def test_transposing_the_tasks_transposes_the_result(method, shape):
    matrices_KMN = _matrices(3, shape)
    _close(method(matrices_KMN.mT), method(matrices_KMN).mT)


@pytest.mark.parametrize("method", METHODS)
def test_rotating_inputs_and_outputs_rotates_the_result(method):
    """The methods do not depend on the coordinates."""
    matrices_KMN = _matrices(3, (9, 14))
    left_MM = torch.linalg.qr(_matrices(1, (9, 9), seed=1)[0])[0]
    right_NN = torch.linalg.qr(_matrices(1, (14, 14), seed=2)[0])[0]
    _close(method(left_MM @ matrices_KMN @ right_NN), left_MM @ method(matrices_KMN) @ right_NN)


@pytest.mark.parametrize("tasks", [1, 3, 30])
@pytest.mark.parametrize("method", METHODS)
def test_tasks_that_did_not_move_merge_to_zero(method, tasks):
    assert not method(torch.zeros(tasks, 6, 8)).any()


@pytest.mark.parametrize("method", METHODS)
def test_the_input_is_left_alone(method):
    matrices_KMN = _matrices(3, (6, 8))
    before_KMN = matrices_KMN.clone()
    method(matrices_KMN)
    assert torch.equal(matrices_KMN, before_KMN)


@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("tasks", [1, 2, 5, 11])
@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_any_shape_rank_and_number_of_tasks_gives_numbers(method, shape, tasks, rank):
    assert method(_matrices(tasks, shape, rank)).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_an_svd_that_does_not_converge_in_float32_is_repeated_in_float64(method, monkeypatch):
    svd = torch.linalg.svd

    def only_float64(matrix: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(matrix, full_matrices=full_matrices)

    matrices_KMN = _matrices(3, (9, 14))
    expected = method(matrices_KMN)
    monkeypatch.setattr(torch.linalg, "svd", only_float64)
    actual = method(matrices_KMN)
    assert actual.dtype == torch.float32
    _close(actual, expected)


# --- TSV-Merge ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_of_tasks_in_orthogonal_spaces_is_each_task(shape, rank):
    """The rank of each task is at most r/K, so the sum is that of the tasks."""
    matrices_KMN = _orthogonal_tasks(3, shape, rank)
    _close(tsv(matrices_KMN), matrices_KMN)
    _close(tsv(matrices_KMN).sum(0), matrices_KMN.sum(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_of_one_task_is_that_task(shape):
    matrices_1MN = _matrices(1, shape)
    _close(tsv(matrices_1MN), matrices_1MN)


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_keeps_the_top_singular_values_of_every_task(shape):
    """Its singular vectors are orthonormal, so its values are the tasks' own."""
    matrices_KMN = _matrices(3, shape)
    keep = min(shape) // 3
    kept = torch.linalg.svdvals(matrices_KMN)[:, :keep].flatten().sort(descending=True).values
    _close(torch.linalg.svdvals(tsv(matrices_KMN).sum(0))[: len(kept)], kept)


def test_tsv_bases_are_orthogonal_to_each_other():
    basis_KMN = tsv(_matrices(3, (12, 15)))
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert (basis_KMN[i].T @ basis_KMN[j]).abs().max() < 1e-4
        assert (basis_KMN[i] @ basis_KMN[j].T).abs().max() < 1e-4


def test_tsv_uses_the_nearest_orthonormal_vectors():
    """Two rank-one tasks at angle φ: each left vector turns by (90° − φ)/2."""
    angle, right_N = torch.tensor(1.0), torch.eye(4)
    left_KM = torch.stack(
        [torch.tensor([1.0, 0, 0, 0]), torch.tensor([angle.cos(), angle.sin(), 0, 0])]
    )
    matrices_KMN = left_KM[:, :, None] * right_N[:2, None, :]
    turn = (torch.pi / 2 - angle) / 2
    turned_KM = torch.tensor(
        [[turn.cos(), -turn.sin(), 0, 0], [(angle + turn).cos(), (angle + turn).sin(), 0, 0]]
    )
    _close(tsv(matrices_KMN), turned_KM[:, :, None] * right_N[:2, None, :])


def test_tsv_of_a_task_twice_is_that_task_once():
    """The two share their directions, each with 1/√2 of either vector."""
    matrix_MN = _matrices(1, (8, 10), rank=3)[0]
    _close(tsv(torch.stack([matrix_MN, matrix_MN])), torch.stack([matrix_MN, matrix_MN]) / 2)


def test_a_task_that_did_not_move_does_not_change_tsv():
    matrices_KMN = _orthogonal_tasks(2, (12, 12), rank=3)
    with_zero = tsv(torch.stack([matrices_KMN[0], torch.zeros(12, 12), matrices_KMN[1]]))
    assert not with_zero[1].any()
    _close(with_zero[[0, 2]], matrices_KMN)


# --- Iso-C -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_has_equal_singular_values_the_mean_of_the_sums(shape):
    matrices_KMN = _matrices(4, shape)
    values_r = torch.linalg.svdvals(matrices_KMN.sum(0))
    _close(torch.linalg.svdvals(iso_c(matrices_KMN)), values_r.mean().expand_as(values_r))


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_keeps_the_nuclear_norm_and_the_singular_vectors(shape):
    """⟨ΣT, Iso-C⟩ = mean·Σσ only with ΣT's own pairs of vectors."""
    matrices_KMN = _matrices(4, shape)
    total_MN, merged_MN = matrices_KMN.sum(0), iso_c(matrices_KMN)
    values_r = torch.linalg.svdvals(total_MN)
    _close((total_MN * merged_MN).sum(), values_r.mean() * values_r.sum())


def test_iso_c_is_a_fixed_point():
    merged_MN = iso_c(_matrices(3, (9, 14)))
    _close(iso_c(merged_MN[None]), merged_MN)


def test_iso_c_of_low_rank_stays_in_its_directions():
    """Directions that an SVD chooses freely get zero; the others get the mean."""
    matrices_KMN = _matrices(1, (12, 15), rank=2)
    values_r = torch.linalg.svdvals(matrices_KMN[0])
    expected_r = torch.zeros(12)
    expected_r[:2] = values_r[:2].mean()
    _close(torch.linalg.svdvals(iso_c(matrices_KMN)), expected_r)


def test_tasks_that_cancel_to_rounding_merge_to_zero():
    first, second = _matrices(2, (8, 8))
    assert not iso_c(torch.stack([first, second, -(first + second)])).any()


# --- Iso-CTS -----------------------------------------------------------------------------------


def _literal_iso_cts(matrices_KMN: Tensor, common_fraction: float) -> Tensor:
    """Return the merged matrix by the paper's algorithm and its released code, in float64."""
    matrices_KMN = matrices_KMN.double()
    tasks, rank = len(matrices_KMN), min(matrices_KMN.shape[1:])
    specific = round((rank - int(rank * common_fraction)) / tasks)
    common = rank - specific * tasks
    u, s, vh = torch.linalg.svd(matrices_KMN.sum(0), full_matrices=False)
    us, ss, vs = [u[:, :common]], [s[:common]], [vh[:common]]
    for matrix_MN in matrices_KMN:
        rest_MN = matrix_MN - us[0] @ us[0].T @ matrix_MN
        u, s, vh = torch.linalg.svd(rest_MN, full_matrices=False)
        us.append(u[:, :specific])
        ss.append(s[:specific])
        vs.append(vh[:specific])
    p, _, q = torch.linalg.svd(torch.cat(us, 1), full_matrices=False)
    x, _, y = torch.linalg.svd(torch.cat(vs), full_matrices=False)
    return (torch.cat(ss).mean() * p @ q @ x @ y).float()


@pytest.mark.parametrize("common_fraction", [0.0, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_iso_cts_is_the_literal_algorithm(shape, common_fraction):
    matrices_KMN = _matrices(3, shape)
    expected_MN = _literal_iso_cts(matrices_KMN, common_fraction)
    _close(iso_cts(matrices_KMN, common_fraction).sum(0), expected_MN)


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_cts_all_common_is_iso_c_shared_equally(shape):
    matrices_KMN = _matrices(4, shape)
    basis_KMN = iso_cts(matrices_KMN, common_fraction=1.0)
    _close(basis_KMN.sum(0), iso_c(matrices_KMN))
    assert torch.equal(basis_KMN, basis_KMN[:1].expand(4, -1, -1))


@pytest.mark.parametrize("common_fraction", [0.0, 0.3, 0.8])
def test_iso_cts_of_one_task_is_iso_c(common_fraction):
    """Its specific directions are the rest of its triplets."""
    matrices_1MN = _matrices(1, (9, 14))
    _close(iso_cts(matrices_1MN, common_fraction)[0], iso_c(matrices_1MN))


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_cts_has_equal_singular_values(shape):
    values_r = torch.linalg.svdvals(iso_cts(_matrices(3, shape), 0.5).sum(0))
    _close(values_r, values_r.mean().expand_as(values_r))


def test_tasks_of_iso_cts_differ_only_by_their_specific_directions():
    """12 directions, 3 tasks: half common leaves 2 each, so two bases differ in 4 directions."""
    basis_KMN = iso_cts(_matrices(3, (12, 15)), common_fraction=0.5)
    assert torch.linalg.matrix_rank(basis_KMN[0] - basis_KMN[1], rtol=1e-4) == 4
    assert torch.linalg.matrix_rank(basis_KMN[0], rtol=1e-4) == 6 + 2


def test_iso_cts_gives_everything_to_the_common_space_if_the_rest_does_not_reach_all_tasks():
    """Ten tasks, one direction over: round(1/10) = 0 each."""
    matrices_KMN = _matrices(10, (6, 8))
    _close(iso_cts(matrices_KMN, 0.8).sum(0), iso_c(matrices_KMN))


def test_iso_cts_uses_no_more_directions_than_there_are():
    """round(3/2) = 2 each of 3 is capped at 1 each, and the third is common."""
    matrices_KMN = _matrices(2, (3, 8))
    values_r = torch.linalg.svdvals(iso_cts(matrices_KMN, 0.0).sum(0))
    _close(values_r, values_r.mean().expand_as(values_r))


def test_a_task_within_the_common_space_has_nothing_specific():
    """The projection leaves only its rounding, which is not a direction."""
    large_MN = 10 * _orthogonal_tasks(1, (12, 12), rank=4)[0]
    within_MN = 0.1 * large_MN
    basis_KMN = iso_cts(torch.stack([large_MN, within_MN]), common_fraction=0.5)
    _close(basis_KMN.sum(0), iso_c((large_MN + within_MN)[None]))
    _close(basis_KMN[0], basis_KMN[1])
