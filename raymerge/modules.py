"""Merge models of any kind: a user's ``nn.Module``, batches, and a function that gives logits.

The maths and the loop are those of the CLIP merges; what a user brings replaces images and heads.

Legend: K models, L layers, T tensors, P columns of the flat vector, B examples, C classes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from raymerge.checkpoints.reader import Checkpoint, TensorSpec, open_stored
from raymerge.checkpoints.task_vectors import stream_rows, ties_statistics
from raymerge.checkpoints.visual import VisualCheckpoint, match_visual
from raymerge.config import AdaMerging, MethodConfig, OptimizerConfig, Ties
from raymerge.config.wording import explain
from raymerge.data.slots import step_images
from raymerge.driver import Stepper, StepRecord, learn
from raymerge.errors import CheckpointError, UserError
from raymerge.flat import view_flat
from raymerge.losses import image_losses
from raymerge.merging.bases import basis_of
from raymerge.merging.basis import Basis
from raymerge.merging.layout import LayerMap, ParameterLayout, Piece
from raymerge.merging.merge import combine, sum_cells
from raymerge.merging.objectives import entropy, probability_sum
from raymerge.merging.optimizer import Adam, AdamState
from raymerge.merging.registry import granularity_of, method_of
from raymerge.merging.ties import TiesStatistics
from raymerge.messages import Incident, Loss, Pulse, StepRequest, StepResult, VectorStorage
from raymerge.progress import progress_bar
from raymerge.vectors import read_vectors
from raymerge.watch import Watch

Batch = Any
"""Whatever ``logits`` understands."""
Logits = Callable[[nn.Module, Batch, str], Tensor]
"""(model, batch, task) → (B, C), differentiable in the model's parameters."""
Expert = nn.Module | Mapping[str, Tensor] | str | Path


@dataclass(frozen=True)
class MergedModule:
    """``state_dict``: of the whole model, merged where it was to be, else the pretrained values.

    ``lambdas``: (K, L) float64, one row a model in the order of ``experts``; (1, L) where the
    method has merged them into one vector. ``records``: one a step, of methods that learn.
    ``incidents``: the failures of workers that were survived.
    """

    state_dict: Mapping[str, Tensor]
    lambdas: Tensor
    layers: tuple[str, ...]
    records: Sequence[StepRecord]
    incidents: Sequence[Incident] = ()


def merge_module(
    model: nn.Module,
    experts: Mapping[str, Expert],
    method: str | Mapping[str, Any] | MethodConfig = "adamerging",
    *,
    batches: Mapping[str, Sequence[Batch]] | None = None,
    logits: Logits | None = None,
    optimizer: OptimizerConfig | Mapping[str, Any] | None = None,
    merged: Callable[[str], bool] = lambda name: True,
    seed: int = 0,
    workers: int = 0,
) -> MergedModule:
    """Merge fine-tuned copies of ``model``, which holds the pretrained weights and is not changed.

    ``experts``: by task, a module, a state dict, or a checkpoint file. ``method``: as in a config;
    every method that needs the checkpoints alone, and ``adamerging``, which learns λ on
    ``batches`` (by task, unlabeled; a step uses one of each) with ``logits``. ``merged``: which
    tensors of the state dict are merged (say, all but the tasks' own heads); default: all floating
    point ones. ``workers``: 0 for this process, else so many Ray actors among which the tasks are
    split; then everything given must be picklable. A worker that is lost is replaced, and its step
    repeated.

    In a config's terms the batches' sizes are the user's, so ``optimizer.batch_size`` counts for
    nothing. Raises :class:`UserError` before any work where the input is wrong.
    """
    chosen = _method(method)
    options = _validated(_Optimizer, {"optimizer": optimizer or {}}, "optimizer").optimizer
    if not isinstance(experts, Mapping):
        raise UserError(
            f"experts: a {type(experts).__name__}, not a mapping from a task's name to its model"
        )
    if not experts:
        raise UserError("experts: is empty; give at least one fine-tuned model by its task's name")
    files = _Files.open(model, experts, merged)
    kept = method_of(chosen)
    basis = basis_of(chosen, list(experts), seed, lambda: _ties(chosen, files))
    layers = files.layout.layers(granularity_of(chosen))
    rows = len(experts) if kept.rows else 1
    scaling = kept.scaling(chosen, len(experts))
    start = torch.full((rows, len(layers.names)), scaling, dtype=torch.float64)
    records: list[StepRecord] = []
    incidents: Sequence[Incident] = ()
    if isinstance(chosen, AdaMerging):
        task = _Task(model, files, basis, layers, _loss(chosen), options.batches, seed)
        start, incidents = _learn(task, chosen, options, batches, logits, start, workers, records)
    state = _merged_state(model, files, basis, layers, start)
    return MergedModule(state, start, layers.names, records, incidents)


# --- what the user gives -----------------------------------------------------------------------


class _Method(BaseModel):
    model_config = ConfigDict(extra="forbid")
    method: MethodConfig


class _Optimizer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    optimizer: OptimizerConfig


def _validated(schema: Any, data: Mapping[str, Any], where: str) -> Any:
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, schema)) from None


def _method(given: str | Mapping[str, Any] | MethodConfig) -> MethodConfig:
    data = {"name": given} if isinstance(given, str) else given
    method: MethodConfig = _validated(_Method, {"method": data}, "method").method
    if method_of(method).kind not in ("constant", "learned") or method.name == "joint":
        raise UserError(
            f"method: {method.name} is for CLIP's image encoders alone; merge_module knows "
            "adamerging and the methods that need no data"
        )
    if isinstance(method, AdaMerging) and method.objective == "cross_entropy":
        raise UserError(
            "method.objective: cross_entropy needs labels, which merge_module is not given; use "
            "entropy, kl or infomax"
        )
    return method


