"""WUDI-Merging (Cheng et al., ICML 2025): the merged matrix that disturbs no task's inputs.

A task vector's rows span about the inputs of its layer, so the disturbance of task k is
(m − T_k)·T_kᵀ, and m minimises Σ_k ‖(m − T_k)·T_kᵀ‖² / ‖T_k‖² (Frobenius norms).

With m = Σ_k T_k + D the gradient is 2·(D·A + C), where A = Σ_k T_kᵀT_k / ‖T_k‖² and
C = Σ_k (Σ_{j≠k} T_j)·T_kᵀT_k / ‖T_k‖²: one product in each iteration for any K. Written in D, the
gradient has no difference of large terms at the start, where it is C; Adam would turn their
rounding into full steps. Tensors that are not matrices are left to ``merging.basis``.

Legend: K tasks, M×N the matrix (out, in).
"""

from __future__ import annotations

import torch
from torch import Tensor

_BETAS = (0.9, 0.999)
_EPS = 1e-8


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
