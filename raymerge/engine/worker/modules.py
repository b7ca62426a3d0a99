"""A user's ``nn.Module`` as a worker serves it: its checkpoints, its flat parameters, its batches.

Legend: K models, L layers, P columns of the flat vector, B examples, C classes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raymerge.data.slots import step_images
from raymerge.engine.messages import Heartbeat, StepRequest, StepResult, VectorStorage
from raymerge.engine.worker.vectors import read_vectors
from raymerge.errors import CheckpointError, UserError
from raymerge.merging.basis import Basis
from raymerge.merging.layout import LayerMap, ParameterLayout, Piece
from raymerge.merging.merge import combine, sum_cells
from raymerge.merging.method import Objective
from raymerge.merging.objectives import entropy, image_losses, probability_sum
from raymerge.models.checkpoints.checkpoint import Checkpoint, TensorSpec
from raymerge.models.checkpoints.opening import open_stored
from raymerge.models.checkpoints.task_vectors import stream_rows
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint, match_visual
from raymerge.models.flat import view_flat

Batch = Any
"""Whatever ``logits`` understands."""


Logits = Callable[[nn.Module, Batch, str], Tensor]
"""(model, batch, task) → (B, C), differentiable in the model's parameters."""


Expert = nn.Module | Mapping[str, Tensor] | str | Path


@dataclass
class HeldCheckpoint:
    """A state dict in memory, seen as an opened checkpoint."""

    path: Path
    tensors: Mapping[str, Tensor]
    kind: str = "in memory"

    def __post_init__(self) -> None:
        self.specs: Mapping[str, TensorSpec] = {
            key: TensorSpec(tuple(t.shape), t.dtype) for key, t in self.tensors.items()
        }

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        stored = self.tensors[key].detach().reshape(-1)
        out_n.copy_(stored[start : start + len(out_n)])


@dataclass(frozen=True)
class _Files:
    """θ₀ and the experts, known to fit each other; ``names``: the tasks.

    An opened file does not travel, so this is pickled as what it was opened from.
    """

    layout: ParameterLayout
    pretrained: VisualCheckpoint
    experts: tuple[VisualCheckpoint, ...]
    names: tuple[str, ...]
    source: tuple[nn.Module, Mapping[str, Expert], Callable[[str], bool]]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Files.open, self.source

    @classmethod
    def open(
        cls, model: nn.Module, experts: Mapping[str, Expert], merged: Callable[[str], bool]
    ) -> _Files:
        layout = _layout(model, merged)
        if not layout.names:
            raise UserError("merged: no floating-point tensor of the model is to be merged")
        ignored = model.state_dict().keys() - set(layout.names)
        pretrained = match_visual(_held("the model", model.state_dict(), ignored), layout)
        opened = [
            match_visual(_opened(name, expert, ignored), layout) for name, expert in experts.items()
        ]
        return cls(layout, pretrained, tuple(opened), tuple(experts), (model, experts, merged))


def _layout(model: nn.Module, merged: Callable[[str], bool]) -> ParameterLayout:
    """The tensors to merge, in the state dict's order; of tied ones the first."""
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {
        name for name, _ in model.named_parameters()
    }
    state = model.state_dict()
    return ParameterLayout.of({k: t for k, t in state.items() if k not in tied and merged(k)})


def _opened(name: str, expert: Expert, ignored: set[str]) -> Checkpoint:
    if isinstance(expert, nn.Module):
        expert = expert.state_dict()
    if isinstance(expert, Mapping):
        return _held(f"experts[{name!r}]", expert, ignored)
    opened = open_stored(str(expert))
    opened.specs = {key: spec for key, spec in opened.specs.items() if key not in ignored}
    return opened


