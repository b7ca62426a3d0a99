"""A user's ``nn.Module`` as workers serve it: its checkpoints, its flat parameters, its batches.

One example of the engine is one batch of the user, of any content; the user's function returns its
logits. Batches have no labels here, so nothing is scored.

Legend: K models, P columns of the flat vector, B rows of a batch, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raymerge.data.slots import step_images
from raymerge.engine.messages import ChunkScore, EvaluateRequest, StatisticsRequest, WorkerSpec
from raymerge.engine.worker.served import Examples, Pinned
from raymerge.errors import CheckpointError, UserError
from raymerge.files.progress import Progress
from raymerge.merging.fisher import add_row_squares
from raymerge.merging.layout import ParameterLayout
from raymerge.models.checkpoints.checkpoint import Checkpoint, TensorSpec
from raymerge.models.checkpoints.opening import open_stored
from raymerge.models.checkpoints.recognise import prefixes_of
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint, match_visual
from raymerge.models.flat import view_flat

Batch = Any
"""Any value that the user's ``logits`` function takes."""
Logits = Callable[[nn.Module, Batch, str], Tensor]
"""(model, batch, task) → (B, C), differentiable in the model's parameters."""
Expert = nn.Module | Mapping[str, Tensor] | str | Path
T = TypeVar("T")


@dataclass(frozen=True)
class Value(Generic[T]):
    """A getter of a value in this process; a group of actors replaces it by one of its own."""

    value: T

    def __call__(self) -> T:
        return self.value


@dataclass(frozen=True)
class ModuleParts:
    """A user's pretrained module, experts by task, and function that returns logits.

    ``merged``: returns True for the name of a tensor to merge.
    """

    module: nn.Module
    experts: Mapping[str, Expert]
    merged: Callable[[str], bool]
    logits: Logits | None


@dataclass(frozen=True)
class ModuleSource:
    """A user's module and batches, as getters, so that a worker fetches only its own tasks'.

    ``classes``: the largest number of classes of any task.
    """

    task_names: tuple[str, ...]
    parts: Callable[[], ModuleParts]
    batches: tuple[Callable[[], Sequence[Batch]], ...]
    populations: tuple[int, ...]
    classes: int

    def inputs(self) -> Mapping[str, Callable[[], str]]:
        """Return nothing: the driver sends the model, its experts and examples themselves."""
        return {}

    def serve(self, spec: WorkerSpec, pinned: Pinned) -> ModuleModel:
        return ModuleModel(self, spec, pinned)

    def store_parts(self, put: Callable[[Any], Callable[[], Any]]) -> ModuleSource:
        batches = tuple(put(get()) for get in self.batches)
        return replace(self, parts=put(self.parts()), batches=batches)


@dataclass
class StateDictCheckpoint:
    """A state dict in memory, with the interface of an opened checkpoint."""

    path: Path
    tensors: Mapping[str, Tensor]
    kind: str = "in memory"

    def __post_init__(self) -> None:
        self.specs: Mapping[str, TensorSpec] = {
            key: TensorSpec(tuple(t.shape), t.dtype) for key, t in self.tensors.items()
        }

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        flat_n = self.tensors[key].detach().reshape(-1)
        out_n.copy_(flat_n[start : start + len(out_n)])


@dataclass(frozen=True)
class ModuleFiles:
    """θ₀ and the experts by task, checked to have the same tensors."""

    layout: ParameterLayout
    pretrained: VisualCheckpoint
    experts: Mapping[str, VisualCheckpoint]

    @classmethod
    def open(cls, parts: ModuleParts) -> ModuleFiles:
        """Open the user's models.

        Raises :class:`UserError` where nothing is merged or an expert does not fit.
        """
        state = parts.module.state_dict()
        layout = _layout(parts.module, parts.merged)
        if not layout.names:
            raise UserError(
                "merged: no floating-point tensor of the model is merged; select at least one"
            )
        ignored = state.keys() - set(layout.names)
        experts = {
            name: match_visual(_open_expert(name, expert, layout, ignored), layout)
            for name, expert in parts.experts.items()
        }
        pretrained = match_visual(_as_checkpoint("the model", state, ignored), layout)
        return cls(layout, pretrained, experts)


def _layout(model: nn.Module, merged: Callable[[str], bool]) -> ParameterLayout:
    """Return the layout of the tensors to merge, in the state dict's order; tied ones once."""
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {
        name for name, _ in model.named_parameters()
    }
    state = model.state_dict()
    return ParameterLayout.of({k: t for k, t in state.items() if k not in tied and merged(k)})


