"""The merge of one part of a tensor, as mergekit's and fusion_bench's files define it.

A method first reads what it needs of whole tensors (``prepare``), then merges any part. The maths
is that of :mod:`raymerge.merging`.

Legend: K models, R rows (K, and the base last if there is one), n columns of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from raymerge.apps.peers.state_dicts import Entry, Inputs, Part
from raymerge.files.threads import parallel_map
from raymerge.merging.ties import TiesStatistics, elect_sign, strongest, trim, trim_threshold
from raymerge.merging.weighted import (
    NOTHING,
    Cut,
    Drawn,
    largest,
    linear,
    merge_tasks,
    rescale_factor,
)

Merge = Callable[[Part, Tensor], Tensor]
"""Called with a part and its rows (R, n), which it may change; returns the merged columns (n,)."""


class Method(Protocol):
    """A way to merge K models."""

    def prepare(self, inputs: Inputs) -> Merge:
        """Read what is needed of whole tensors and return the merge, which is local to a column."""
        ...


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of one tensor: a weight and a density for each of the K models."""

    weights: tuple[float, ...]
    densities: tuple[float, ...] = ()
    normalize: bool = False
    scaling: float = 1.0
    rescale: bool = False


@dataclass(frozen=True)
class Linear:
    """Σ w θ; the base is the last model if it has a weight."""

    coefficients: Mapping[str, Coefficients]

    def prepare(self, inputs: Inputs) -> Merge:
        def merge(part: Part, rows_Rn: Tensor) -> Tensor:
            own = self.coefficients[part.entry.name]
            return linear(rows_Rn[: len(own.weights)], own.weights, normalize=own.normalize)

        return merge


@dataclass(frozen=True)
class Tasks:
    """θ₀ + λ Σ w m T: task arithmetic, TIES and DARE by tensor, as mergekit defines them.

    ``keep``: the ``largest`` entries of each vector, or ``random`` ones by ``seed`` and the models'
    ``names``; with ``rescale`` the kept ones are rescaled to the vector's sum of magnitudes.
    """

    coefficients: Mapping[str, Coefficients]
    keep: Literal["all", "largest", "random"] = "all"
    elect: bool = False
    names: tuple[str, ...] = ()
    seed: int = 0

    def prepare(self, inputs: Inputs) -> Merge:
        selections = self._selections(inputs)

        def merge(part: Part, rows_Rn: Tensor) -> Tensor:
            base_n, own = rows_Rn[-1], self.coefficients[part.entry.name]
            vectors_Kn = rows_Rn[:-1].sub_(base_n)
            for k, vector_n in enumerate(vectors_Kn):
                selection = selections.get((k, part.entry.name))
                if selection is not None:
                    mask_n = selection.choice.kept(vector_n, part.start)
                    vector_n.mul_(mask_n).mul_(selection.factor)
            return merge_tasks(
                base_n, vectors_Kn, own.weights,
                elect=self.elect, normalize=own.normalize, scaling=own.scaling,
            )  # fmt: skip

        return merge

    def _selections(self, inputs: Inputs) -> dict[tuple[int, str], _Selection]:
        """Return what is kept of each model's vector of each tensor, if not everything."""
        if self.keep == "all":
            return {}
        sparse = [
            (k, entry)
            for entry in inputs.entries
            for k, density in enumerate(self.coefficients[entry.name].densities)
            if density < 1
        ]
        results = parallel_map(lambda item: self._selection(inputs, *item), sparse)
        return {(k, e.name): each for (k, e), each in zip(sparse, results, strict=True)}

    def _selection(self, inputs: Inputs, k: int, entry: Entry) -> _Selection:
        own = self.coefficients[entry.name]
        density = own.densities[k]
        if density <= 0 or entry.numel == 0:
            return _Selection(NOTHING)
        parts = inputs.vectors(k, [entry])
        choice: Cut | Drawn
        if self.keep == "random":
            choice = Drawn(self.seed, f"{self.names[k]}\0{entry.name}", density)
        else:
            count = max(1, int(density * entry.numel))
            choice = largest(parts, count, entry.numel, inputs.sample(k, [entry]))
        return _Selection(choice, rescale_factor(parts, choice) if own.rescale else 1.0)


class _Selection(NamedTuple):
    """The entries of one vector that are kept, and the factor that they are rescaled by."""

    choice: Cut | Drawn
    factor: float = 1.0


@dataclass(frozen=True)
class WholeTies:
    """TIES as in fusion_bench and the official code: one threshold for a whole model.

    ``merge``: ``max`` takes the largest of the entries that agree with the elected sign.
    """

    density: float
    scaling: float
    merge: Literal["sum", "mean", "max"]

    def prepare(self, inputs: Inputs) -> Merge:
        entries, total = inputs.entries, sum(entry.numel for entry in inputs.entries)

        def threshold(k: int) -> tuple[float, ...]:
            parts = inputs.vectors(k, entries)
            return (trim_threshold(parts, total, self.density, inputs.sample(k, entries)),)

        thresholds = tuple(parallel_map(threshold, range(len(inputs.models))))
        ties = TiesStatistics(thresholds, None, self.merge == "mean")

        def balance(part: Part) -> float:
            vectors_Kn = _vectors(inputs.read(part))
            return float(elect_sign(trim(vectors_Kn, ties.column(0, vectors_Kn)), 0.0).sum())

        ties = ties.counted(math.fsum(parallel_map(balance, inputs.parts())))

        def merge(part: Part, rows_Rn: Tensor) -> Tensor:
            phi_Kn = ties.phi(_vectors(rows_Rn), 0)
            merged_n = strongest(phi_Kn) if self.merge == "max" else phi_Kn.sum(0)
            return merged_n.mul_(self.scaling).add_(rows_Rn[-1])

        return merge


def _vectors(rows_Rn: Tensor) -> Tensor:
    return rows_Rn[:-1].sub_(rows_Rn[-1])


def same_everywhere(names: Sequence[str], own: Coefficients) -> dict[str, Coefficients]:
    """Return the same coefficients for every tensor."""
    return dict.fromkeys(names, own)


def finite_number(value: object) -> float | None:
    """Return a setting as a number, None if it is none; YAML reads 1e-3 as a text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):  # an integer of 400 digits
        return None
    return number if math.isfinite(number) else None
