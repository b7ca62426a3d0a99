"""Models summed with a weight each, tensor by tensor, as mergekit's users define a merge.

- linear: Σ w θ, over Σ w where weights are normalised;
- of task vectors: θ₀ + λ Σ w m T, over Σ w m where normalised. m is 1 for every entry, or for those
  whose w T has the sign of the column's sum (TIES); before that, T may have lost its smallest
  entries, or random ones.

The choice of a tensor's entries is made once (``largest``), so that all else is local to a column
and works on any slice. Reading recipes and models is left to ``apps.peers``.

Legend: K models, n columns of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from raymerge.merging.dare import dropped
from raymerge.merging.layout import CELL
from raymerge.merging.select import Parts, kth_smallest_magnitude

_NO_WEIGHT = 1e-8
"""A smaller sum of weights does not divide."""
_SMALLEST_NORM = 1e-7
"""A vector with a smaller sum of magnitudes is not rescaled."""


@dataclass(frozen=True)
class Cut:
    """Keeps the entries of a tensor above ``value``, and those equal to it up to column ``last``.

    So a tensor keeps as many entries as it should, however many are equal.
    """

    value: float
    last: int

    def kept(self, vector_n: Tensor, start: int) -> Tensor:
        """Return which entries stay, (n,) bool, of the columns from ``start``."""
        magnitude_n = vector_n.abs().float()
        kept_n = magnitude_n > self.value
        ties = max(0, self.last + 1 - start)
        kept_n[:ties] |= magnitude_n[:ties] == self.value
        return kept_n


NOTHING = Cut(inf, -1)
EVERYTHING = Cut(-inf, -1)


def largest(parts: Parts, keep: int, numel: int, sample: Tensor | None = None) -> Cut:
    """Return the cut at the ``keep`` largest magnitudes of all parts; of equal ones the first.

    ``sample``: as for :func:`~raymerge.merging.select.kth_smallest_magnitude`.
    """
    if keep <= 0:
        return NOTHING
    value = kth_smallest_magnitude(parts, numel - keep + 1, numel, sample)
    if value == 0:  # all that is not zero is kept
        return EVERYTHING
    above, ties, start = 0, [], 0
    for part in parts():
        magnitude_n = part.abs().float()
        above += int((magnitude_n > value).sum())
        ties.append((magnitude_n == value).nonzero().squeeze(1) + start)
        start += len(magnitude_n)
    return Cut(value, int(torch.cat(ties)[keep - above - 1]))


@dataclass(frozen=True)
class Drawn:
    """Keeps random entries of one vector, the same however the vector is cut.

    ``name``: the vector among those of one ``seed``, as in :mod:`~raymerge.merging.dare`.
    """

    seed: int
    name: str
    density: float

    def kept(self, vector_n: Tensor, start: int) -> Tensor:
        """Return which entries stay, (n,) bool, of the columns from ``start``."""
        shift = start % CELL
        columns = len(vector_n) + shift
        return ~dropped(self.seed, self.name, start - shift, columns, self.density)[shift:]


def rescale_factor(parts: Parts, choice: Cut | Drawn) -> float:
    """Return the factor that gives the kept entries the sum of magnitudes of all entries.

    It is 1 for a vector of almost nothing but zeros.
    """
    before, after, start = 0.0, 0.0, 0
    for vector_n in parts():
        magnitude_n = vector_n.abs().double()
        before += float(magnitude_n.sum())
        after += float(magnitude_n[choice.kept(vector_n, start)].sum())
        start += len(vector_n)
    return before / after if min(before, after) >= _SMALLEST_NORM else 1.0


def linear(models_Kn: Tensor, weights: Sequence[float], *, normalize: bool) -> Tensor:
    """Return Σ w θ (n,) in at least float32; over Σ w, which must not be 0, if ``normalize``."""
    wide = torch.promote_types(models_Kn.dtype, torch.float32)
    out_n = torch.zeros(models_Kn.shape[1], dtype=wide)
    for model_n, weight in zip(models_Kn, weights, strict=True):
        out_n.add_(model_n, alpha=weight)
    return out_n.div_(sum(weights)) if normalize else out_n


def merge_tasks(
    base_n: Tensor,
    vectors_Kn: Tensor,
    weights: Sequence[float],
    *,
    elect: bool,
    normalize: bool,
    scaling: float,
) -> Tensor:
    """Return θ₀ + scaling · Σ w T (n,) in their own dtype; overwrites ``vectors_Kn``.

    ``elect``: add only entries w T with the sign of their column's sum, + where that is zero.
    ``normalize``: divide by the sum of the weights of what was added, if there is any.
    """
    weights_K1 = vectors_Kn.new_tensor(weights).unsqueeze(1)
    weighted_Kn = vectors_Kn.mul_(weights_K1)
    # With election the divisor depends on the column, since only agreeing models are added.
    if elect:
        agreeing_Kn = _agreeing(weighted_Kn)
        if normalize:
            divisor_n = (weights_K1 * agreeing_Kn).sum(0)
        merged_n = weighted_Kn.mul_(agreeing_Kn).sum(0)
        if normalize:
            merged_n /= divisor_n.masked_fill_(divisor_n == 0, 1)
    else:
        merged_n = weighted_Kn.sum(0)
        total = weights_K1.sum()
        if normalize and abs(float(total)) >= _NO_WEIGHT:
            merged_n /= total
    if scaling != 1:
        merged_n *= scaling
    return merged_n.add_(base_n)


def _agreeing(weighted_Kn: Tensor) -> Tensor:
    """Return which entries (K, n) have the sign of their column's sum."""
    plus_n = weighted_Kn.sum(0) >= 0
    return torch.where(plus_n, weighted_Kn > 0, weighted_Kn < 0)
