"""Fisher merging and RegMean: the merged vector from statistics of each expert on its examples.

The driver requests them task by task and adds them up in task order, so its memory does not grow
with the number of tasks. Computing them is left to ``engine.worker``.

Legend: K models, P columns of the flat vector, I and O the inputs and outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymerge.config.methods import Fisher, RegMean, RegMeanPP
from raymerge.engine.driver.groups import WorkerGroup
from raymerge.engine.messages import StatisticsRequest, StatisticsResult
from raymerge.files.progress import Progress, progress_bar
from raymerge.merging.fisher import FisherSum, task_weight
from raymerge.merging.layout import ParameterLayout
from raymerge.merging.method import Statistics
from raymerge.merging.regmean import RegMeanSum
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint

Arrays = Mapping[str, NDArray[np.float32]]


def merged_delta(
    kind: Statistics,
    options: Any,
    group: WorkerGroup,
    tasks: Sequence[int],
    pretrained: VisualCheckpoint,
    experts: Sequence[VisualCheckpoint],
    seed: int,
) -> Tensor:
    """Return θ − θ₀ on the flat grid, (P,).

    ``tasks``: the index of each expert's task. Raises :class:`~raymerge.errors.UserError` for a
    damaged file.
    """
    solver = _Solver(group, tasks, pretrained, experts, seed)
    solve: Mapping[Statistics, Callable[[Any, Progress], Tensor]] = {
        "fisher": solver.fisher,
        "regmean": solver.regmean,
        "regmean_pp": solver.regmean_pp,
    }
    with progress_bar("statistics", unit="task") as progress:
        return solve[kind](options, progress)


class _Solver:
    """Adds up the experts' statistics and solves for the merged vector, a method for each kind."""

    def __init__(
        self,
        group: WorkerGroup,
        tasks: Sequence[int],
        pretrained: VisualCheckpoint,
        experts: Sequence[VisualCheckpoint],
        seed: int,
    ) -> None:
        self._group, self._tasks, self._seed = group, tasks, seed
        self._experts, self._base_P = experts, pretrained.flat()
        self._layout: ParameterLayout = pretrained.layout

    def fisher(self, options: Fisher, progress: Progress) -> Tensor:
        total = FisherSum(self._layout.columns)
        samples = None if options.samples == "exact" else options.samples
        requests = [self._request("fisher", k, options.images, samples) for k in self._tasks]
        for expert, arrays in self._gather(requests, progress):
            fisher_P = torch.from_numpy(np.array(arrays["fisher"]))
            total.add(fisher_P, self._vector(expert), task_weight(fisher_P))
        return total.delta()

    def regmean(self, options: RegMean, progress: Progress) -> Tensor:
        sums: dict[str, RegMeanSum] = {}
        requests = [self._request("grams", k, options.images) for k in self._tasks]
        mean_P = torch.zeros(self._layout.columns)
        for expert, arrays in self._gather(requests, progress):
            vector_P = self._vector(expert)
            mean_P += vector_P / len(self._experts)
            _add(sums, arrays, self._layout.views(vector_P), options.alpha)
        _write(sums, self._layout.views(mean_P))
        return mean_P

    def regmean_pp(self, options: RegMeanPP, progress: Progress) -> Tensor:
        """Solve block by block: the inputs of each come from the merged blocks before it."""
        delta_P = torch.zeros(self._layout.columns)
        for expert in self._experts:
            delta_P += self._vector(expert) / len(self._experts)
        deltas, base = self._layout.views(delta_P), self._layout.views(self._base_P)
        blocks = 1 + max(_block(name) for name in self._layout.names)
        new_names = [name for name in self._layout.names if _block(name) < 0]
        for block in range(blocks + 1):
            # Only the tensors merged since the last block travel; the workers have the others.
            merged = {name: (base[name] + deltas[name]).numpy() for name in new_names}
            requests = [
                self._request("block_grams", k, options.images, block=block, merged=merged)
                for k in self._tasks
            ]
            sums: dict[str, RegMeanSum] = {}
            for expert, arrays in self._gather(requests, progress):
                vectors = self._tensors(expert, list(arrays))
                _add(sums, arrays, vectors, options.alpha)
            _write(sums, deltas)
            new_names = [name for name in self._layout.names if _block(name) == block]
        return delta_P

    def _gather(
        self, requests: Sequence[StatisticsRequest], progress: Progress
    ) -> Iterator[tuple[VisualCheckpoint, Arrays]]:
        results: Iterator[StatisticsResult] = self._group.statistics(requests)
        for expert, result in zip(self._experts, results, strict=True):
            yield expert, result.values
            progress(1)

    def _request(
        self,
        kind: Literal["fisher", "grams", "block_grams"],
        task: int,
        images: int,
        samples: int | None = None,
        block: int = 0,
        merged: Arrays | None = None,
    ) -> StatisticsRequest:
        return StatisticsRequest(kind, task, images, self._seed, samples, block, merged or {})

    def _vector(self, expert: VisualCheckpoint) -> Tensor:
        return expert.flat().sub_(self._base_P)

    def _tensors(self, expert: VisualCheckpoint, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the tensors ``names`` of the expert's task vector."""
        base, out = self._layout.views(self._base_P), {}
        for name in names:
            t = self._layout.names.index(name)
            values_n = torch.empty(self._layout.sizes[t])
            expert.read(self._layout.whole_piece(t), values_n)
            out[name] = values_n.view(self._layout.shapes[t]).sub_(base[name])
        return out


def _add(
    sums: dict[str, RegMeanSum], arrays: Arrays, vectors: Mapping[str, Tensor], alpha: float
) -> None:
    from raymerge.engine.worker.grams import in_by_out

    for name, gram in arrays.items():
        vector_IO = in_by_out(name, vectors[name])
        if name not in sums:
            inputs, outputs = vector_IO.shape
            sums[name] = RegMeanSum(inputs, outputs, alpha)
        sums[name].add(torch.from_numpy(np.array(gram)), vector_IO)


def _write(sums: Mapping[str, RegMeanSum], deltas: Mapping[str, Tensor]) -> None:
    from raymerge.engine.worker.grams import in_by_out

    for name, total in sums.items():
        deltas[name].copy_(in_by_out(name, total.solve().float()))


def _block(name: str) -> int:
    """Return the transformer block of a tensor, -1 for a tensor before or after the blocks."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["transformer", "resblocks"] else -1
