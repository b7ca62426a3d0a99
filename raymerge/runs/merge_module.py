"""Merge models of any kind: a user's ``nn.Module``, batches, and a function that gives logits.

The maths and the loop are those of the CLIP merges; what a user brings replaces images and heads.

Legend: K models, L layers, T tensors, P columns of the flat vector, B examples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from raymerge.config import ClusterConfig, MethodConfig, OptimizerConfig
from raymerge.config.wording import explain
from raymerge.distributed.placement import Placement
from raymerge.engine.driver.groups import LocalGroup, WorkerGroup
from raymerge.engine.driver.loop import Learning, StepRecord
from raymerge.engine.driver.loops import learn_lambdas
from raymerge.engine.driver.monitor import Monitor
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
from raymerge.errors import UserError
from raymerge.files.progress import progress_bar
from raymerge.merging.basis import Basis, BasisInputs, ConstantRow
from raymerge.merging.layout import LayerMap
from raymerge.merging.method import Method, Objective, Schedule
from raymerge.merging.registry import method_of
from raymerge.models.checkpoints.task_vectors import ties_statistics
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint
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

    A batch takes the place of an image: ``optimizer.batch_size`` counts for nothing, and
    ``optimizer.batches`` batches of each task make a step; ``method.images`` of Fisher merging and
    FW-Merging counts batches. Raises :class:`UserError` before any work where the input is wrong.
    """
    options = _method_options(method)
    row = method_of(options)
    optimizer_options = _validated(_Optimizer, {"optimizer": optimizer or {}}).optimizer
    _require_experts(experts)
    if row.whole_gradient(options) and workers > 1:
        raise UserError(
            f"method.oracle: cosine needs the whole gradient in one worker, and workers is "
            f"{workers}; use workers: 1 or 0, or method.oracle: inner"
        )
    parts = ModuleParts(model, experts, merged, logits)
    files = ModuleFiles.open(parts)
    opened = [files.experts[name] for name in experts]
    ties = partial(ties_statistics, files.pretrained, opened)
    basis = row.basis(options, BasisInputs(tuple(experts), seed, ties))
    layers = files.layout.layers(row.granularity(options))
    lambdas_JL = first_lambdas(row, options, len(experts), layers)
    records: list[StepRecord] = []
    incidents: Sequence[Incident] = ()
    if row.images(options) != "none":
        source = _source(parts, files, batches)
        with _open_group(source, workers) as group:
            if row.statistics is not None:
                tasks = range(len(experts))
                delta_P = merged_delta(
                    row.statistics, options, group, tasks, files.pretrained, opened, seed
                )
                basis = ConstantRow(delta_P)
            else:
                learning = _learning(row, options, optimizer_options, group, basis, seed)
                lambdas_JL = _learn(row, learning, lambdas_JL, records)
            incidents = tuple(group.incidents)
    state = _merged_state(parts, files, opened, basis, layers, lambdas_JL)
    return MergedModule(state, lambdas_JL, layers.names, records, incidents)


# --- the user's input --------------------------------------------------------------------------


class _Method(BaseModel):
    model_config = ConfigDict(extra="forbid")
    method: MethodConfig


class _Optimizer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    optimizer: OptimizerConfig


def _validated(schema: Any, data: Mapping[str, Any]) -> Any:
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, schema)) from None


def _method_options(method: str | Mapping[str, Any] | MethodConfig) -> MethodConfig:
    """The method's options. Raises :class:`UserError` for a method that needs what a module has
    not: labels, CLIP's own layers, or an earlier run's folder."""
    data = {"name": method} if isinstance(method, str) else method
    options: MethodConfig = _validated(_Method, {"method": data}).method
    row = method_of(options)
    if row.reference or not row.merges:
        raise UserError(
            f"method: {options.name} merges nothing of these experts; merge_module needs a method "
            "that does"
        )
    if row.open_clip_linears:
        raise UserError(
            f"method: {options.name} solves for the linear layers of open_clip's vision "
            "transformers, which merge_module cannot know in other modules; use fisher"
        )
    if row.images(options) == "labelled":
        raise UserError(
            "method.objective: cross_entropy needs labels, and merge_module's batches have none; "
            "use entropy (or, with adamerging, kl or infomax)"
        )
    if row.start(options) is not None:
        raise UserError("method.start: names a run folder, which merge_module cannot read; drop it")
    return options


