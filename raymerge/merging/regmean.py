"""RegMean (Jin et al., ICLR 2023): the linear layer whose outputs are closest to every expert's.

W = argmin Σ_k ‖X_k W − X_k W_k‖² = (Σ_k G_k)⁻¹ Σ_k G_k W_k with G_k = X_kᵀX_k, in closed form.
Columns of W are independent of each other, so a packed projection (q, k and v of one input) is
solved at once. Computing the Gram matrices is left to ``engine.worker.grams``.

Legend: I input features, O outputs of a linear layer; its weight is (I, O), y = xW.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALPHA = 0.95
"""The fraction of the off-diagonal Gram that is kept."""
RIDGE = 1e-6
"""The ridge as a fraction of the mean diagonal of Σ_k G̃_k."""


def shrink(gram_II: Tensor, alpha: float) -> Tensor:
    """Return G̃ = αG + (1 − α) diag G: the diagonal stays, the rest shrinks by α."""
    shrunk_II = gram_II * alpha
    shrunk_II.diagonal().copy_(gram_II.diagonal())
    return shrunk_II


class RegMeanSum:
    """Sums G̃_k, G̃_k W_k and W_k over the tasks of one linear layer, and solves for its weight.

    The solution shifts with the weights: adding task vectors W_k − W₀ gives W − W₀.

    It sums and solves in float64. With the ridge the condition number can reach I/RIDGE, some 10⁹,
    at which float32 has no correct digit left; and on a layer the cost is small beside the
    forward passes behind its Gram.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        alpha: float = ALPHA,
        device: torch.device | None = None,
    ) -> None:
        self._alpha = alpha
        self._tasks = 0
        self._gram_II = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self._product_IO = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self._weights_IO = torch.zeros_like(self._product_IO)

    def add(self, gram_II: Tensor, weight_IO: Tensor) -> None:
        """Add one task's Gram matrix and weight, or task vector, of any precision."""
        shrunk_II = shrink(gram_II.to(self._gram_II), self._alpha)
        weight_IO = weight_IO.to(self._gram_II)
        self._tasks += 1
        self._gram_II += shrunk_II
        self._product_IO.addmm_(shrunk_II, weight_IO)
        self._weights_IO += weight_IO

    def solve(self, ridge: float = RIDGE) -> Tensor:
        """Return W (I, O) float64, by Cholesky; at least one task must have been added.

        The ridge r = ``ridge``·tr/I pulls towards the mean of the W_k, not towards zero:
        (Σ G̃_k + rI) W = Σ G̃_k W_k + r·mean. A feature that is zero in all tasks gets the mean.
        Where that matrix is not positive, r grows until it is, with a margin: at α = 1, Grams of
        few tokens that were summed in float32 may need it. ValueError where a Gram held NaN or
        infinity.
        """
        if not self._gram_II.isfinite().all():
            raise ValueError("a Gram matrix of RegMean holds NaN or infinity")
        # Where every feature is dead, any ridge gives the mean.
        added = ridge * float(self._gram_II.diagonal().mean()) or 1.0
        factor_II, failed = torch.linalg.cholesky_ex(self._ridged(added))
        if failed:
            added = self._sufficient_ridge(added)
            factor_II = torch.linalg.cholesky(self._ridged(added))
        target_IO = self._product_IO + self._weights_IO * (added / self._tasks)
        return torch.cholesky_solve(target_IO, factor_II)

    def _sufficient_ridge(self, added: float) -> float:
        """Return ten times the first tenfold of ``added`` that makes the matrix positive.

        At less, rounding errors as large as the ridge itself would decide the solution.
        """
        while torch.linalg.cholesky_ex(self._ridged(added)).info:
            added *= 10
        return 10 * added

    def _ridged(self, added: float) -> Tensor:
        ridged_II = self._gram_II.clone()
        ridged_II.diagonal().add_(added)
        return ridged_II
