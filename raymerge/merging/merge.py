"""θ = θ₀ + Σ_k λ_k V_k, and its adjoint: ∂ℒ/∂λ_k = ⟨∂ℒ/∂θ, V_k⟩ (AdaMerging, ICLR 2024, §3.2).

The gradient of λ is closed-form, so nothing differentiates through the merge: one ordinary
backward gives ∂ℒ/∂θ, and one read of V gives all of ∂ℒ/∂λ.

V lies cell by cell, (C, K, CELL): a shard, a block and a read from disk are each one contiguous
run, and both products are one batched product over cells. V may be kept in bfloat16, in host memory
or in a memory-mapped file while the rest computes in float32 on a device; it is then copied there
a block of cells at a time. Storing V is left to ``engine.worker.vectors``.

Legend: K tasks, L layers, C cells of a shard, n = CELL columns of each, N = C·CELL columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from raymerge.merging.layout import CELL

_BLOCK_BYTES = 16 << 20
"""The size of one block of V in the compute precision: small enough for a CPU's last-level cache,
large enough to keep a GPU busy."""


def combine(pretrained_n: Tensor, vectors_Kn: Tensor, lambdas_K: Tensor) -> Tensor:
    """Return θ₀ + Σ_k λ_k V_k of columns that share their coefficients, (n,)."""
    return torch.addmv(pretrained_n, vectors_Kn.t(), lambdas_K)


def merge_into(
    out_N: Tensor, pretrained_N: Tensor, vectors_CKn: Tensor, lambdas_KC: Tensor
) -> None:
    """Write θ₀ + Σ_k λ_k V_k into ``out_N``; ``lambdas_KC`` holds one coefficient per cell."""
    lambdas_C1K = lambdas_KC.t().unsqueeze(1).contiguous()
    out_C1n, pretrained_C1n = (flat.view(-1, 1, CELL) for flat in (out_N, pretrained_N))
    for run, block_CKn in _blocks(vectors_CKn, out_N):
        torch.baddbmm(pretrained_C1n[run], lambdas_C1K[run], block_CKn, out=out_C1n[run])


def inner_products(gradient_N: Tensor, vectors_CKn: Tensor) -> Tensor:
    """Return ⟨∂ℒ/∂θ, V_k⟩ per cell and task, (C, K), each summed within its cell alone."""
    gradient_Cn1 = gradient_N.view(-1, CELL, 1)
    out_CK1 = gradient_N.new_empty(*vectors_CKn.shape[:2], 1)
    for run, block_CKn in _blocks(vectors_CKn, gradient_N):
        torch.bmm(block_CKn, gradient_Cn1[run], out=out_CK1[run])
    return out_CK1.squeeze(2)


def cell_products(one_N: Tensor, other_N: Tensor) -> Tensor:
    """Return ⟨one, other⟩ per cell, (C, 1)."""
    return torch.bmm(one_N.view(-1, 1, CELL), other_N.view(-1, CELL, 1)).squeeze(2)


def sum_cells(per_cell_CK: Tensor, layer_of_cell: Tensor, layers: int) -> Tensor:
    """Return the sums per layer, (K, L) float64, on the CPU, where a sum has a fixed order."""
    out_LK = torch.zeros(layers, per_cell_CK.shape[1], dtype=torch.float64)
    return out_LK.index_add_(0, layer_of_cell, per_cell_CK.cpu().double()).t()


def _blocks(vectors_CKn: Tensor, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield runs of cells and V there, in the dtype and on the device of ``like``."""
    cells, tasks, _ = vectors_CKn.shape
    if vectors_CKn.dtype == like.dtype and vectors_CKn.device == like.device:
        yield slice(0, cells), vectors_CKn
        return
    size = max(1, _BLOCK_BYTES // (tasks * CELL * like.element_size()))
    buffer_CKn = like.new_empty(min(size, cells), tasks, CELL)
    for start in range(0, cells, size):
        run = slice(start, min(start + size, cells))
        yield run, buffer_CKn[: run.stop - start].copy_(vectors_CKn[run], non_blocking=True)
