"""Fisher merging (Matena & Raffel, NeurIPS 2022): a weighted average of the experts.

Each parameter's weight is how much the expert's own predictions depend on it. Gradients are squared
per image and per class: summed over either first, they would cancel, and the square would not be
the Fisher information. Loading experts and images is left to ``engine.worker``.

Legend: N images, b images of one chunk, C classes, R directions in the space of the logits,
S draws of a class per image, P columns (the flat vector, or any slice of it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

EPSILON = 1e-6
"""Added to every F, so that columns on which no prediction depends are averaged."""

Logits = Callable[[dict[str, Tensor], Tensor], Tensor]
"""(parameters, images (b, ...)) → logits (b, C), a pure function of both."""


def fisher_diagonal(
    logits: Logits,
    parameters: dict[str, Tensor],
    images: Tensor,
    *,
    samples: int | None = None,
    generator: torch.Generator | None = None,
    chunk: int = 4,
) -> dict[str, Tensor]:
    """Return F = mean_n Σ_c p_nc (∂_θ log p_nc)², the diagonal of the Fisher information.

    The expectation over classes is over the model's own predictions p: exact by default, with one
    backward for each class; or, unbiased, from ``samples`` classes drawn per image. The draws come
    from ``generator`` (on the CPU) alone: neither ``chunk`` nor the device changes them.

    ``images`` (N, ...): N ≥ 1. Returns F by name, each in the shape and precision of its parameter.
    ``logits`` sees one image at a time, (1, ...), under ``vmap``: a chunk keeps that many gradients
    of all parameters, three times as many where an image needs more than one backward.
    """
    # Draw all classes at once, so that the chunks do not change the draws.
    parameters = {name: tensor.detach() for name, tensor in parameters.items()}
    draws_NS = None if samples is None else torch.rand(len(images), samples, generator=generator)
    per_image = vmap(partial(_squares, logits, parameters), (0, None if samples is None else 0))
    total = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    # vmap has no rule for the fused attention kernels and would run them image by image.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for start in range(0, len(images), chunk):
            rows = slice(start, start + chunk)
            draws_bS = None if draws_NS is None else draws_NS[rows].to(images.device)
            for name, squares in per_image(images[rows], draws_bS).items():
                total[name].add_(squares.sum(0))
    return {name: squares.div_(len(images)) for name, squares in total.items()}


def _squares(
    logits: Logits, parameters: dict[str, Tensor], image: Tensor, draws_S: Tensor | None
) -> dict[str, Tensor]:
    """Return Σ_r (Jᵀ d_r)² of one image by name; J (C, P) is the Jacobian of its logits."""
    logits_C, pullback = vjp(lambda values: logits(values, image[None])[0], parameters)[:2]
    total: dict[str, Tensor] = {}
    for direction_C in _directions(logits_C, draws_S):
        for name, gradient in pullback(direction_C)[0].items():
            if name in total:
                total[name].add_(gradient.square())
            else:
                total[name] = gradient.square()
    return total


def _directions(logits_C: Tensor, draws_S: Tensor | None) -> Tensor:
    """Return the directions d_r (R, C) whose Σ_r (Jᵀ d_r)² is one image's Fisher diagonal.

    ∂_θ log p_c = Jᵀ(e_c − p). Exact: d_c = √p_c (e_c − p). Sampled: d_s = (e_y − p)/√S for classes
    y ∼ p, found where the uniform draws (S,) fall in the cumulative p.
    """
    p_C: Tensor = logits_C.softmax(-1)
    classes_C = torch.arange(len(p_C), device=p_C.device)
    if draws_S is None:
        return p_C.sqrt()[:, None] * ((classes_C[:, None] == classes_C).to(p_C) - p_C)
    # Rounding may leave the last cumulative p below a draw.
    drawn_S = (p_C.cumsum(-1) <= draws_S[:, None]).sum(-1).clamp(max=len(p_C) - 1)
    drawn_SC = (drawn_S[:, None] == classes_C).to(p_C)
    return (drawn_SC - p_C) / math.sqrt(len(draws_S))


def add_row_squares(
    logits_BC: Tensor,
    gradient_P: Tensor,
    total_P: Tensor,
    samples: int | None,
    generator: torch.Generator,
) -> None:
    """Add Σ_r (Jᵀ d_r)² of each row to ``total_P``, for logits of any function.

    ``gradient_P``: where a backward of the logits adds its gradient. Each row takes one backward
    for each class or draw; ``fisher_diagonal`` is faster for functions that ``vmap`` can map.
    """
    for logits_C in logits_BC:
        draws_S = None if samples is None else torch.rand(samples, generator=generator)
        if draws_S is not None:
            draws_S = draws_S.to(logits_C.device)
        for direction_C in _directions(logits_C.detach(), draws_S):
            gradient_P.zero_()
            (logits_C @ direction_C).backward(retain_graph=True)
            total_P.addcmul_(gradient_P, gradient_P)


def task_weight(fisher_P: Tensor, epsilon: float = EPSILON) -> float:
    """Return a = 1/(‖F‖₂ + ε), by which no task outweighs the rest through confidence alone.

    Normalising a over the tasks would change nothing: the factor cancels in the merged model.
    """
    return 1.0 / (float(torch.linalg.vector_norm(fisher_P)) + epsilon)


class FisherSum:
    """Computes θ = Σ_k a_k(F_k + ε) θ_k / Σ_k a_k(F_k + ε), adding one task after the other.

    It keeps two vectors however many tasks there are. Everything but ``task_weight`` is local to a
    column, so P may be any slice of the flat vector.
    """

    def __init__(
        self, columns: int, epsilon: float = EPSILON, device: torch.device | None = None
    ) -> None:
        self._epsilon = epsilon
        self._weighted_P = torch.zeros(columns, device=device)
        self._weights_P = torch.zeros(columns, device=device)

    def add(self, fisher_P: Tensor, vector_P: Tensor, weight: float) -> None:
        """Add one task's F, its task vector, and its ``task_weight``."""
        self._weighted_P.addcmul_(fisher_P, vector_P, value=weight)
        self._weighted_P.add_(vector_P, alpha=weight * self._epsilon)
        self._weights_P.add_(fisher_P, alpha=weight).add_(weight * self._epsilon)

    def delta(self) -> Tensor:
        """Return θ − θ₀ (P,), the mean task vector where all F are equal.

        At least one task must have been added.
        """
        return self._weighted_P / self._weights_P
