"""WUDI-Merging (Cheng et al., ICML 2025), and its closed form (arXiv 2606.07289).

The merged matrix m disturbs no task's inputs. A task vector's rows span about the inputs of its
layer, so the disturbance of task k is (m − T_k)·T_kᵀ, and m minimises
Σ_k ‖(m − T_k)·T_kᵀ‖² / ‖T_k‖² (Frobenius norms).

With m = Σ_k T_k + D the gradient is 2·(D·A + C), where A = Σ_k T_kᵀT_k / ‖T_k‖² and
C = Σ_k (Σ_{j≠k} T_j)·T_kᵀT_k / ‖T_k‖²: one product in each iteration for any K. Written in D, the
gradient has no difference of large terms at the start, where it is C; Adam would turn their
rounding into full steps. Tensors that are not matrices are left to ``merging.basis``.

Spectral WUDI follows the gradient's flow from Σ_k T_k in closed form instead. With A = Q·Λ·Qᵀ it is
m = Σ_k T_k·(I − Q·f·Qᵀ) + Σ_k T_k·T_kᵀT_k / ‖T_k‖² · Q·(f/Λ)·Qᵀ, where a filter f says how far each
eigenvector has gone: 0 not at all, 1 to the minimum. It is linear in the tasks, so each keeps a row
of its own. Eigenvalues sum to the number of tasks that moved.

Legend: K tasks, M×N the matrix (out, in), f and Λ (N).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_BETAS = (0.9, 0.999)
_EPS = 1e-8
_SMALLEST = 1e-8
"""An eigenvalue below this counts as this, as in the released code."""


def wudi(matrices_KMN: Tensor, iterations: int = 300, lr: float = 1e-5) -> Tensor:
    """Return the merged matrix (M, N): Adam from Σ_k T_k, without tasks that did not move."""
    curvature_NN, pull_MN = quadratic(matrices_KMN)
    return matrices_KMN.sum(0).add_(_descend(curvature_NN, pull_MN, iterations, lr))


def quadratic(matrices_KMN: Tensor) -> tuple[Tensor, Tensor]:
    """Return 2A (N, N) and 2C (M, N): the gradient at Σ_k T_k + D is D·2A + 2C."""
    total_MN = matrices_KMN.sum(0)
    pull_MN = torch.zeros_like(total_MN)
    curvature_NN = pull_MN.new_zeros(total_MN.shape[1], total_MN.shape[1])
    for matrix_MN in matrices_KMN:
        norm = torch.linalg.vector_norm(matrix_MN)
        if norm > 0:
            unit_MN = matrix_MN / norm
            curvature_NN.addmm_(unit_MN.T, unit_MN, alpha=2)
            pull_MN.addmm_((total_MN - matrix_MN) @ unit_MN.T, unit_MN, alpha=2)
    return curvature_NN, pull_MN


def swudi(matrices_KMN: Tensor, time: float = 300.0, fraction: float = 0.65) -> Tensor:
    """Return SWUDI as a basis: (K, M, N) whose sum is the merged matrix.

    The flow stops at ``time``, and runs only along the largest ``fraction`` of the eigenvectors.
    """

    def passes(values_N: Tensor) -> Tensor:
        keep = max(1, math.ceil(len(values_N) * fraction))
        return -torch.expm1(-time * values_N) * _largest(values_N, keep)

    return _follow(matrices_KMN, passes)


def aswudi(matrices_KMN: Tensor) -> Tensor:
    """Return ASWUDI as a basis: (K, M, N) whose sum is the merged matrix.

    The flow runs to its end along the r largest eigenvectors, r = ⌈(Σ√Λ)²/ΣΛ⌉: their effective
    number, which has no constant to tune.
    """

    def passes(values_N: Tensor) -> Tensor:
        rank = math.ceil(float(values_N.sqrt().sum().square() / values_N.sum()))
        return _largest(values_N, rank)

    return _follow(matrices_KMN, passes)


def _largest(values_N: Tensor, keep: int) -> Tensor:
    """Return 1 for the ``keep`` last of the ascending values and 0 for the others."""
    mask_N = torch.zeros_like(values_N)
    mask_N[max(0, len(values_N) - keep) :] = 1
    return mask_N


def _follow(matrices_KMN: Tensor, passes: Callable[[Tensor], Tensor]) -> Tensor:
    """Return each task's row (K, M, N) of the flow; ``passes`` is the filter of the eigenvalues."""
    norms_K = torch.linalg.vector_norm(matrices_KMN, dim=(1, 2))
    # Over the norm, a task that did not move is zero: it has no inputs to protect.
    units_KMN = matrices_KMN / norms_K.clamp(min=torch.finfo(norms_K.dtype).tiny)[:, None, None]
    values_N, vectors_NN = torch.linalg.eigh(torch.einsum("kmn,kmo->no", units_KMN, units_KMN))
    # No task has a part along an eigenvector whose value is rounding; 1/Λ would make one of it.
    floor = len(values_N) * torch.finfo(values_N.dtype).eps * values_N[-1]
    present_N, values_N = values_N > floor, values_N.clamp(min=_SMALLEST)
    kept_N = passes(values_N) * present_N
    rows_KMN = torch.empty_like(matrices_KMN)
    for row_MN, matrix_MN, unit_MN in zip(rows_KMN, matrices_KMN, units_KMN, strict=True):
        own_MN = matrix_MN @ vectors_NN
        pull_MN = unit_MN @ (unit_MN.T @ (own_MN * (kept_N / values_N)))
        torch.addmm(matrix_MN, pull_MN - own_MN * kept_N, vectors_NN.T, out=row_MN)
    return rows_KMN


def _descend(curvature_NN: Tensor, pull_MN: Tensor, iterations: int, lr: float) -> Tensor:
    """Return D (M, N) after ``iterations`` steps of Adam (Kingma & Ba, 2015) from 0."""
    beta1, beta2 = _BETAS
    shift_MN, mean_MN, square_MN = (torch.zeros_like(pull_MN) for _ in range(3))
    gradient_MN, scale_MN = torch.empty_like(pull_MN), torch.empty_like(pull_MN)
    for step in range(1, iterations + 1):
        torch.addmm(pull_MN, shift_MN, curvature_NN, out=gradient_MN)
        mean_MN.lerp_(gradient_MN, 1 - beta1)
        square_MN.mul_(beta2).addcmul_(gradient_MN, gradient_MN, value=1 - beta2)
        torch.div(square_MN, 1 - beta2**step, out=scale_MN).sqrt_().add_(_EPS)
        shift_MN.addcdiv_(mean_MN, scale_MN, value=-lr / (1 - beta1**step))
    return shift_MN