def _loss(method: AdaMerging) -> Loss:
    return Loss(method.objective, method.temperature, method.normalise, method.filter)


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


def _ties(method: MethodConfig, files: _Files) -> TiesStatistics:
    assert isinstance(method, Ties | AdaMerging)
    return ties_statistics(
        files.pretrained,
        files.experts,
        density=method.density,
        scope=method.trim_scope,
        mean=isinstance(method, Ties) and method.merge == "mean",
    )


# --- the merge ---------------------------------------------------------------------------------


def _merged_state(
    model: nn.Module,
    files: _Files,
    basis: Basis | None,
    layers: LayerMap,
    lambdas_JL: Tensor,
) -> dict[str, Tensor]:
    """The model's state dict with θ in it, in the model's own dtypes; tied tensors stay tied."""
    flat = _FlatModel(model, files.layout)
    flat.set(files, basis, layers, lambdas_JL)
    given = model.state_dict()
    return {
        name: tensor.detach().to(given[name].dtype, copy=True)
        for name, tensor in flat.module.state_dict().items()
    }


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


# --- learning ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What every worker is given: the models and what is minimised."""

    model: nn.Module
    files: _Files
    basis: Basis | None
    layers: LayerMap
    loss: Loss
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


def _learn(
    task: _Task,
    method: AdaMerging,
    options: OptimizerConfig,
    batches: Mapping[str, Sequence[Batch]] | None,
    logits: Logits | None,
    start_KL: Tensor,
    workers: int,
    records: list[StepRecord],
) -> tuple[Tensor, Sequence[Incident]]:
    """λ after ``options.steps`` steps, as the merge uses it, and what was survived."""
    names = task.files.names
    given = _given(task, names, batches, logits)
    optimizer = Adam(
        options.lr,
        options.betas,
        options.eps,
        method.clamp,
        options.steps if options.schedule == "cosine" else None,
        options.sharpness,
    )
    watch = Watch(names, range(len(names)), method.collapse, method.objective == "infomax")
    with (
        _group(task, given, workers) as group,
        progress_bar("merging", unit="step", total=options.steps) as progress,
    ):

        def observe(record: StepRecord, state: AdamState) -> None:
            records.append(record)
            progress(1)

        state = learn(group, optimizer, AdamState.start(start_KL), options.steps, watch, observe)
        return optimizer.effective(state.lambdas), tuple(group.incidents)


def _given(
    task: _Task,
    names: Sequence[str],
    batches: Mapping[str, Sequence[Batch]] | None,
    logits: Logits | None,
) -> Given:
    """The user's batches, each task's first one tried. Raises :class:`UserError`."""
    if batches is None or logits is None:
        raise UserError("adamerging learns from data: give batches and logits")
    missing = [name for name in names if not batches.get(name)]
    unknown = sorted(batches.keys() - set(names))
    if missing or unknown:
        raise UserError(
            f"batches: {f'none for {missing[0]!r}' if missing else f'{unknown[0]!r} is no expert'};"
            f" give some of each task ({', '.join(names)})"
        )
    flat = _FlatModel(task.model, task.files.layout)
    base = torch.zeros(len(names), len(task.layers.names))
    flat.set(task.files, None, task.layers, base)
    classes = [_try(flat.module, name, batches[name][0], logits) for name in names]
    return Given(logits, {k: batches[name] for k, name in enumerate(names)}, max(classes))


def _try(module: nn.Module, name: str, batch: Batch, logits: Logits) -> int:
    """The number of classes."""
    out = logits(module, batch, name)
    if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[1] < 2:
        what = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UserError(f"logits of task {name!r}: {what}, not (examples, at least 2 classes)")
    if not out.requires_grad:
        raise UserError(
            f"logits of task {name!r} do not depend on the merged tensors of the module that the "
            "function is given (a detach, no_grad, or another module); nothing can be learned"
        )
    return out.shape[1]


def _group(task: _Task, given: Given, workers: int) -> AbstractContextManager[Stepper]:
    if workers == 0:
        return nullcontext(_LocalModules(ModuleWorker(task, given)))
    return _actors(task, given, min(workers, len(given.batches)))


@contextmanager
def _actors(task: _Task, given: Given, workers: int):  # type: ignore[no-untyped-def]
    from raymerge.distributed.cluster import connected
    from raymerge.distributed.modules import ModuleActors

    shares = [
        Given(
            given.logits,
            {k: b for k, b in given.batches.items() if k * workers // len(given.batches) == rank},
            given.classes,
            rank,
        )
        for rank in range(workers)
    ]
    with connected(None, workers):
        actors = ModuleActors(ModuleWorker, task, shares)
        try:
            yield actors
        finally:
            actors.close()


class _LocalModules:
    """One worker in this process."""

    workers = 1
    incidents: Sequence[Incident] = ()

    def __init__(self, worker: ModuleWorker) -> None:
        self._worker = worker

    def step(self, request: StepRequest) -> list[StepResult]:
        return [self._worker.step(request)]


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
        if task.loss.objective == "kl":
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

    def ping(self) -> Pulse:
        """It answers while it works."""
        return Pulse("step", time.perf_counter() - self._since)

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
            losses_B = image_losses(self.task.loss, logits_BC, target, marginal_C)
            weight = 1.0 if request.weights is None else float(request.weights[task])
            (losses_B.mean() * weight).backward()
            share = 1 / min(count, len(batches))
            result.loss[task] += float(losses_B.detach().double().mean()) * weight
            result.entropy[task] += float(entropy(logits_BC.detach()).double().mean()) * share
            mean_p_C = probability_sum(logits_BC) / examples * share
            result.probabilities[task, :classes] += mean_p_C.cpu().numpy()
