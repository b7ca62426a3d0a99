"""Weighted models: the choice of the largest entries, and identities of the sums."""

from __future__ import annotations

import pytest
import torch

from raymerge.merging.layout import CELL
from raymerge.merging.ties import strongest
from raymerge.merging.weighted import (
    EVERYTHING,
    NOTHING,
    Drawn,
    largest,
    linear,
    merge_tasks,
    rescale_factor,
)


@pytest.mark.parametrize("keep", [0, 1, 7, 50, 99, 100])
@pytest.mark.parametrize("parts", [1, 3])
def test_largest_keeps_exactly_so_many_and_of_equal_ones_the_first(keep: int, parts: int) -> None:
    random = torch.Generator().manual_seed(0)
    vector = (
        torch.randint(1, 6, (100,), generator=random) * torch.randn(100, generator=random).sign()
    )
    cut = largest(lambda: vector.chunk(parts), keep, 100)
    order = vector.abs().argsort(descending=True, stable=True)
    expected = torch.zeros(100, dtype=torch.bool)
    expected[order[:keep]] = True
    assert torch.equal(cut.kept(vector, 0), expected)
    pieces = [cut.kept(piece, start) for piece, start in ((vector[:30], 0), (vector[30:], 30))]
    assert torch.equal(torch.cat(pieces), expected)


def test_a_cut_among_zeros_keeps_everything() -> None:
    vector = torch.tensor([0.0, 0.0, 3.0, 0.0])
    assert largest(lambda: [vector], 2, 4) == EVERYTHING
    assert not NOTHING.kept(vector, 0).any()
    assert EVERYTHING.kept(vector, 0).all()


def test_one_model_of_weight_one_is_itself() -> None:
    base, model = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(linear(model[None], [1.0], normalize=True), model)
    for elect in (False, True):
        out = merge_tasks(
            base, (model - base)[None], [1.0], elect=elect, normalize=True, scaling=1.0
        )
        torch.testing.assert_close(out, model)


def test_equal_vectors_are_their_mean_whatever_the_weights() -> None:
    base, vector = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    for elect in (False, True):
        rows = vector.repeat(3, 1)
        out = merge_tasks(base, rows, [0.2, 0.5, 4.0], elect=elect, normalize=True, scaling=1.0)
        torch.testing.assert_close(out, base + vector)


def test_random_entries_do_not_depend_on_how_the_vector_is_cut() -> None:
    drawn, vector = Drawn(3, "one", 0.3), torch.ones(4 * CELL)
    kept = drawn.kept(vector, 0)
    assert 0.25 < kept.float().mean() < 0.35
    for start, stop in ((0, 7), (7, CELL + 1), (CELL + 1, 4 * CELL)):
        assert torch.equal(drawn.kept(vector[start:stop], start), kept[start:stop])
    assert not torch.equal(Drawn(3, "two", 0.3).kept(vector, 0), kept)


@pytest.mark.parametrize("parts", [1, 3])
def test_rescaling_restores_the_sum_of_magnitudes(parts: int) -> None:
    vector = torch.randn(3 * CELL, generator=torch.Generator().manual_seed(4))
    for choice in (Drawn(0, "one", 0.5), largest(lambda: [vector], CELL, len(vector))):
        factor = rescale_factor(lambda: vector.chunk(parts), choice)
        rescaled = vector[choice.kept(vector, 0)] * factor
        torch.testing.assert_close(rescaled.abs().sum(), vector.abs().sum())
    assert rescale_factor(lambda: [torch.zeros(8)], NOTHING) == 1.0


def test_the_strongest_entry_has_the_columns_sign() -> None:
    phi = torch.tensor([[1.0, -1.0, 0.0], [3.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    assert strongest(phi).tolist() == [3.0, -2.0, 0.0]