def _require_experts(experts: object) -> None:
    if not isinstance(experts, Mapping):
        raise UserError(
            f"experts: a {type(experts).__name__}, not a mapping from a task's name to its model"
        )
    if not experts:
        raise UserError("experts: is empty; give at least one fine-tuned model by its task's name")


def _source(
    parts: ModuleParts, files: ModuleFiles, batches: Mapping[str, Sequence[Batch]] | None
) -> ModuleSource:
    """The module and its batches, each task's first batch tried. Raises :class:`UserError`."""
    names = tuple(parts.experts)
    if batches is None or parts.logits is None:
        raise UserError("this method learns from data: give batches and logits")
    missing = [name for name in names if not batches.get(name)]
    unknown = sorted(batches.keys() - set(names))
    if missing or unknown:
        raise UserError(
            f"batches: {f'none for {missing[0]!r}' if missing else f'{unknown[0]!r} is no expert'};"
            f" give some of each task ({', '.join(names)})"
        )
    source = ModuleSource(
        task_names=names,
        parts=Value(parts),
        batches=tuple(Value(batches[name]) for name in names),
        populations=tuple(len(batches[name]) for name in names),
        classes=0,
    )
    served = source.serve(WorkerSpec(), {})
    served.theta_P.copy_(files.pretrained.flat(len(served.theta_P)))
    classes = [_classes(served.module, name, batches[name][0], parts.logits) for name in names]
    return replace(source, classes=max(classes))


def _classes(module: nn.Module, name: str, batch: Batch, logits: Logits) -> int:
    """The number of classes of one task's logits. Raises :class:`UserError` where they are none."""
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


# --- learning ----------------------------------------------------------------------------------


@contextmanager
def _open_group(source: ModuleSource, workers: int) -> Iterator[WorkerGroup]:
    """One worker in this process, or as many actors as there are tasks to share among them."""
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
    """The inputs of the method's loop: every task is merged and has batches."""
    names = group.source.task_names
    objective = row.objective(options)

    def load_request(objective: Objective, schedule: Schedule) -> LoadRequest:
        return LoadRequest(
            models=names,
            granularity=row.granularity(options),
            objective=objective,
            slots_per_step=schedule.images,
            batches=schedule.batches,
            steps=schedule.steps,
            seed=seed,
            basis=basis,
        )

    # A step of AdaMerging shows one batch of the user for each of its own.
    inner = Schedule(optimizer.steps, optimizer.batches, optimizer.batches)
    schedule = inner if row.loop == "adam" else row.schedule(options, optimizer)
    return Learning(
        group=group,
        options=options,
        optimizer=make_optimizer(row, options, optimizer),
        steps=schedule.steps,
        inner_steps=optimizer.steps,
        monitor=Monitor(
            names,
            range(len(names)),
            row.monitoring(options, optimizer),
            infomax=objective.name == "infomax",
        ),
        adapted_tasks=range(len(names)),
        load=load_request(objective, schedule),
        inner_load=load_request(Objective(), inner),
    )


def _learn(row: Method, learning: Learning, start_KL: Tensor, records: list[StepRecord]) -> Tensor:
    """λ (K, L) after the loop's steps; every step's record goes into ``records``."""
    assert row.loop is not None
    learning.group.load(learning.load)
    with progress_bar("merging", unit="step", total=learning.steps) as progress:

        def observe(record: StepRecord, state: LearningState) -> None:
            records.append(record)
            progress(1)

        return learn_lambdas(row.loop, learning, LearningState.initial(start_KL), observe)


# --- the merge ---------------------------------------------------------------------------------


def _merged_state(
    parts: ModuleParts,
    files: ModuleFiles,
    experts: Sequence[VisualCheckpoint],
    basis: Basis | None,
    layers: LayerMap,
    lambdas_JL: Tensor,
) -> dict[str, Tensor]:
    """The model's state dict with θ in it, in the model's own dtypes; tied tensors stay tied."""
    module, theta_P, _ = flat_copy(parts.module, files.layout)
    shard = files.layout.shard(0, 1)
    vectors = StreamedTaskVectorStore(files.pretrained, experts, basis, shard, layers)
    vectors.merge(lambdas_JL, theta_P)
    original = parts.module.state_dict()
    return {
        name: tensor.detach().to(original[name].dtype, copy=True)
        for name, tensor in module.state_dict().items()
    }