def _held(name: str, tensors: Mapping[str, Tensor], ignored: set[str]) -> Checkpoint:
    wrong = [key for key, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    if wrong:
        raise CheckpointError(f"{name}: {wrong[0]!r} is no tensor; give a state dict")
    kept = {key: tensor for key, tensor in tensors.items() if key not in ignored}
    return HeldCheckpoint(Path(name), kept)


class _FlatModel:
    """A copy of the user's module over flat θ and ∂ℒ/∂θ, in evaluation mode."""

    def __init__(self, model: nn.Module, layout: ParameterLayout) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.theta_P = torch.zeros(layout.columns, device=device)
        self.gradient_P = torch.zeros(layout.columns, device=device)
        view_flat(self.module, layout, self.theta_P, self.gradient_P)

    def set(self, files: _Files, basis: Basis | None, layers: LayerMap, lambdas_JL: Tensor) -> None:
        """Write θ, read from the files: nothing is pinned for it."""
        layout, lambdas_JT = files.layout, layers.expand(lambdas_JL.float())

        def write(piece: Piece, base_n: Tensor, rows_Jn: Tensor) -> None:
            theta_n = combine(base_n, rows_Jn, lambdas_JT[:, piece.tensor])
            self.theta_P[piece.start : piece.stop].copy_(theta_n)

        for _ in stream_rows(write, files.pretrained, files.experts, basis, layout.shard(0, 1)):
            pass


@dataclass(frozen=True)
class _Task:
    """What every worker is given: the models and what is minimised."""

    model: nn.Module
    files: _Files
    basis: Basis | None
    layers: LayerMap
    objective: Objective
    batches: int
    seed: int


@dataclass(frozen=True)
class Given:
    """The user's batches of the tasks with these indices. ``classes``: of the task with the most.

    ``rank``: of the worker that they are for.
    """

    logits: Logits
    batches: Mapping[int, Sequence[Batch]]
    classes: int
    rank: int = 0


@dataclass(repr=False)
class ModuleWorker:
    """Pins θ₀ and V and computes the gradients of its tasks' batches; see ``MergeWorker``."""

    task: _Task
    given: Given
    _teachers: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _since: float = 0.0

    def __post_init__(self) -> None:
        task, files = self.task, self.task.files
        self._flat = _FlatModel(task.model, files.layout)
        shard = files.layout.shard(0, 1)
        self._layer_of_cell = task.layers.of_cells(shard)
        if task.objective.name == "kl":
            self._teach()
        self._vectors = read_vectors(
            VectorStorage(), files.pretrained, files.experts, task.basis, shard, task.layers,
            self._flat.theta_P.device,
        )  # fmt: skip

    @torch.no_grad()
    def _teach(self) -> None:
        """The logits of each task's own expert on its batches."""
        files, layers = self.task.files, self.task.layers
        for k, batches in self.given.batches.items():
            alone = torch.zeros(len(files.names), len(layers.names))
            alone[k] = 1.0
            self._flat.set(files, None, layers, alone)
            for i, batch in enumerate(batches):
                self._teachers[k, i] = self._logits(k, batch).detach()

    def _logits(self, task: int, batch: Batch) -> Tensor:
        return self.given.logits(self._flat.module, batch, self.task.files.names[task]).float()

    def ping(self) -> Heartbeat:
        """It answers while it works."""
        return Heartbeat("step", time.perf_counter() - self._since)

    def step(self, request: StepRequest) -> StepResult:
        """The gradient, and the means over its tasks' batches, of one step at the request's λ."""
        began = self._since = time.perf_counter()
        names, layers = self.task.files.names, self.task.layers
        self._vectors.merge(torch.from_numpy(request.lambdas), self._flat.theta_P)
        self._flat.gradient_P.zero_()
        result = StepResult(
            request.step,
            self.given.rank,
            request.generation,
            np.zeros((len(names), len(layers.names))),
            np.zeros(len(names)),
            np.zeros(len(names)),
            np.zeros((len(names), self.given.classes)),
        )
        for task in self.given.batches:
            if request.weights is None or request.weights[task]:
                self._add(request, task, result)
        per_cell_CK = self._vectors.inner_products(self._flat.gradient_P)
        result.gradient[:] = sum_cells(per_cell_CK, self._layer_of_cell, len(layers.names)).numpy()
        result.seconds["step"] = time.perf_counter() - began  # type: ignore[index]
        return result

    def _add(self, request: StepRequest, task: int, result: StepResult) -> None:
        """One task's batches of this step: a backward each."""
        batches, count = self.given.batches[task], self.task.batches
        name = self.task.files.names[task]
        for i in step_images(self.task.seed, name, request.step, count, len(batches)).tolist():
            logits_BC = self._logits(task, batches[i])
            examples, classes = logits_BC.shape
            marginal_C = None
            if request.marginals is not None:
                marginal_C = torch.from_numpy(request.marginals[task, :classes])
            target = self._teachers.get((task, i))
            losses_B = image_losses(self.task.objective, logits_BC, target, marginal_C)
            weight = 1.0 if request.weights is None else float(request.weights[task])
            (losses_B.mean() * weight).backward()
            share = 1 / min(count, len(batches))
            result.loss[task] += float(losses_B.detach().double().mean()) * weight
            result.entropy[task] += float(entropy(logits_BC.detach()).double().mean()) * share
            mean_p_C = probability_sum(logits_BC) / examples * share
            result.probabilities[task, :classes] += mean_p_C.cpu().numpy()
