"""Exact order statistics of |x| over a vector in parts, without sorting it or holding it whole.

A sample brackets the value, and one pass keeps only the entries inside the bracket. Reading the
parts is left to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Parts = Callable[[], Iterable[Tensor]]

_MARGIN = 0.015
"""Half the bracket's width, as a fraction of the vector: one pass keeps twice that.
A sample of some hundred blocks misses by about a quarter of it."""


def kth_smallest_magnitude(parts: Parts, k: int, numel: int, sample: Tensor | None = None) -> float:
    """Return the k-th smallest (from 1) of |x| over all ``numel`` entries of the parts; no NaN.

    ``sample``: some of the entries, taken evenly. It brackets the value (Floyd and Rivest, 1975);
    one pass counts the entries below the bracket and keeps those inside. Where the bracket misses
    the value, it is widened and the pass repeated, so the result is always exact. Without a sample,
    all entries are held in memory at once.
    """
    if not 1 <= k <= numel:
        raise ValueError(f"k={k} is outside 1..{numel}")
    if sample is None:
        return _kth(np.concatenate([_magnitude(part).numpy() for part in parts()]), k)
    ordered = sample.abs().float().sort().values
    margin = _MARGIN
    while True:
        bracket = _bracket(ordered, k / numel, margin)
        value = _kth_inside(parts, k, *bracket)
        if value is not None:
            return value
        margin *= 8


def _bracket(ordered: Tensor, quantile: float, margin: float) -> tuple[float, float]:
    """Return values below and above the quantile by ``margin``; infinite beyond the sample."""
    low, high = (round((quantile + side * margin) * len(ordered)) for side in (-1, 1))
    return (
        float(ordered[low - 1]) if low > 0 else -inf,
        float(ordered[high]) if high < len(ordered) else inf,
    )


def _kth_inside(parts: Parts, k: int, low: float, high: float) -> float | None:
    """Return the k-th smallest magnitude if it lies in [low, high], else None.

    Copies of the bounds themselves are only counted, and only if the k-th may be one of them: a
    vector may be half zeros.
    """
    up_to_low, inside = 0, []
    for part in parts():
        magnitude = _magnitude(part)
        above = magnitude > low
        up_to_low += len(magnitude) - int(above.sum())
        # NumPy's selection by a mask is several times as fast as torch's.
        inside.append(magnitude.numpy()[above.logical_and_(magnitude < high).numpy()])
    # The rank of the value among the entries above the lower bound.
    candidates = np.concatenate(inside)
    rank = k - up_to_low
    if rank < 1:
        return low if rank + _copies(parts, low) >= 1 else None
    if rank <= len(candidates):
        return _kth(candidates, rank)
    if low == high:  # its copies are in up_to_low
        return None
    return high if rank - len(candidates) <= _copies(parts, high) else None


def _kth(magnitudes: NDArray[np.float32], k: int) -> float:
    return float(np.partition(magnitudes, k - 1)[k - 1])


def _copies(parts: Parts, value: float) -> int:
    return sum(int((_magnitude(part) == value).sum()) for part in parts())


def _magnitude(part: Tensor) -> Tensor:
    return part.reshape(-1).abs().float()
