"""Exact order statistics of |x| over a vector in parts, without sorting or holding it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Parts = Callable[[], Iterable[Tensor]]

_MARGIN = 0.015
"""Half the bracket's width, as a fraction of the vector: what one pass has to keep is twice that.
A sample of some hundred blocks misses by about a quarter of it."""


def kth_smallest_magnitude(parts: Parts, k: int, numel: int, sample: Tensor | None = None) -> float:
    """The k-th smallest (from 1) of |x| over all ``numel`` entries of the parts; no NaN.

    ``sample``: some of the entries, taken evenly. It brackets the value (Floyd and Rivest, 1975);
    one pass counts what lies below the bracket and keeps what lies inside. Where that misses the
    value, the bracket is widened and the pass repeated: the answer is exact whatever the sample.
    Without one, all entries are held at once.
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
    """Values below and above the quantile by ``margin``; infinite where the sample has none."""
    low, high = (round((quantile + side * margin) * len(ordered)) for side in (-1, 1))
    return (
        float(ordered[low - 1]) if low > 0 else -inf,
        float(ordered[high]) if high < len(ordered) else inf,
    )


def _kth_inside(parts: Parts, k: int, low: float, high: float) -> float | None:
    """The k-th smallest magnitude if it lies in [low, high], else None.

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
    kept = np.concatenate(inside)
    rank = k - up_to_low
    if rank < 1:
        return low if rank + _copies(parts, low) >= 1 else None
    if rank <= len(kept):
        return _kth(kept, rank)
    if low == high:  # its copies are in up_to_low
        return None
    return high if rank - len(kept) <= _copies(parts, high) else None


def _kth(magnitudes: NDArray[np.float32], k: int) -> float:
    return float(np.partition(magnitudes, k - 1)[k - 1])


def _copies(parts: Parts, value: float) -> int:
    return sum(int((_magnitude(part) == value).sum()) for part in parts())


def _magnitude(part: Tensor) -> Tensor:
    return part.reshape(-1).abs().float()
