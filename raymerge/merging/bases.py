"""Which rows V a method's config asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from raymerge.config import AdaMerging, Dare, IsoCts, MethodConfig, Wudi
from raymerge.merging.basis import Basis, MatrixBasis
from raymerge.merging.dare import Dare as DareBasis
from raymerge.merging.spectral import iso_c, iso_cts, tsv
from raymerge.merging.ties import TiesStatistics
from raymerge.merging.wudi import wudi


def basis_of(
    method: MethodConfig, names: Sequence[str], seed: int, ties: Callable[[], TiesStatistics]
) -> Basis | None:
    """None for the task vectors themselves. ``names``: the models'; ``ties``: their statistics, of
    which only TIES and AdaMerging++ have need."""
    name = method.task_vectors if isinstance(method, AdaMerging) else method.name
    if name == "ties":
        return ties()
    if name == "dare":
        assert isinstance(method, Dare | AdaMerging)
        elect = isinstance(method, Dare) and method.elect_sign
        return DareBasis(tuple(names), seed, method.density, elect)
    if name == "tsv":
        return MatrixBasis(tsv)
    if name == "iso_c":
        return MatrixBasis(iso_c, separate=False)
    if name in ("iso_cts", "iso"):
        assert isinstance(method, IsoCts | AdaMerging)
        return MatrixBasis(partial(iso_cts, common_fraction=method.common_fraction))
    if isinstance(method, Wudi):
        solve = partial(wudi, iterations=method.iterations, lr=method.lr)
        return MatrixBasis(solve, separate=False)
    return None
