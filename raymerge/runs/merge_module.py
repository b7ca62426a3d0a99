"""Merge models of any kind: a user's ``nn.Module``, batches, and a function that gives logits.

The maths and the loop are those of the CLIP merges; what a user brings replaces images and heads.

Legend: K models, L layers, T tensors, P columns of the flat vector, B examples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from raymerge.config import MethodConfig, OptimizerConfig
from raymerge.config.wording import explain
from raymerge.engine.driver.groups import Stepper
from raymerge.engine.driver.loop import StepRecord, learn
from raymerge.engine.driver.monitor import Monitor
from raymerge.engine.driver.state import LearningState
from raymerge.engine.messages import Incident, StepRequest, StepResult
from raymerge.engine.worker.modules import (
    Batch,
    Expert,
    Given,
    Logits,
    ModuleWorker,
    _Files,
    _FlatModel,
    _Task,
)
from raymerge.errors import UserError
from raymerge.files.progress import progress_bar
from raymerge.merging.basis import Basis, BasisInputs
from raymerge.merging.layout import LayerMap
from raymerge.merging.method import Method
from raymerge.merging.registry import method_of
from raymerge.models.checkpoints.task_vectors import ties_statistics
from raymerge.runs.inputs import first_lambdas, make_optimizer


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
    ties = partial(ties_statistics, files.pretrained, files.experts)
    basis = kept.basis(chosen, BasisInputs(tuple(experts), seed, ties))
    layers = files.layout.layers(kept.granularity(chosen))
    start = first_lambdas(kept, chosen, len(experts), layers)
    records: list[StepRecord] = []
    incidents: Sequence[Incident] = ()
    if kept.loop is not None:
        task = _Task(model, files, basis, layers, kept.objective(chosen), options.batches, seed)
        start, incidents = _learn(
            task, kept, chosen, options, batches, logits, start, workers, records
        )
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
    row = method_of(method)
    if not row.merges or row.reference or row.statistics or row.loop not in (None, "adam"):
        raise UserError(
            f"method: {method.name} is for CLIP's image encoders alone; merge_module knows "
            "adamerging and the methods that need no data"
        )
    if row.images(method) == "labelled":
        raise UserError(
            "method.objective: cross_entropy needs labels, which merge_module is not given; use "
            "entropy, kl or infomax"
        )
    return method


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


# --- learning ----------------------------------------------------------------------------------


def _learn(
    task: _Task,
    row: Method,
    method: MethodConfig,
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
    optimizer = make_optimizer(row, method, options)
    infomax = row.objective(method).name == "infomax"
    monitor = Monitor(names, range(len(names)), row.monitoring(method, options), infomax)
    with (
        _group(task, given, workers) as group,
        progress_bar("merging", unit="step", total=options.steps) as progress,
    ):

        def observe(record: StepRecord, state: LearningState) -> None:
            records.append(record)
            progress(1)

        state = learn(group, optimizer, LearningState.at(start_KL), options.steps, monitor, observe)
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
    from raymerge.distributed.cluster import connect
    from raymerge.distributed.module_group import ModuleActors

    shares = [
        Given(
            given.logits,
            {k: b for k, b in given.batches.items() if k * workers // len(given.batches) == rank},
            given.classes,
            rank,
        )
        for rank in range(workers)
    ]
    with connect(None, workers):
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
