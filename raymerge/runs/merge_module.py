"""Merge models of any kind: a user's ``nn.Module``, batches, and a function that gives logits.

The maths, the workers and the loop are those of the CLIP merges: a batch takes the place of an
image, and the user's function that of the encoder and heads. Serving the module in a worker is left
to ``engine.worker.module_model``.

Legend: K models, L layers, T tensors, P columns of the flat vector, B examples, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from raymerge.config import ClusterConfig, MethodConfig, OptimizerConfig
from raymerge.config.wording import explain
from raymerge.distributed.placement import Placement
from raymerge.engine.driver.groups import LocalGroup, WorkerGroup
from raymerge.engine.driver.loop import Learning, StepRecord
from raymerge.engine.driver.loops import learn_lambdas
from raymerge.engine.driver.state import LearningState
from raymerge.engine.driver.statistics import merged_delta
from raymerge.engine.messages import Incident, LoadRequest, WorkerSpec
from raymerge.engine.worker.module_model import (
    Batch,
    Expert,
    Logits,
    ModuleFiles,
    ModuleParts,
    ModuleSource,
    Value,
    flat_copy,
)
from raymerge.engine.worker.vectors import StreamedTaskVectorStore
from raymerge.errors import UserError, escape_unprintable
from raymerge.files.progress import progress_bar
from raymerge.merging.basis import Basis, BasisInputs, ConstantRow
from raymerge.merging.layout import LayerMap
from raymerge.merging.method import Method, Schedule
from raymerge.merging.registry import method_of
from raymerge.models.checkpoints.task_vectors import ties_statistics
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint, choice_of
from raymerge.runs.inputs import make_learning, uniform_lambdas

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergedModule:
    """The result of :func:`merge_module`.

    ``state_dict``: the whole model's, with the pretrained values where nothing was merged.
    ``lambdas``: (K, L) float64, one row per model in the order of ``experts``; (1, L) for a method
    that merges the models into one vector. ``records``: one per step of a method that learns.
    ``incidents``: the worker failures from which the run recovered.
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
    see docs/modules.md for the methods that work. ``batches``: by task, unlabeled, for methods that
    learn; ``logits``: gives the logits (B, C) of a batch. ``merged``: says of a tensor's name
    whether it is merged (for example, all but the tasks' own heads); default: every floating-point
    tensor. ``workers``: 0 for this process, else the number of Ray actors among which the tasks are
    split; all arguments must then be picklable. A lost worker is replaced, and its step repeated.

    A batch takes the place of an image: ``optimizer.batch_size`` is ignored, and
    ``optimizer.batches`` batches of each task make a step; ``method.images`` of Fisher merging and
    FW-Merging counts batches. Raises :class:`UserError` before any work if the input is wrong.
    """
    # Check the arguments.
    options = _method_options(method, workers)
    row = method_of(options)
    optimizer_options = _validate(_Optimizer, {"optimizer": optimizer or {}}).optimizer
    _require_experts(experts)
    if problem := options.problem_with(optimizer_options.nonfinite):
        raise UserError(problem)
    # Open the experts and compare them with the model.
    parts = ModuleParts(model, experts, merged, logits)
    files = ModuleFiles.open(parts)
    opened = [files.experts[name] for name in experts]
    for name, expert in files.experts.items():
        if choice := choice_of(expert, expert.checkpoint.path.name):
            logger.warning("experts[%r]: %s", name, escape_unprintable(choice))
    ties = partial(ties_statistics, files.pretrained, opened)
    basis = row.basis(options, BasisInputs(tuple(experts), seed, ties))
    layers = files.layout.layers(row.granularity(options))
    lambdas_JL = uniform_lambdas(row, options, len(experts), layers)
    # Find λ, or the merged vector, from the batches; for other methods both are known already.
    records: list[StepRecord] = []
    incidents: Sequence[Incident] = ()
    if row.images(options) != "none":
        source = _make_source(parts, files, batches)
        if row.statistics is not None:
            basis, incidents = _solve_statistics(row, options, source, files, seed, workers)
            opened = opened[:1]  # the constant row replaces all task vectors
        else:
            lambdas_JL, incidents = _learn(
                row, options, optimizer_options, source, basis, seed, lambdas_JL, workers, records
            )
    # Merge into a copy of the module.
    state = _merged_state(parts, files, opened, basis, layers, lambdas_JL)
    return MergedModule(state, lambdas_JL, layers.names, records, incidents)


# --- the user's input ----------------------------------------------------------------------------


class _Method(BaseModel):
    """The schema of the argument ``method``, so that errors name its keys as in a config."""

    model_config = ConfigDict(extra="forbid")
    method: MethodConfig


class _Optimizer(BaseModel):
    """The schema of the argument ``optimizer``."""

    model_config = ConfigDict(extra="forbid")
    optimizer: OptimizerConfig


def _validate(schema: Any, data: Mapping[str, Any]) -> Any:
    """Return ``data`` as a ``schema``. Raises :class:`UserError` that names the wrong key."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, schema)) from None


def _method_options(method: str | Mapping[str, Any] | MethodConfig, workers: int) -> MethodConfig:
    """Return the method's options.

    Raises :class:`UserError` for a method that needs what ``merge_module`` does not have: labels,
    open_clip's layers, an earlier run's folder, or the whole gradient of several workers.
    """
    data = {"name": method} if isinstance(method, str) else method
    options: MethodConfig = _validate(_Method, {"method": data}).method
    row = method_of(options)
    # The row says what the method needs; refuse what a module cannot give.
    if row.reference or not row.merges:
        raise UserError(
            f"method: {options.name} does not merge the experts; choose a method that does, "
            "such as adamerging"
        )
    if row.open_clip_linears:
        raise UserError(
            f"method: {options.name} solves for the linear layers of open_clip's vision "
            "transformers, which other modules do not have; use fisher"
        )
    if row.images(options) == "labelled":
        raise UserError(
            "method.objective: cross_entropy needs labels, and merge_module's batches have none; "
            "use entropy (or, with adamerging, kl or infomax)"
        )
    if row.start(options) is not None:
        raise UserError("method.start: merge_module cannot start from a run folder; drop this key")
    if row.whole_gradient(options) and workers > 1:
        raise UserError(
            f"method.oracle: cosine needs the whole gradient in one worker, and workers is "
            f"{workers}; use workers: 1 or 0, or method.oracle: inner"
        )
    return options


def _require_experts(experts: object) -> None:
    if not isinstance(experts, Mapping):
        raise UserError(
            f"experts must be a mapping from each task's name to its model, got a "
            f"{type(experts).__name__}"
        )
    if not experts:
        raise UserError("experts is empty; give at least one fine-tuned model by its task's name")


def _make_source(
    parts: ModuleParts, files: ModuleFiles, batches: Mapping[str, Sequence[Batch]] | None
) -> ModuleSource:
    """Return the module and its batches as a source, after one forward pass of every task.

    Raises :class:`UserError` for missing or unknown tasks, and for logits that cannot be used.
    """
    names = tuple(parts.experts)
    if batches is None or parts.logits is None:
        raise UserError("this method learns from data; give batches and logits")
    missing = [name for name in names if not batches.get(name)]
    unknown = sorted(batches.keys() - set(names))
    if missing or unknown:
        problem = f"none for {missing[0]!r}" if missing else f"{unknown[0]!r} is not an expert"
        raise UserError(f"batches: {problem}; give some of each task ({', '.join(names)})")
    source = ModuleSource(
        task_names=names,
        parts=Value(parts),
        batches=tuple(Value(batches[name]) for name in names),
        populations=tuple(len(batches[name]) for name in names),
        classes=0,
    )
    # The number of classes is known only from the logits, here at the pretrained weights.
    served = source.serve(WorkerSpec(), {})
    served.theta_P.copy_(files.pretrained.flat(len(served.theta_P)))
    classes = [_classes(served.module, name, batches[name][0], parts.logits) for name in names]
    # A damaged expert must be found before any worker starts.
    for expert in files.experts.values():
        for piece in files.layout.shard(0, 1).pieces():
            expert.read(piece, torch.empty(piece.stop - piece.start))
    return replace(source, classes=max(classes))


def _classes(module: nn.Module, name: str, batch: Batch, logits: Logits) -> int:
    """Return the number of classes of one task's logits.

    Raises :class:`UserError` unless they are (B, C) and differentiable.
    """
    out = logits(module, batch, name)
    if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[1] < 2:
        what = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise UserError(
            f"logits of task {name!r} must be (examples, at least 2 classes), got {what}"
        )
    if not out.requires_grad:
        raise UserError(
            f"logits of task {name!r} do not depend on the merged tensors, so nothing can "
            "be learned; use the module that the function gets, without detach or no_grad"
        )
    return out.shape[1]


# --- learning ------------------------------------------------------------------------------------


@contextmanager
def _open_group(source: ModuleSource, workers: int) -> Iterator[WorkerGroup]:
    """Open one worker in this process, or up to ``workers`` actors, at most one per task."""
    if workers == 0:
        yield LocalGroup(source, WorkerSpec())
        return
    from raymerge.distributed.actor_group import ActorGroup
    from raymerge.distributed.cluster import connect

    workers = min(workers, len(source.task_names))
    config = ClusterConfig(workers=workers, cpus_per_worker=1, gpus_per_worker=0)
    with connect(None, workers):
        group = ActorGroup(source, WorkerSpec(), Placement(workers, 1, 1, 0.0), config)
        try:
            yield group
        finally:
            group.close()


def _learning(
    row: Method,
    options: MethodConfig,
    optimizer: OptimizerConfig,
    group: WorkerGroup,
    basis: Basis | None,
    seed: int,
) -> Learning:
    """Return the inputs of the method's loop: every task is merged and has batches."""
    names = group.source.task_names
    # A step of AdaMerging shows one batch of the user for each of its own.
    inner = Schedule(optimizer.steps, optimizer.batches, optimizer.batches)
    schedule = inner if row.loop == "adam" else row.schedule(options, optimizer)
    load = LoadRequest(
        models=names,
        granularity=row.granularity(options),
        objective=row.objective(options),
        slots_per_step=schedule.images,
        batches=schedule.batches,
        steps=schedule.steps,
        seed=seed,
        basis=basis,
    )
    every = range(len(names))
    return make_learning(
        row,
        options,
        optimizer,
        group,
        tasks=names,
        rows=every,
        adapted_tasks=every,
        load=load,
        inner=inner,
    )


def _learn(
    row: Method,
    options: MethodConfig,
    optimizer: OptimizerConfig,
    source: ModuleSource,
    basis: Basis | None,
    seed: int,
    start_KL: Tensor,
    workers: int,
    records: list[StepRecord],
) -> tuple[Tensor, Sequence[Incident]]:
    """Return λ (K, L) after the loop's steps, and the incidents of the workers.

    Appends each step's record to ``records``. The workers are freed before the result is merged.
    """
    assert row.loop is not None
    with _open_group(source, workers) as group:
        learning = _learning(row, options, optimizer, group, basis, seed)
        # The workers read their vectors and batches once; then only λ and gradients travel.
        group.load(learning.load)
        with progress_bar("merging", unit="step", total=learning.steps) as progress:

            def observe(record: StepRecord, state: LearningState) -> None:
                records.append(record)
                progress(1)

            start = LearningState.initial(start_KL)
            lambdas_KL = learn_lambdas(row.loop, learning, start, observe)
        return lambdas_KL, tuple(group.incidents)


def _solve_statistics(
    row: Method,
    options: MethodConfig,
    source: ModuleSource,
    files: ModuleFiles,
    seed: int,
    workers: int,
) -> tuple[ConstantRow, Sequence[Incident]]:
    """Return the merged vector of a method with statistics, and the incidents of the workers."""
    assert row.statistics is not None
    experts = list(files.experts.values())
    with _open_group(source, workers) as group:
        tasks = range(len(experts))
        delta_P = merged_delta(
            row.statistics, options, group, tasks, files.pretrained, experts, seed
        )
        return ConstantRow(delta_P), tuple(group.incidents)


# --- the merge -----------------------------------------------------------------------------------


def _merged_state(
    parts: ModuleParts,
    files: ModuleFiles,
    experts: Sequence[VisualCheckpoint],
    basis: Basis | None,
    layers: LayerMap,
    lambdas_JL: Tensor,
) -> dict[str, Tensor]:
    """Return the merged model's state dict in the model's own dtypes; tied tensors stay tied."""
    module, theta_P, _ = flat_copy(parts.module, files.layout)
    shard = files.layout.shard(0, 1)
    vectors = StreamedTaskVectorStore(files.pretrained, experts, basis, shard, layers)
    vectors.merge(lambdas_JL, theta_P)
    original = parts.module.state_dict()
    return {
        name: tensor.detach().to(original[name].dtype, copy=True)
        for name, tensor in module.state_dict().items()
    }
