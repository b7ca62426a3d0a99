"""The relation of entropy and loss over samples: binned means and a rank correlation.

Legend: N samples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

FloatArray = NDArray[np.float64]

ENTROPY_EDGES = tuple(i / 10 for i in range(1, 11))
"""Upper ends, inclusive, in nats, of all bins but the last: [0, .1], (.1, .2] … (.9, 1], (1, ∞)."""

BIN_NAMES = (
    *(f"{'(' if i else '['}{i / 10:.1f}, {edge:.1f}]" for i, edge in enumerate(ENTROPY_EDGES)),
    "(1.0, ∞)",
)


@dataclass(frozen=True)
class EntropyLoss:
    """Cross-entropy against entropy, per sample, in nats (AdaMerging Figs 3 and 11)."""

    counts: tuple[int, ...]
    """Samples per bin of :data:`ENTROPY_EDGES`, and above."""
    mean_loss: tuple[float | None, ...]
    """Mean loss per bin; None for an empty bin."""
    spearman: float | None
    """Rank correlation of entropy and loss; None if one of them is constant."""

    def to_json(self) -> dict[str, Any]:
        return {"edges": ENTROPY_EDGES, **asdict(self)}


def entropy_against_loss(entropy_N: FloatArray, loss_N: FloatArray) -> EntropyLoss:
    """Bin the samples by entropy and correlate; both arrays are (N,), in nats.

    For the figure over all tasks, concatenate their samples: bins and ranks do not average.
    Raises ValueError if the lengths differ or a value is not finite.
    """
    entropy_N, loss_N = (np.asarray(x, dtype=np.float64) for x in (entropy_N, loss_N))
    if entropy_N.ndim != 1 or entropy_N.shape != loss_N.shape:
        raise ValueError(f"entropies {entropy_N.shape} and losses {loss_N.shape} do not pair up")
    if bad := int((~np.isfinite(entropy_N) | ~np.isfinite(loss_N)).sum()):
        raise ValueError(f"{bad} of {len(loss_N)} samples have no finite entropy and loss")
    bin_N = np.searchsorted(ENTROPY_EDGES, entropy_N, side="left")
    bins = len(ENTROPY_EDGES) + 1
    counts = np.bincount(bin_N, minlength=bins)
    sums = np.bincount(bin_N, weights=loss_N, minlength=bins)
    return EntropyLoss(
        tuple(counts.tolist()),
        tuple(float(s / n) if n else None for s, n in zip(sums, counts, strict=True)),
        spearman(entropy_N, loss_N),
    )


def spearman(x_N: FloatArray, y_N: FloatArray) -> float | None:
    """Return Pearson's correlation of the ranks; ties share their mean rank.

    None if x or y is constant, as fewer than two samples are. The values must not be NaN.
    """
    # Ranks are multiples of one half, so these sums are exact.
    x_N, y_N = (rankdata(each) - (len(each) + 1) / 2 for each in (x_N, y_N))
    scale = float(np.sqrt((x_N @ x_N) * (y_N @ y_N)))
    return float(x_N @ y_N) / scale if scale > 0 else None
