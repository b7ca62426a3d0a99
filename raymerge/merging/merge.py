"""θ = θ₀ + Σ_k λ_k V_k, and its adjoint: ∂ℒ/∂λ_k = ⟨∂ℒ/∂θ, V_k⟩ (AdaMerging, ICLR 2024, §3.2).

The gradient of λ is closed-form, so nothing differentiates through the merge: one ordinary
backward gives ∂ℒ/∂θ, and one read of V gives all of ∂ℒ/∂λ.

Legend: K tasks, T tensors, N columns of a shard (``origin`` is the flat position of column 0).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raymerge.merging.layout import CELL, Piece


def merge_into(
    out_N: Tensor,
    pretrained_N: Tensor,
    vectors_KN: Tensor,
    lambdas_KT: Tensor,
    pieces: Sequence[Piece],
    origin: int = 0,
) -> None:
    """Write θ₀ + Σ_k λ_k V_k into ``out_N``, one matrix–vector product per piece.

    ``lambdas_KT`` holds one coefficient per task and tensor, in the dtype of the vectors.
    """
    for piece in pieces:
        here = slice(piece.start - origin, piece.stop - origin)
        torch.addmv(
            pretrained_N[here],
            vectors_KN[:, here].t(),
            lambdas_KT[:, piece.tensor].contiguous(),
            out=out_N[here],
        )


def inner_products(
    gradient_N: Tensor,
    vectors_KN: Tensor,
    pieces: Sequence[Piece],
    tensors: int,
    origin: int = 0,
) -> Tensor:
    """⟨∂ℒ/∂θ, V_k⟩ per task and tensor: (K, T) float64, zero for tensors of other shards.

    Each cell of the fixed grid (``layout.CELL``) is summed in the vectors' precision, the cells
    in float64: the sum over all shards does not depend on how many there are.
    """
    out_KT = torch.zeros(
        vectors_KN.shape[0], tensors, dtype=torch.float64, device=gradient_N.device
    )
    for piece in pieces:
        for start, stop in _runs(piece):
            here = slice(start - origin, stop - origin)
            out_KT[:, piece.tensor] += _run_products(gradient_N[here], vectors_KN[:, here])
    return out_KT


def _runs(piece: Piece) -> list[tuple[int, int]]:
    """The piece cut where the grid cuts it: a partial first cell, whole cells, a partial last."""
    first_whole = min(-(-piece.start // CELL) * CELL, piece.stop)
    last_whole = max(piece.stop // CELL * CELL, first_whole)
    bounds = (piece.start, first_whole, last_whole, piece.stop)
    return [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]


def _run_products(gradient_N: Tensor, vectors_KN: Tensor) -> Tensor:
    """(K,) float64: whole cells as one batched product, anything shorter as one product.

    A cell is two rows of the batch, since torch rounds a batch of one row in another way: then one
    cell gives the same bits alone as among others.
    """
    rows = max(1, 2 * (len(gradient_N) // CELL))
    vectors_CKN = vectors_KN.unflatten(1, (rows, -1)).transpose(0, 1)
    partial_CK1 = torch.bmm(vectors_CKN, gradient_N.view(rows, -1, 1))
    return partial_CK1.squeeze(2).double().sum(0)