def _open_expert(
    name: str, expert: Expert, layout: ParameterLayout, ignored: set[str]
) -> Checkpoint:
    if isinstance(expert, nn.Module):
        expert = expert.state_dict()
    if isinstance(expert, Mapping):
        return _as_checkpoint(f"experts[{name!r}]", expert, ignored)
    checkpoint = open_stored(str(expert))
    specs, prefixes = checkpoint.specs, prefixes_of(checkpoint.specs, layout.names)
    skipped = {prefix + key for prefix in ("", *prefixes) for key in ignored}
    checkpoint.specs = {key: spec for key, spec in specs.items() if key not in skipped}
    return checkpoint


def _as_checkpoint(name: str, tensors: Mapping[str, Tensor], ignored: set[str]) -> Checkpoint:
    others = [key for key, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    if others:
        raise CheckpointError(f"{name}: {others[0]!r} is not a tensor; pass a state dict")
    merged = {key: tensor for key, tensor in tensors.items() if key not in ignored}
    return StateDictCheckpoint(Path(name), merged)


class ModuleModel:
    """A copy of the user's module over flat θ and ∂ℒ/∂θ, in evaluation mode.

    One batch is one pass, because batches of different tasks may have nothing in common.
    """

    slots_per_pass = 1

    def __init__(self, source: ModuleSource, spec: WorkerSpec, pinned: Pinned) -> None:
        parts = source.parts()
        files = ModuleFiles.open(parts)
        self._source, self._logits, self._pinned = source, parts.logits, pinned
        self.layout, self.pretrained, self._experts = files.layout, files.pretrained, files.experts
        self.classes = source.classes
        columns = self.layout.shard(spec.shard, spec.shards).padded_columns
        self.module, self.theta_P, self.gradient_P = flat_copy(parts.module, self.layout, columns)

    def open_expert(self, reference: str) -> VisualCheckpoint:
        return self._experts[reference]

    def load_expert(self, task: int) -> None:
        expert = self._experts[self._source.task_names[task]]
        self.theta_P.copy_(expert.flat(len(self.theta_P)))

    def populations(self) -> list[int]:
        return list(self._source.populations)

    def pin(
        self, needed: Mapping[int, NDArray[np.int64]], progress: Progress, threads: int
    ) -> None:
        for task in needed:
            if task not in self._pinned:
                self._pinned[task] = self._source.batches[task]()
                progress(len(self._pinned[task]))

    def pinned_bytes(self) -> int:
        """Return 0: a batch may be any value, so its size is not known."""
        return 0

    def outputs(self, examples: Sequence[Examples], autocast: bool) -> list[Tensor]:
        return [
            torch.cat([self._batch_logits(task, self._pinned[task][i]) for i in batches.tolist()])
            for task, batches in examples
        ]

    def _batch_logits(self, task: int, batch: Batch) -> Tensor:
        assert self._logits is not None
        name = self._source.task_names[task]
        logits_BC = self._logits(self.module, batch, name)
        if not len(logits_BC):
            raise UserError(f"batches of task {name!r}: one has no rows; leave it out")
        return logits_BC.float()

    def labels(self, task: int) -> Tensor:
        raise UserError("method.objective: cross_entropy needs labels, and batches have none")

    def statistics(self, request: StatisticsRequest) -> dict[str, Tensor]:
        """Return the Fisher diagonal (P,) over the rows of the drawn batches, zero for buffers."""
        self.load_expert(request.task)
        name, batches = self._source.task_names[request.task], self._source.batches[request.task]()
        count = min(request.images, len(batches))
        indices = np.sort(step_images(request.seed, name, 0, count, len(batches)))
        generator = torch.Generator().manual_seed(request.seed)
        total_P, rows = torch.zeros_like(self.gradient_P), 0
        for i in indices.tolist():
            logits_BC = self._batch_logits(request.task, batches[i])
            add_row_squares(logits_BC, self.gradient_P, total_P, request.samples, generator)
            rows += len(logits_BC)
        return {"fisher": total_P[: self.layout.columns] / rows}

    def scores(
        self, request: EvaluateRequest, rank: int, workers: int, progress: Progress | None
    ) -> list[ChunkScore]:
        """Return no scores: a user's batches have no labels, so no task has test examples."""
        return []


def flat_copy(
    module: nn.Module, layout: ParameterLayout, columns: int | None = None
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a copy of ``module`` in evaluation mode, its flat θ and its ∂ℒ/∂θ, both (P,).

    All lie on the module's device. ``columns``: P, by default the layout's.
    """
    clone = copy.deepcopy(module).eval().requires_grad_(False)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    theta_P, gradient_P = (torch.zeros(columns or layout.columns, device=device) for _ in range(2))
    view_flat(clone, layout, theta_P, gradient_P)
    return clone, theta_P, gradient_P
