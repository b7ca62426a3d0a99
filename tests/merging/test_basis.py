"""The rows that λ multiplies: of whole matrices, and constant ones."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from torch import Tensor

from raymerge.merging.basis import Basis, ConstantRow, MatrixBasis
from raymerge.merging.dare import Dare
from raymerge.merging.layout import CELL, Piece
from raymerge.merging.spectral import iso_cts
from raymerge.merging.ties import TiesStatistics

SHAPE = (6, 5)
PIECE = Piece(0, 0, 30)


def _vectors(columns: int = 30) -> Tensor:
    return torch.randn(3, columns, generator=torch.Generator().manual_seed(0))


def _transposed(matrices_KMN: Tensor) -> Tensor:
    """Return matrices that show the order of their entries."""
    assert matrices_KMN.shape == (3, *SHAPE)
    return matrices_KMN.flip(0, 1)


def test_a_matrix_basis_gives_its_function_the_matrices():
    rows_JN = MatrixBasis(_transposed).rows(_vectors(), PIECE, SHAPE)
    assert torch.equal(rows_JN, _vectors().view(3, *SHAPE).flip(0, 1).reshape(3, 30))


def test_a_function_that_merges_leaves_one_row():
    basis = MatrixBasis(lambda matrices_KMN: matrices_KMN.prod(0), separate=False)
    rows_JN = basis.rows(_vectors(), PIECE, SHAPE)
    assert torch.equal(rows_JN, _vectors().prod(0, keepdim=True))


@pytest.mark.parametrize("shape", [(30,), (), (2, 3, 5), (5, 3, 2, 1)])
@pytest.mark.parametrize("separate", [True, False])
def test_tensors_that_are_no_matrix_are_averaged(separate, shape):
    """They become K rows that sum to the mean, or the mean itself."""
    basis = MatrixBasis(lambda matrices_KMN: matrices_KMN * torch.nan, separate)
    rows_JN = basis.rows(_vectors(), PIECE, shape)
    assert len(rows_JN) == (3 if separate else 1)
    torch.testing.assert_close(rows_JN.sum(0), _vectors().mean(0))


def test_a_constant_row_does_not_depend_on_the_models():
    delta_P = torch.arange(2.0 * CELL)
    basis, piece = ConstantRow(delta_P), Piece(1, CELL, CELL + 30)
    for models in (0, 1, 3):
        rows_JN = basis.rows(torch.full((models, 30), torch.nan), piece, SHAPE)
        assert torch.equal(rows_JN, delta_P[None, CELL : CELL + 30])


@pytest.mark.parametrize(
    "basis",
    [
        MatrixBasis(partial(iso_cts, common_fraction=0.5)),
        TiesStatistics(((0.5,),) * 3, 1.0),
        Dare(("a", "b", "c"), 0, 0.5),
        ConstantRow(torch.arange(30.0)),
    ],
)
def test_every_basis_travels_to_a_worker(basis: Basis):
    there: Basis = pickle.loads(pickle.dumps(basis))
    assert there.whole_tensors == basis.whole_tensors
    assert torch.equal(there.rows(_vectors(), PIECE, SHAPE), basis.rows(_vectors(), PIECE, SHAPE))
