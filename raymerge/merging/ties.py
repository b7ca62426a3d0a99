"""TIES-Merging (Yadav et al., NeurIPS 2023): trim, elect sign, merge; and Φ of AdaMerging++.

Trimming needs one number per task from the whole vector (a threshold), and electing one number
from all of them (the majority sign); with those, everything is local to a column, so it works on
any slice. ``TiesStatistics`` carries these numbers; computing them over files is left to
``models.checkpoints.task_vectors``.

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
    """The numbers of the whole vectors that a column needs.

    ``thresholds[k][t]``: keep |x| ≥ this in tensor t of task k (one value repeated over t unless
    trimming is per tensor). ``majority``: the sign that columns with a zero sum take; 0 if none,
    None before the signs are counted. ``mean``: divide each column by the number of tasks
    that have an entry in it, so that the sum of the K vectors is TIES's disjoint mean.
    """

    thresholds: tuple[tuple[float, ...], ...]
    majority: float | None = 0.0
    mean: bool = False

    def column(self, tensor: int, like: Tensor) -> Tensor:
        """Return the thresholds of one tensor, (K,), on the device of ``like``."""
        return like.new_tensor([row[tensor] for row in self.thresholds])

    @property
    def whole_tensors(self) -> bool:
        return False

    def rows(self, vectors_Kn: Tensor, piece: Piece, shape: tuple[int, ...]) -> Tensor:
        return self.phi(vectors_Kn, piece.tensor)

    def phi(self, vectors_KN: Tensor, tensor: int) -> Tensor:
        """Return Φ of any columns of tensor ``tensor``: K separate vectors, (K, N)."""
        if self.majority is None:
            raise ValueError("the majority sign has not been counted")
        return self._scaled(phi(vectors_KN, self.column(tensor, vectors_KN), self.majority))

    def vote(self, vectors_KN: Tensor, tensor: int) -> Vote:
        """Return Φ before the majority sign is known, and these columns' votes on it."""
        trimmed_KN = trim(vectors_KN, self.column(tensor, vectors_KN))
        sign_N = elect_sign(trimmed_KN, 0.0)
        # Entries that sum to zero have a positive one among them.
        waiting_N = (sign_N == 0) & (trimmed_KN.amax(0) > 0)
        phi_KN = self._scaled(disjoint(trimmed_KN, sign_N))
        return Vote(phi_KN, float(sign_N.sum()), waiting_N)

    def counted(self, balance: float) -> TiesStatistics:
        """Return these statistics with the majority of signs that sum to ``balance``."""
        return replace(self, majority=math.copysign(1.0, balance) if balance else 0.0)

    def _scaled(self, phi_KN: Tensor) -> Tensor:
        return phi_KN / entries(phi_KN) if self.mean else phi_KN


class Vote(NamedTuple):
    """Φ (K, N) before the majority sign is known, and the votes on that sign.

    ``balance``: the sum of the columns' signs. ``waiting`` (N,) bool: the columns that wait for the
    majority sign, since their entries sum to zero; ``phi`` is zero there.
    """

    phi: Tensor
    balance: float
    waiting: Tensor


def trim_threshold(parts: Parts, numel: int, density: float, sample: Tensor | None = None) -> float:
    """Return the (d − ⌊density·d⌋)-th smallest magnitude of d: |x| ≥ this stay, as officially.

    At density 1 that would be the 0-th smallest (the official code crashes): everything is kept.
    """
    k = numel - math.floor(density * numel)
    return kth_smallest_magnitude(parts, k, numel, sample) if k > 0 else 0.0


def trim(vectors_KN: Tensor, thresholds_K: Tensor) -> Tensor:
    """Return the vectors with zeros below the task's threshold."""
    trimmed_KN = torch.empty_like(vectors_KN)
    # |x| ≥ t is |x| > the number just below t, which is one pass of hardshrink.
    below_K = torch.nextafter(thresholds_K, torch.full_like(thresholds_K, -torch.inf)).tolist()
    for vector_N, below, out_N in zip(vectors_KN, below_K, trimmed_KN, strict=True):
        torch.ops.aten.hardshrink.out(vector_N, below, out=out_N)
    return trimmed_KN


def elect_sign(trimmed_KN: Tensor, majority: float) -> Tensor:
    """Return sign(Σ_k T̂_k) per column, (N,); a zero sum takes the majority sign of all columns."""
    sign_N = trimmed_KN.sum(0).sign_()
    return sign_N.masked_fill_(sign_N == 0, majority)


def disjoint(trimmed_KN: Tensor, sign_N: Tensor) -> Tensor:
    """Return Φ: the entries that have the elected sign, the rest zero.

    Where no sign could be elected (the column's sum and the sum of all signs are both zero) nothing
    agrees; the official code keeps the negative entries there.
    """
    upper_N = torch.zeros_like(sign_N).masked_fill_(sign_N > 0, torch.inf)
    lower_N = torch.zeros_like(sign_N).masked_fill_(sign_N < 0, -torch.inf)
    return trimmed_KN.clamp(lower_N, upper_N)


def phi(vectors_KN: Tensor, thresholds_K: Tensor, majority: float) -> Tensor:
    """Trim, elect signs and drop what disagrees; return the K vectors of AdaMerging++."""
    trimmed_KN = trim(vectors_KN, thresholds_K)
    return disjoint(trimmed_KN, elect_sign(trimmed_KN, majority))


def strongest(phi_KN: Tensor) -> Tensor:
    """Return the entry farthest from zero of each column of Φ, (N,)."""
    return torch.where(phi_KN.sum(0) > 0, phi_KN.amax(0), phi_KN.amin(0))


def entries(phi_KN: Tensor) -> Tensor:
    """Return the number of tasks with an entry in each column, (N,), at least 1."""
    return (phi_KN != 0).sum(0).clamp(min=1)
