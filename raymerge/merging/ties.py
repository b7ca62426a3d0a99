"""TIES-Merging (Yadav et al., NeurIPS 2023): trim, elect sign, merge; and Φ of AdaMerging++.

Trimming needs one number per task from the whole vector (a threshold), and electing one number
from all of them (the majority sign); given those, everything is local to a column, so it works on
any slice. ``TiesStatistics`` carries these numbers to whoever holds a slice.

Legend: K tasks, N columns (any slice of the flat vector).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from raymerge.merging.layout import Piece
from raymerge.merging.select import Parts, kth_smallest_magnitude


@dataclass(frozen=True)
class TiesStatistics:
    """What a column needs to know of the whole vectors.

    ``thresholds[k][t]``: keep |x| ≥ this in tensor t of task k (one value repeated over t unless
    trimming is per tensor). ``majority``: the sign that columns with a zero sum take; 0 if none,
    None if the signs have not been counted. ``mean``: divide each column by the number of tasks
    that have an entry in it, so that the sum of the K vectors is TIES's disjoint mean.
    """

    thresholds: tuple[tuple[float, ...], ...]
    majority: float | None = 0.0
    mean: bool = False

    def column(self, tensor: int, like: Tensor) -> Tensor:
        """The K thresholds of one tensor, (K,), on the device of ``like``."""
        return like.new_tensor([row[tensor] for row in self.thresholds])

    @property
    def whole_tensors(self) -> bool:
        return False

    def rows(self, vectors_Kn: Tensor, piece: Piece, shape: tuple[int, ...]) -> Tensor:
        return self.phi(vectors_Kn, piece.tensor)

    def phi(self, vectors_KN: Tensor, tensor: int) -> Tensor:
        """Φ of any columns of tensor ``tensor``: K separate vectors, (K, N)."""
        if self.majority is None:
            raise ValueError("the majority sign has not been counted")
        return self._scaled(phi(vectors_KN, self.column(tensor, vectors_KN), self.majority))

    def vote(self, vectors_KN: Tensor, tensor: int) -> Vote:
        """Φ before the majority sign is known, and what these columns add to it."""
        trimmed_KN = trim(vectors_KN, self.column(tensor, vectors_KN))
        sign_N = elect_sign(trimmed_KN, 0.0)
        # Entries that sum to zero have a positive one among them.
        waiting_N = (sign_N == 0) & (trimmed_KN.amax(0) > 0)
        phi_KN = self._scaled(disjoint(trimmed_KN, sign_N))
        return Vote(phi_KN, float(sign_N.sum()), waiting_N)

    def counted(self, balance: float) -> TiesStatistics:
        """With the majority of the signs, whose sum over all columns is ``balance``."""
        return replace(self, majority=math.copysign(1.0, balance) if balance else 0.0)

    def _scaled(self, phi_KN: Tensor) -> Tensor:
        return phi_KN / entries(phi_KN) if self.mean else phi_KN


class Vote(NamedTuple):
    """Φ (K, N) with nothing in the columns that wait for the majority sign; the sum of the signs;
    which columns (N,) wait: those with entries whose sum is zero."""

    phi: Tensor
    balance: float
    waiting: Tensor


def trim_threshold(parts: Parts, numel: int, density: float, sample: Tensor | None = None) -> float:
    """Keep |x| ≥ this: the (d − ⌊density·d⌋)-th smallest magnitude of d, as the official code.

    At density 1 that would be the 0-th smallest (the official code crashes): everything is kept.
    """
    k = numel - math.floor(density * numel)
    return kth_smallest_magnitude(parts, k, numel, sample) if k > 0 else 0.0


def trim(vectors_KN: Tensor, thresholds_K: Tensor) -> Tensor:
    """Zero the entries below the task's threshold."""
    trimmed_KN = torch.empty_like(vectors_KN)
    # |x| ≥ t is |x| > the number just below t, which is one pass of hardshrink.
    below_K = torch.nextafter(thresholds_K, torch.full_like(thresholds_K, -torch.inf)).tolist()
    for vector_N, below, out_N in zip(vectors_KN, below_K, trimmed_KN, strict=True):
        torch.ops.aten.hardshrink.out(vector_N, below, out=out_N)
    return trimmed_KN


def elect_sign(trimmed_KN: Tensor, majority: float) -> Tensor:
    """sign(Σ_k T̂_k) per column, (N,); a zero sum takes the majority sign of all columns."""
    sign_N = trimmed_KN.sum(0).sign_()
    return sign_N.masked_fill_(sign_N == 0, majority)


def disjoint(trimmed_KN: Tensor, sign_N: Tensor) -> Tensor:
    """Φ: entries that agree with the elected sign, the rest zero.

    Where no sign could be elected (the column's sum and the sum of all signs are both zero) nothing
    agrees; the official code keeps the negative entries there.
    """
    upper_N = torch.zeros_like(sign_N).masked_fill_(sign_N > 0, torch.inf)
    lower_N = torch.zeros_like(sign_N).masked_fill_(sign_N < 0, -torch.inf)
    return trimmed_KN.clamp(lower_N, upper_N)


def phi(vectors_KN: Tensor, thresholds_K: Tensor, majority: float) -> Tensor:
    """Trim, elect, keep what agrees: the K separate vectors of AdaMerging++."""
    trimmed_KN = trim(vectors_KN, thresholds_K)
    return disjoint(trimmed_KN, elect_sign(trimmed_KN, majority))


def strongest(phi_KN: Tensor) -> Tensor:
    """Return the entry farthest from zero of each column of Φ, (N,)."""
    return torch.where(phi_KN.sum(0) > 0, phi_KN.amax(0), phi_KN.amin(0))


def entries(phi_KN: Tensor) -> Tensor:
    """The number of tasks with an entry in each column, (N,), at least 1."""
    return (phi_KN != 0).sum(0).clamp(min=1)
