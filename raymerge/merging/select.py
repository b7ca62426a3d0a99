"""Exact order statistics of |x| over a vector in parts, without sorting or holding it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_HIGH_BITS = 15  # float32 magnitudes order as 31-bit integers: 2^16 buckets, then 2^15 within one
_BUCKETS = 1 << 16


def kth_smallest_magnitude(parts: Callable[[], Iterable[Tensor]], k: int) -> float:
    """The k-th smallest (from 1) of |x| over all parts; NaN-free float32 input.

    Two passes over ``parts()``: IEEE-754 magnitudes order like their bit patterns, so a histogram
    of the high 16 bits finds the bucket, and one of the low 15 bits finds the value in it.
    """
    high = torch.zeros(_BUCKETS, dtype=torch.int64)
    for part in parts():
        high += torch.bincount(_magnitude_bits(part) >> _HIGH_BITS, minlength=_BUCKETS)
    total = int(high.sum())
    if not 1 <= k <= total:
        raise ValueError(f"k={k} is outside 1..{total}")
    bucket, rank = _locate(high, k)
    low = torch.zeros(1 << _HIGH_BITS, dtype=torch.int64)
    for part in parts():
        bits = _magnitude_bits(part)
        inside = bits[(bits >> _HIGH_BITS) == bucket] & ((1 << _HIGH_BITS) - 1)
        low += torch.bincount(inside, minlength=1 << _HIGH_BITS)
    value, _ = _locate(low, rank)
    pattern = torch.tensor((bucket << _HIGH_BITS) | value, dtype=torch.int32)
    return float(pattern.view(torch.float32))


def _magnitude_bits(part: Tensor) -> Tensor:
    return part.reshape(-1).float().contiguous().view(torch.int32) & 0x7FFFFFFF


def _locate(histogram: Tensor, k: int) -> tuple[int, int]:
    """The bucket of the k-th smallest item, and its rank (from 1) within that bucket."""
    cumulative = histogram.cumsum(0)
    bucket = int(torch.searchsorted(cumulative, k))
    return bucket, k - int(cumulative[bucket] - histogram[bucket])
