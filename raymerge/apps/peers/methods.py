"""How the rows of a part become merged columns, as mergekit's and fusion_bench's files ask.

A method first reads what it needs of whole tensors (``prepare``), then works on any part.

Legend: K models, R rows (K, and the base last if there is one), n columns of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from raymerge.apps.peers.state_dicts import Entry, Inputs, Part
from raymerge.files.threads import parallel_map
from raymerge.merging.dare import dropped
from raymerge.merging.layout import CELL
from raymerge.merging.ties import TiesStatistics, elect_sign, trim, trim_threshold
from raymerge.merging.weighted import NOTHING, Cut, largest, linear, merge_tasks

Merge = Callable[[Part, Tensor], Tensor]
"""Of a part and its rows (R, n), which it may change: the merged columns (n,)."""

_SMALLEST_NORM = 1e-7
"""A vector with less than this is not rescaled."""


class Method(Protocol):
    def prepare(self, inputs: Inputs) -> Merge:
        """Read what is needed of whole tensors; the rest is local to a column."""
        ...


@dataclass(frozen=True)
class Coefficients:
    """What one tensor is merged with; a weight and a density for each of the K models."""

    weights: tuple[float, ...]
    densities: tuple[float, ...] = ()
    normalize: bool = False
    scaling: float = 1.0
    rescale: bool = False


@dataclass(frozen=True)
class Linear:
    """Σ w θ; a base counts as the last model if there is a weight for it."""

    of_tensor: Mapping[str, Coefficients]

    def prepare(self, inputs: Inputs) -> Merge:
        def merge(part: Part, rows_Rn: Tensor) -> Tensor:
            own = self.of_tensor[part.entry.name]
            return linear(rows_Rn[: len(own.weights)], own.weights, normalize=own.normalize)

        return merge


@dataclass(frozen=True)
class Tasks:
    """θ₀ + λ Σ w m T: task arithmetic, TIES and DARE by tensor, as mergekit defines them.

    ``keep``: ``largest`` entries of each vector, or ``random`` ones by ``seed`` and the models'
    ``names``; with ``rescale`` a vector then regains its sum of magnitudes.
    """

    of_tensor: Mapping[str, Coefficients]
    keep: Literal["all", "largest", "random"] = "all"
    elect: bool = False
    names: tuple[str, ...] = ()
    seed: int = 0

    def prepare(self, inputs: Inputs) -> Merge:
        kept = self._kept(inputs)

        def merge(part: Part, rows_Rn: Tensor) -> Tensor:
            base_n, own = rows_Rn[-1], self.of_tensor[part.entry.name]
            vectors_Kn = rows_Rn[:-1].sub_(base_n)
            for k, vector_n in enumerate(vectors_Kn):
                some = kept.get((k, part.entry.name))
                if some is not None:
                    vector_n.mul_(some.mask(vector_n, part)).mul_(some.factor)
            return merge_tasks(
                base_n, vectors_Kn, own.weights,
                elect=self.elect, normalize=own.normalize, scaling=own.scaling,
            )  # fmt: skip

        return merge

    def _kept(self, inputs: Inputs) -> dict[tuple[int, str], _Kept]:
        """What is kept of each model's vector of each tensor, where that is not all."""
        if self.keep == "all":
            return {}
        wanted = [
            (k, entry)
            for entry in inputs.entries
            for k, density in enumerate(self.of_tensor[entry.name].densities)
            if density < 1
        ]
        found = parallel_map(lambda item: self._kept_of(inputs, *item), wanted)
        return {(k, e.name): kept for (k, e), kept in zip(wanted, found, strict=True)}

    def _kept_of(self, inputs: Inputs, k: int, entry: Entry) -> _Kept:
        own = self.of_tensor[entry.name]
        density = own.densities[k]
        if density <= 0 or entry.numel == 0:
            return _Kept(NOTHING)
        parts = inputs.vectors(k, [entry])
        if self.keep == "random":
            kept = _Kept(_Drawn(self.seed, f"{self.names[k]}\0{entry.name}", density))
        else:
            count = max(1, int(density * entry.numel))
            kept = _Kept(largest(parts, count, entry.numel, inputs.sample(k, [entry])))
        return replace(kept, factor=_factor(kept, parts, entry)) if own.rescale else kept


@dataclass(frozen=True)
class _Drawn:
    """Random entries of one vector: the same whatever the slice."""

    seed: int
    name: str
    density: float

    def kept(self, vector_n: Tensor, start: int) -> Tensor:
        shift = start % CELL
        columns = len(vector_n) + shift
        dropped_n = dropped(self.seed, self.name, start - shift, columns, self.density)
        return ~dropped_n[shift:]


@dataclass(frozen=True)
class _Kept:
    choice: Cut | _Drawn
    factor: float = 1.0

    def mask(self, vector_n: Tensor, part: Part) -> Tensor:
        return self.choice.kept(vector_n, part.start)


def _factor(kept: _Kept, parts: Callable[[], Iterator[Tensor]], entry: Entry) -> float:
    """What gives the kept entries the sum of magnitudes of all."""
    before, after, start = 0.0, 0.0, 0
    for vector_n in parts():
        magnitude_n = vector_n.abs().double()
        part = Part(entry, start, start + len(vector_n))
        before += float(magnitude_n.sum())
        after += float(magnitude_n[kept.mask(vector_n, part)].sum())
        start = part.stop
    return before / after if min(before, after) >= _SMALLEST_NORM else 1.0


@dataclass(frozen=True)
class WholeTies:
    """TIES as fusion_bench and the official code trim: one threshold for a whole model.

    ``max``: of the entries that agree with the elected sign, the largest.
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
            merged_n = _strongest(phi_Kn) if self.merge == "max" else phi_Kn.sum(0)
            return merged_n.mul_(self.scaling).add_(rows_Rn[-1])

        return merge


def _vectors(rows_Rn: Tensor) -> Tensor:
    return rows_Rn[:-1].sub_(rows_Rn[-1])


def _strongest(phi_Kn: Tensor) -> Tensor:
    """Of each column's entries, which have one sign, the one farthest from zero."""
    return torch.where(phi_Kn.sum(0) > 0, phi_Kn.amax(0), phi_Kn.amin(0))


def same_everywhere(names: Sequence[str], own: Coefficients) -> dict[str, Coefficients]:
    return dict.fromkeys(names, own)
