"""Fisher merging and RegMean: the merged vector from what every expert makes of its own images.

The driver's side: it asks the workers task by task and adds up in task order, so what it holds does
not grow with the number of tasks.

Legend: K models, P columns of the flat vector, I and O the inputs and outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymerge.config import Config, Fisher, RegMean, RegMeanPP
from raymerge.engine.driver.groups import WorkerGroup
from raymerge.engine.messages import Statistics, StatisticsRequest
from raymerge.files.progress import Progress, progress_bar
from raymerge.merging.fisher import FisherSum, task_weight
from raymerge.merging.layout import ParameterLayout
from raymerge.merging.regmean import RegMeanSum
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint

Arrays = Mapping[str, NDArray[np.float32]]


def merged_delta(
    config: Config,
    group: WorkerGroup,
    pretrained: VisualCheckpoint,
    experts: Sequence[VisualCheckpoint],
) -> Tensor:
    """θ − θ₀ on the flat grid, (P,). Raises :class:`~raymerge.errors.UserError` for a bad file."""
    solve = _Solver(config, group, pretrained, experts)
    with progress_bar("statistics", unit="task") as progress:
        if isinstance(config.method, Fisher):
            return solve.fisher(config.method, progress)
        if isinstance(config.method, RegMeanPP):
            return solve.regmean_pp(config.method, progress)
        assert isinstance(config.method, RegMean)
        return solve.regmean(config.method, progress)


class _Solver:
    def __init__(
        self,
        config: Config,
        group: WorkerGroup,
        pretrained: VisualCheckpoint,
        experts: Sequence[VisualCheckpoint],
    ) -> None:
        self._config, self._group = config, group
        self._experts, self._base_P = experts, pretrained.flat()
        self._layout: ParameterLayout = pretrained.layout
        self._indices = [k for k, task in enumerate(config.tasks) if task.checkpoint is not None]

    def fisher(self, method: Fisher, progress: Progress) -> Tensor:
        total = FisherSum(self._layout.columns)
        samples = None if method.samples == "exact" else method.samples
        requests = [self._request("fisher", k, method.images, samples) for k in self._indices]
        for expert, found in self._gather(requests, progress):
            fisher_P = torch.from_numpy(np.array(found["fisher"]))
            total.add(fisher_P, self._vector(expert), task_weight(fisher_P))
        return total.delta()

    def regmean(self, method: RegMean, progress: Progress) -> Tensor:
        sums: dict[str, RegMeanSum] = {}
        requests = [self._request("grams", k, method.images) for k in self._indices]
        mean_P = torch.zeros(self._layout.columns)
        for expert, found in self._gather(requests, progress):
            vector_P = self._vector(expert)
            mean_P += vector_P / len(self._experts)
            _add(sums, found, self._layout.views(vector_P), method.alpha)
        _write(sums, self._layout.views(mean_P))
        return mean_P

    def regmean_pp(self, method: RegMeanPP, progress: Progress) -> Tensor:
        """Block by block: the inputs of each are those that the merged blocks before it give."""
        delta_P = torch.zeros(self._layout.columns)
        for expert in self._experts:
            delta_P += self._vector(expert) / len(self._experts)
        deltas, base = self._layout.views(delta_P), self._layout.views(self._base_P)
        blocks = 1 + max(_block(name) for name in self._layout.names)
        new = [name for name in self._layout.names if _block(name) < 0]
        for block in range(blocks + 1):
            merged = {name: (base[name] + deltas[name]).numpy() for name in new}
            requests = [
                self._request("block_grams", k, method.images, block=block, merged=merged)
                for k in self._indices
            ]
            sums: dict[str, RegMeanSum] = {}
            for expert, found in self._gather(requests, progress):
                vectors = self._tensors(expert, list(found))
                _add(sums, found, vectors, method.alpha)
            _write(sums, deltas)
            new = [name for name in self._layout.names if _block(name) == block]
        return delta_P

    def _gather(
        self, requests: Sequence[StatisticsRequest], progress: Progress
    ) -> Iterator[tuple[VisualCheckpoint, Arrays]]:
        answers: Iterator[Statistics] = self._group.statistics(requests)
        for expert, answer in zip(self._experts, answers, strict=True):
            yield expert, answer.values
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
        return StatisticsRequest(
            kind,
            task,
            images,
            self._config.seed,
            samples,
            block,
            merged or {},
        )

    def _vector(self, expert: VisualCheckpoint) -> Tensor:
        return expert.flat().sub_(self._base_P)

    def _tensors(self, expert: VisualCheckpoint, names: Sequence[str]) -> dict[str, Tensor]:
        """Some tensors of a task vector."""
        base, out = self._layout.views(self._base_P), {}
        for name in names:
            t = self._layout.names.index(name)
            values_n = torch.empty(self._layout.sizes[t])
            expert.read(self._layout.whole_piece(t), values_n)
            out[name] = values_n.view(self._layout.shapes[t]).sub_(base[name])
        return out


def _add(
    sums: dict[str, RegMeanSum], found: Arrays, vectors: Mapping[str, Tensor], alpha: float
) -> None:
    from raymerge.engine.worker.grams import in_by_out

    for name, gram in found.items():
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
    """The transformer block that a tensor belongs to; -1 of those before and after."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["transformer", "resblocks"] else -1
