"""DARE: the dropped entries are random, seeded and independent of how the vector is cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raymerge.merging.dare import Dare, drop_and_rescale
from raymerge.merging.layout import CELL

NAMES = ("sun397", "cars", "dtd")
COLUMNS = 150 * CELL + 77


def _vectors(columns: int = COLUMNS) -> Tensor:
    return torch.randn(len(NAMES), columns, generator=torch.Generator().manual_seed(0))


def _drop(vectors_KN: Tensor, start: int = 0, density: float = 0.3, seed: int = 0) -> Tensor:
    return drop_and_rescale(vectors_KN, NAMES, seed, start, density)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_density_one_is_the_identity(dtype):
    vectors_KN = _vectors(3 * CELL).to(dtype)
    assert torch.equal(_drop(vectors_KN, density=1.0), vectors_KN)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.9])
def test_kept_entries_are_x_over_density_and_the_rest_zero(density):
    vectors_KN = _vectors(20 * CELL)
    before_KN = vectors_KN.clone()
    kept_KN = _drop(vectors_KN, density=density)
    assert torch.equal(kept_KN, torch.where(kept_KN != 0, vectors_KN / density, 0.0))
    assert torch.equal(vectors_KN, before_KN)


@pytest.mark.parametrize("cells", [1, 7, 64, 100])
def test_cutting_at_cells_gives_the_same_bits(cells):
    """Blocks inside are of 64 cells: the cuts lie on, before and after their edges."""
    vectors_KN = _vectors()
    parts = vectors_KN.split(cells * CELL, 1)
    pieces = [_drop(part, start=i * cells * CELL) for i, part in enumerate(parts)]
    assert torch.equal(torch.cat(pieces, 1), _drop(vectors_KN))


def test_far_positions_have_masks_of_their_own():
    ones_KN = torch.ones(3, CELL)
    near, far = _drop(ones_KN), _drop(ones_KN, start=(1 << 33) * CELL)
    assert 0.5 < ((near == 0) == (far == 0)).double().mean() < 0.66  # 0.3² + 0.7² if independent


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.99])
def test_fraction_kept_is_the_density(density):
    kept_K = (_drop(torch.ones(3, COLUMNS), density=density) != 0).double().mean(1)
    error = math.sqrt(density * (1 - density) / COLUMNS)
    assert ((kept_K - density).abs() < 5 * error).all()


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_the_expectation_is_the_original(density):
    """Over seeds, entry by entry: E = x with variance x²(1 − ρ)/ρ."""
    vectors_KN, seeds = _vectors(CELL), 400
    mean_KN = sum(_drop(vectors_KN, density=density, seed=seed) for seed in range(seeds)) / seeds
    z_KN = (mean_KN - vectors_KN) / vectors_KN.abs() / math.sqrt((1 - density) / density / seeds)
    assert z_KN.abs().max() < 6
    assert abs(z_KN.mean()) < 5 / math.sqrt(z_KN.numel())
    assert z_KN.std() == pytest.approx(1, abs=0.05)


def test_tasks_drop_independently():
    kept_KN = (_drop(torch.ones(3, COLUMNS), density=0.5) != 0).double()
    correlation_KK = torch.corrcoef(kept_KN) - torch.eye(3)
    assert correlation_KK.abs().max() < 5 / math.sqrt(COLUMNS)


def test_neighbouring_columns_drop_independently():
    kept_N = (_drop(torch.ones(3, COLUMNS), density=0.5) != 0).double()[0] - 0.5
    for lag in (1, 2, 4, 8, CELL):
        assert abs((kept_N[lag:] * kept_N[:-lag]).mean() / 0.25) < 5 / math.sqrt(COLUMNS)


def test_the_mask_follows_the_name_not_the_order():
    vectors_KN, order = _vectors(5 * CELL), [2, 0, 1]
    names = [NAMES[k] for k in order]
    permuted_KN = drop_and_rescale(vectors_KN[order], names, 0, 0, 0.3)
    assert torch.equal(permuted_KN, _drop(vectors_KN)[order])
    alone_1N = drop_and_rescale(vectors_KN[1:2], NAMES[1:2], 0, 0, 0.3)
    assert torch.equal(alone_1N[0], _drop(vectors_KN)[1])


def test_another_seed_is_another_mask_and_the_same_seed_the_same():
    vectors_KN = _vectors(5 * CELL)
    assert torch.equal(_drop(vectors_KN, seed=1), _drop(vectors_KN, seed=1))
    assert not torch.equal(_drop(vectors_KN, seed=1), _drop(vectors_KN, seed=2))


def test_a_mask_is_the_same_on_every_machine_and_release():
    """A merge can be reproduced from its seed, so these numbers must not change."""
    kept_KN = drop_and_rescale(torch.ones(1, CELL), ("cars",), 7, 3 * CELL, 0.25)
    assert kept_KN[0].nonzero().flatten()[:8].tolist() == [1, 8, 10, 14, 19, 20, 26, 27]


def test_a_smaller_density_keeps_a_subset():
    """One number decides an entry at every density."""
    ones_KN = torch.ones(3, 5 * CELL)
    few_KN, many_KN = (_drop(ones_KN, density=density) != 0 for density in (0.2, 0.6))
    assert not (few_KN & ~many_KN).any()


def test_columns_that_start_no_cell_are_refused():
    with pytest.raises(ValueError, match="columns from 5 do not start a cell of 2048"):
        _drop(torch.ones(3, 10), start=5)


# --- Dare --------------------------------------------------------------------------------------


def test_dare_without_election_is_drop_and_rescale():
    vectors_KN = _vectors(3 * CELL)
    dare = Dare(NAMES, seed=5, density=0.3)
    expected_KN = _drop(vectors_KN, start=4 * CELL, seed=5)
    assert torch.equal(dare.phi(vectors_KN, 4 * CELL), expected_KN)


def test_with_election_the_remaining_entries_have_the_sign_of_the_columns_sum():
    """The sum is that of the dropped and rescaled vectors."""
    vectors_KN = (3 * _vectors(3 * CELL)).round()  # so that columns cancel
    kept_KN = _drop(vectors_KN, density=0.5)
    phi_KN = Dare(NAMES, 0, 0.5, elect_sign=True).phi(vectors_KN, 0)
    assert torch.equal(phi_KN, torch.where(kept_KN * kept_KN.sum(0) > 0, kept_KN, 0.0))
    assert ((kept_KN.sum(0) == 0) & (kept_KN != 0).any(0)).any()


def test_election_gives_the_same_bits_on_any_cut():
    vectors_KN = _vectors(10 * CELL)
    dare = Dare(NAMES, 0, 0.5, elect_sign=True)
    parts = vectors_KN.split(3 * CELL, 1)
    pieces = [dare.phi(part, 3 * CELL * i) for i, part in enumerate(parts)]
    assert torch.equal(torch.cat(pieces, 1), dare.phi(vectors_KN, 0))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, math.nan])
def test_a_density_outside_its_range_is_refused(density):
    with pytest.raises(ValueError, match="density must be above 0"):
        Dare(NAMES, 0, density)


def test_tasks_of_equal_names_are_refused():
    with pytest.raises(ValueError, match="different masks, got a, b, a"):
        Dare(("a", "b", "a"), 0, 0.5)
