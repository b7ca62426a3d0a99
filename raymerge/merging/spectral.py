"""Merging of one weight matrix through its singular vectors: TSV-Merge, Iso-C and Iso-CTS.

TSV-Merge: Gargiulo et al., CVPR 2025. Iso-C and Iso-CTS: Marczak et al., ICML 2025.

A direction whose singular value is zero to rounding is arbitrary (an SVD completes the basis in any
way), so it is left out everywhere, from means too; the released codes keep it. That matters only
for matrices of less than full rank: a task that did not move has no effect, and tasks that coincide
share one direction. Tensors that are not matrices are left to ``merging.basis``.

Legend: K tasks, M×N the matrix (out, in), r = min(M, N), R triplets of all tasks together. A
triplet is a left singular vector, its singular value and the right one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDING = 16.0
"""A singular value below this many units of rounding of the matrix's Frobenius norm is zero."""


class Triplets(NamedTuple):
    """The top r triplets of a matrix: columns (M, r), values (r,), rows (r, N); 0 where omitted."""

    left: Tensor
    values: Tensor
    right: Tensor


def tsv(matrices_KMN: Tensor) -> Tensor:
    """Return TSV-Merge (Algorithm 1) as a basis: (K, M, N) whose sum is the merged matrix.

    Each task keeps its top ⌊r/K⌋ triplets, at least one; the left vectors of all tasks together,
    and the right ones, are replaced by the nearest orthonormal ones.
    """
    tasks, *shape = matrices_KMN.shape
    keep = max(1, min(shape) // tasks)
    triplets = [_top(matrix_MN, keep, _floor(matrix_MN)) for matrix_MN in matrices_KMN]
    left_KMr, right_KrN = _orthogonal(triplets)
    return torch.stack(
        [
            left_Mr * triplet.values @ right_rN
            for left_Mr, triplet, right_rN in zip(left_KMr, triplets, right_KrN, strict=True)
        ]
    )


def iso_c(matrices_KMN: Tensor) -> Tensor:
    """Return Iso-C (M, N): the tasks' sum with every singular value replaced by their mean."""
    total_MN = matrices_KMN.sum(0)
    total = _top(total_MN, min(total_MN.shape), _floor(matrices_KMN))
    return total.left @ total.right * _mean(total.values)


def iso_cts(matrices_KMN: Tensor, common_fraction: float = 0.8) -> Tensor:
    """Return Iso-CTS (Algorithm 2) as a basis: (K, M, N) whose sum is the merged matrix.

    Of r triplets about ``common_fraction`` (0 to 1) are the top ones of the sum of the tasks. The
    rest are shared equally: each task's top ones after the common *left* vectors are projected out
    (as the released code, which does not project the right ones). All together are made orthonormal
    as in TSV-Merge, and every singular value becomes the mean of all.

    The method itself gives one matrix; each task's row of the basis has 1/K of the common part.
    """
    tasks, *shape = matrices_KMN.shape
    common, specific = _allotment(min(shape), tasks, common_fraction)
    total = _top(matrices_KMN.sum(0), common, _floor(matrices_KMN))
    own_KMN = matrices_KMN - total.left @ (total.left.T @ matrices_KMN)
    # A task inside the common space leaves only rounding, measured by its norm before projecting.
    owns = [
        _top(own_MN, specific, _floor(matrix_MN))
        for own_MN, matrix_MN in zip(own_KMN, matrices_KMN, strict=True)
    ]
    mean = _mean(torch.cat([total.values, *(own.values for own in owns)]))
    (left_Mc, *left_KMs), (right_cN, *right_KsN) = _orthogonal([total, *owns])
    shared_MN = left_Mc @ right_cN / tasks
    pairs = zip(left_KMs, right_KsN, strict=True)
    return mean * torch.stack([shared_MN + left_Ms @ right_sN for left_Ms, right_sN in pairs])


def _allotment(rank: int, tasks: int, common_fraction: float) -> tuple[int, int]:
    """Return the triplets of the common space and of each task, ``rank`` in all.

    They are rounded as in the released code.
    """
    specific = min(round((rank - int(rank * common_fraction)) / tasks), rank // tasks)
    return rank - tasks * specific, specific


def _top(matrix_MN: Tensor, keep: int, floor: Tensor) -> Triplets:
    """Return the top ``keep`` triplets, without those whose value is at most ``floor``."""
    left_Mr, values_r, right_rN = _svd(matrix_MN)
    left_Mr, values_r, right_rN = left_Mr[:, :keep], values_r[:keep], right_rN[:keep]
    mask_r = (values_r > floor).to(values_r.dtype)
    return Triplets(left_Mr * mask_r, values_r * mask_r, right_rN * mask_r[:, None])


def _orthogonal(triplets: list[Triplets]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return each one's left and right vectors, made orthonormal over all of them."""
    sizes = [len(triplet.values) for triplet in triplets]
    left_MR = _procrustes(torch.cat([triplet.left for triplet in triplets], 1))
    right_RN = _procrustes(torch.cat([triplet.right for triplet in triplets]))
    return left_MR.split(sizes, 1), right_RN.split(sizes)


def _procrustes(vectors: Tensor) -> Tensor:
    """Return the nearest orthonormal rows or columns: P·Qᵀ of the SVD P·Σ·Qᵀ."""
    top = _top(vectors, min(vectors.shape), _floor(vectors))
    return top.left @ top.right


def _floor(matrices: Tensor) -> Tensor:
    """Return the singular value below which there is only rounding, of one matrix or a sum."""
    norm: Tensor = torch.linalg.vector_norm(matrices)
    return norm * (_ROUNDING * torch.finfo(matrices.dtype).eps)


def _mean(values: Tensor) -> Tensor:
    """Return the mean of the singular values that are not zero; 0 if all are zero."""
    return values.sum() / values.count_nonzero().clamp(min=1)


def _svd(matrix_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD, computed in float64 where float32 does not converge."""
    try:
        left_Mr, values_r, right_rN = torch.linalg.svd(matrix_MN, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        wide = torch.linalg.svd(matrix_MN.double(), full_matrices=False)
        left_Mr, values_r, right_rN = (part.to(matrix_MN.dtype) for part in wide)
    return left_Mr, values_r, right_rN
