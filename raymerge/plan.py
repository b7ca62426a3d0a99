"""Everything that can be checked before work starts, from headers and folder listings alone.

``check`` collects every problem; ``make_plan`` raises the first. ``merge`` runs the same checks.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil

from raymerge.architecture import (
    WEIGHTS_FILE,
    ResolvedModel,
    open_pretrained,
    resolve_model,
    whole_bytes,
)
from raymerge.checkpoints.reader import open_checkpoint
from raymerge.checkpoints.task_vectors import STREAM_BYTES
from raymerge.checkpoints.visual import VisualCheckpoint, open_visual
from raymerge.config import Config, FwHard, FwSoft, Joint, RegMean, RegMeanPP, TaskConfig
from raymerge.data.cache import check_image
from raymerge.data.images import ImageList, Item
from raymerge.data.slots import slot_counts
from raymerge.data.sources import labelled_images, unlabeled_images
from raymerge.errors import CheckpointError, DataError, UserError
from raymerge.heads import saved_head
from raymerge.lambdas import read_lambdas
from raymerge.memory import (
    WorkerNeeds,
    machine_bytes,
    micro_batch,
    pass_images,
    storage_for,
    vector_bytes,
    worker_bytes,
)
from raymerge.merging.layout import ParameterLayout
from raymerge.merging.registry import (
    describe,
    granularity_of,
    images_per_step,
    merged_checkpoints,
    method_of,
    needed_images,
    steps_of,
)
from raymerge.messages import VectorStorage
from raymerge.outline import Outlined, fetch_checkpoints, outlined, remote_checkpoints
from raymerge.placement import Placement, Resources, place, require_work
from raymerge.tracking import require_trackers
from raymerge.urls import public

_FLOAT_BYTES = 4
_LABELS = (
    "method.objective: cross_entropy needs one folder per class; sort the images so, or use "
    "objective: entropy"
)
_COEFFICIENT_BYTES = 4 + 4 + 4 + 8  # λ twice, ∂ℒ/∂λ, and ∂ℒ/∂λ as it is summed


@dataclass(frozen=True)
class TaskPlan:
    """What the checks found of one task."""

    name: str
    checkpoint: str | None
    dtype: str
    classes: int
    adapt_images: int
    test_images: int
    images_per_step: int


@dataclass(frozen=True)
class Plan:
    """What will be done, and what it takes. Bytes are estimates for the largest worker."""

    method: str
    model: str
    parameters: int
    tensors: int
    layers: int
    models: int
    tasks: tuple[TaskPlan, ...]
    placement: Placement | None
    steps: int
    step_images: int
    bytes_per_worker: dict[str, int]
    storage: VectorStorage
    vector_bytes: int
    """Of one worker's task vectors, wherever they are."""
    micro_batch: int | None
    step_s: float | None
    """About, from a short probe of this machine; None without one, or on a cluster."""
    output_bytes: int
    notes: tuple[str, ...]
    resolved: ResolvedModel = field(repr=False)
    leftovers: int

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        del data["resolved"], data["leftovers"]
        data["total_bytes_per_worker"] = sum(self.bytes_per_worker.values())
        return data


@dataclass
class _Findings:
    """Problems in the order they were found."""

    problems: list[UserError] = field(default_factory=list)

    def attempt(self, check: Callable[[], _T]) -> _T | None:
        try:
            return check()
        except UserError as problem:
            self.problems.append(problem)
        except OSError as error:  # no permission on the way, or too long a name
            self.problems.append(UserError(f"{error.filename}: {error.strerror}"))
        return None


_T = TypeVar("_T")


def local_resources() -> Resources:
    """This machine's cores and GPUs, before any Ray is started."""
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count()
    totals = [torch.cuda.get_device_properties(gpu).total_memory for gpu in range(gpus)]
    return Resources(
        cpus, gpus, memory_bytes=machine_bytes(), gpu_bytes=min(totals) if totals else None
    )


def make_plan(config: Config, resources: Resources | None = None, *, experts: bool = True) -> Plan:
    """Check everything; raises the first problem found, saying how many more there are."""
    if remote_checkpoints(config):
        with outlined(config) as headers:
            _raise_first(check(headers.config, resources, experts=experts)[1], headers)
        fetch_checkpoints(config)
    plan, problems = check(config, resources, experts=experts)
    _raise_first(problems)
    assert plan is not None  # no problem means a plan
    return plan


def _raise_first(problems: Sequence[UserError], headers: Outlined | None = None) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more: see `raymerge plan`)" if len(problems) > 1 else ""
        text = headers.named(str(problems[0])) if headers else problems[0]
        raise type(problems[0])(f"{text}{more}")


def check_headers(
    config: Config, resources: Resources | None = None, *, probe: bool = False
) -> tuple[Plan | None, list[UserError]]:
    """As ``check``, with no more of remote checkpoints than their headers."""
    urls = remote_checkpoints(config)
    if not urls:
        return check(config, resources, probe=probe)
    with outlined(config) as headers:
        plan, problems = check(headers.config, resources, probe=probe)
        problems = [type(problem)(headers.named(str(problem))) for problem in problems]
        if plan is not None:
            tasks = tuple(
                replace(row, checkpoint=task.checkpoint and public(task.checkpoint))
                for row, task in zip(plan.tasks, config.tasks, strict=True)
            )
            note = f"fetches what is new of {len(urls)} remote checkpoints before it merges"
            plan = replace(
                plan, tasks=tasks, model=headers.named(plan.model), notes=(*plan.notes, note)
            )
        return plan, problems


def check(
    config: Config,
    resources: Resources | None = None,
    *,
    experts: bool = True,
    probe: bool = False,
) -> tuple[Plan | None, list[UserError]]:
    """The plan, or every problem that stands in its way. ``resources``: None if not known yet.

    ``probe``: also time this machine, for an estimate of a step's seconds.
    """
    found = _Findings()
    resolved = found.attempt(lambda: resolve_model(config.model))
    pretrained = None
    if resolved is not None:
        opened = found.attempt(lambda: open_pretrained(resolved))
        pretrained, leftovers = opened if opened is not None else (None, 0)
    rows = [_check_task(config, k, pretrained, found, experts) for k in range(len(config.tasks))]
    found.attempt(lambda: _check_method(config))
    found.attempt(lambda: require_trackers(config.tracking))
    if pretrained is not None:
        fitting = pretrained
        found.attempt(lambda: _check_fit(config, fitting))
    if pretrained is None or resolved is None:
        return None, found.problems
    found.attempt(lambda: check_heads(config, resolved))
    kind = method_of(config.method).kind
    learned = kind in ("learned", "frank_wolfe")
    step_images = sum(row.images_per_step for row in rows) if learned else 0
    placement = _placement(config, resources, step_images if learned else None, found)
    found.attempt(lambda: _check_groups(config, placement))
    layout = pretrained.layout
    memory = (
        _learned_memory(config, pretrained, resolved, rows, placement, resources)
        if learned
        else _static_memory(config, layout, resolved)
    )
    step_s = None
    if probe and learned and placement is not None and resources and resources.elastic:
        step_s = _step_seconds(config, resolved, step_images, memory, placement)
    plan = Plan(
        method=describe(config.method),
        model=resolved.name,
        parameters=layout.parameters,
        tensors=len(layout.names),
        layers=_layer_count(config, layout),
        models=len(merged_checkpoints(config)),
        tasks=tuple(rows),
        placement=placement,
        steps=steps_of(config) if learned else 0,
        step_images=step_images,
        bytes_per_worker=memory.bytes_per_worker,
        storage=memory.storage,
        vector_bytes=memory.vector_bytes,
        micro_batch=memory.micro_batch,
        step_s=step_s,
        output_bytes=whole_bytes(pretrained) if method_of(config.method).merges else 0,
        notes=_notes(config),
        resolved=resolved,
        leftovers=leftovers,
    )
    found.attempt(lambda: _require_memory(plan, resources))
    found.attempt(lambda: _require_separate_output(config, resolved))
    found.attempt(lambda: _require_disk(plan, config.output))
    found.attempt(lambda: _require_scratch(plan, config))
    return plan, found.problems


def _check_task(
    config: Config,
    k: int,
    pretrained: VisualCheckpoint | None,
    found: _Findings,
    experts: bool,
) -> TaskPlan:
    task = config.tasks[k]
    expert = None
    if experts and task.checkpoint is not None:
        expert = found.attempt(lambda: _open_expert(task, k, pretrained))
    adapt = found.attempt(lambda: _adapt_images(task, k)) if task.adapt else None
    test = found.attempt(lambda: _test_images(task, k)) if task.test else None
    for images in (adapt, test):
        if images is not None:
            found.attempt(lambda images=images: _check_images(images.items))  # type: ignore[misc]
    population = len(adapt) if adapt else 0
    return TaskPlan(
        name=task.name,
        checkpoint=task.checkpoint and public(task.checkpoint),
        dtype=_dtype(expert),
        classes=len(task.classnames),
        adapt_images=population,
        test_images=len(test) if test else 0,
        images_per_step=slot_counts([population], images_per_step(config))[0],
    )


def check_heads(config: Config, resolved: ResolvedModel) -> None:
    """Raises :class:`CheckpointError` for a saved head that does not fit its task."""
    for k, task in enumerate(config.tasks):
        if task.head is not None:
            saved_head(task, f"tasks[{k}]", resolved.features)


def _open_expert(
    task: TaskConfig, k: int, pretrained: VisualCheckpoint | None
) -> VisualCheckpoint | None:
    reference = str(task.checkpoint)
    try:
        if pretrained is None:
            open_checkpoint(reference)
            return None
        return open_visual(reference, pretrained.layout, pretrained)
    except CheckpointError as error:
        raise CheckpointError(f"tasks[{k}] ({task.name}): {error}") from error


def _adapt_images(task: TaskConfig, k: int) -> ImageList:
    return unlabeled_images(str(task.adapt), f"tasks[{k}].adapt")


def _test_images(task: TaskConfig, k: int) -> ImageList:
    return labelled_images(str(task.test), task.classnames, f"tasks[{k}].test")


def _check_images(items: Sequence[Item]) -> None:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        problems = [problem for problem in pool.map(check_image, items) if problem]
    if problems:
        more = f" (and {len(problems) - 1} more images)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}")


def _check_method(config: Config) -> None:
    """What the method needs and the config does not give."""
    method, needed = method_of(config.method), needed_images(config)
    if not config.models and config.method.name not in ("zero_shot", "joint"):
        raise UserError("no task has a checkpoint; merging needs at least one")
    missing = [task.name for task in config.models if task.adapt is None]
    if method.kind == "frank_wolfe" and any(task.adapt for task in config.tasks):
        missing = []  # a model without images is a candidate
    if needed != "none" and missing:
        raise DataError(
            f"method {config.method.name} learns from {needed} images, but task "
            f"{', '.join(missing)} has no adapt folder; name one in tasks[].adapt, or choose a "
            "method that needs no images"
        )
    if needed == "labelled":
        _require_labels(config)
    if not method.merges and all(task.test is None for task in config.tasks):
        raise DataError(
            f"method {config.method.name} merges nothing; it needs a test folder to report on"
        )


def _check_fit(config: Config, pretrained: VisualCheckpoint) -> None:
    """What the method needs of the model, and of the runs that it goes on from."""
    method, layout = config.method, pretrained.layout
    if isinstance(method, Joint):
        try:
            open_visual(method.checkpoint, layout, pretrained)
        except CheckpointError as error:
            raise CheckpointError(f"method.checkpoint: {error}") from error
    if isinstance(method, FwHard | FwSoft) and method.start is not None:
        read_lambdas(method.start, config.model_names, layout.names)
    linear = "transformer.resblocks.0.attn.in_proj_weight"
    if isinstance(method, RegMean | RegMeanPP) and linear not in layout.names:
        raise UserError(
            f"method.name: {method.name} solves for the linear layers of open_clip's vision "
            "transformers, and this model's image encoder is another kind; choose another method, "
            "such as fisher"
        )


def _require_labels(config: Config) -> None:
    """Every image to adapt on lies in a folder of its class."""
    for k, task in enumerate(config.tasks):
        if task.adapt is not None:
            where = f"tasks[{k}].adapt"
            try:
                labelled = labelled_images(task.adapt, task.classnames, where)
            except DataError as error:
                raise DataError(f"{error}; {_LABELS}") from error
            others = len(unlabeled_images(task.adapt, where)) - len(labelled)
            if others:
                raise DataError(
                    f"{where}: {task.adapt}: {others} images lie in no class folder; {_LABELS}"
                )


def _check_groups(config: Config, placement: Placement | None) -> None:
    if placement is not None:
        require_one_group(config, placement.processes)
    elif config.cluster.workers != "auto":
        require_one_group(config, max(1, int(config.cluster.workers)))


def require_one_group(config: Config, workers: int) -> None:
    """Raise :class:`UserError` where cosines are wanted of a gradient that is in parts: norms of
    the parts do not add up."""
    method, shards = config.method, config.cluster.shards
    if not isinstance(method, FwHard | FwSoft) or method.oracle != "cosine":
        return
    if workers > shards:
        raise UserError(
            f"method.oracle: cosine needs the whole gradient in one group of workers, and "
            f"{workers} workers with cluster.shards={shards} are {workers // shards} groups; set "
            f"cluster.shards: {workers}, or method.oracle: inner"
        )


def _placement(
    config: Config, resources: Resources | None, slots: int | None, found: _Findings
) -> Placement | None:
    if resources is None:
        if config.cluster.workers != "auto":
            found.attempt(lambda: require_work(int(config.cluster.workers), slots or None))
        return None
    return found.attempt(lambda: place(config.cluster, resources, slots or None))


def _layer_count(config: Config, layout: ParameterLayout) -> int:
    """Coefficients of each model; 0 where the method has none."""
    if not method_of(config.method).rows:
        return 0
    return len(layout.layers(granularity_of(config.method)).names)


@dataclass(frozen=True)
class _Memory:
    """What each worker holds, and the choices that follow from it."""

    bytes_per_worker: dict[str, int]
    storage: VectorStorage = field(default_factory=VectorStorage)
    vector_bytes: int = 0
    micro_batch: int | None = None


def _static_memory(config: Config, layout: ParameterLayout, resolved: ResolvedModel) -> _Memory:
    """A merge without steps: the merged model, and the blocks that stream through it.

    Statistics are about as large as the model: those of one task, and two sums.
    """
    sums = 3 if method_of(config.method).kind == "statistics" else 0
    return _Memory(
        {
            **({"statistics": sums * layout.columns * _FLOAT_BYTES} if sums else {}),
            "process": psutil.Process().memory_info().rss,
            "merged model": max(layout.columns * _FLOAT_BYTES, resolved.weights.stat().st_size),
            "blocks": STREAM_BYTES,
        }
    )


def _learned_memory(
    config: Config,
    pretrained: VisualCheckpoint,
    resolved: ResolvedModel,
    rows: Sequence[TaskPlan],
    placement: Placement | None,
    resources: Resources | None,
) -> _Memory:
    from raymerge.models import activation_bytes, build_skeleton, make_preprocess

    visual = build_skeleton(resolved, "meta").visual
    height, width = make_preprocess(visual).size
    processes = placement.processes if placement else 1
    shard = pretrained.layout.shard(0, config.cluster.shards)
    gpu = bool(resources and resources.gpus and config.cluster.gpus_per_worker != 0)
    per_image = activation_bytes(visual)
    slots = -(-sum(row.images_per_step for row in rows) // processes)
    batch = micro_batch(config.cluster.micro_batch, per_image, gpu)
    shown = max(steps_of(config) * images_per_step(config), _merging_images(config))
    pinned = sum(min(row.adapt_images, shown) for row in rows)
    export = 0 if gpu or processes > 1 else STREAM_BYTES + _largest_tensor(pretrained)
    needs = WorkerNeeds(
        process=psutil.Process().memory_info().rss,
        weights=2 * shard.padded_columns * _FLOAT_BYTES,
        pretrained=shard.columns * _FLOAT_BYTES,
        coefficients=len(config.models) * shard.cells * _COEFFICIENT_BYTES,
        images=-(-pinned // processes) * 3 * height * width,
        activations=max(export, pass_images(slots, batch) * per_image),
    )
    vectors = len(config.models) * shard.columns * _FLOAT_BYTES
    storage = storage_for(
        config.vectors,
        needs,
        vectors,
        processes,
        resources.memory_bytes if resources else None,
        _gpu_share(config, resources) if gpu else None,
    )
    held = worker_bytes(needs, storage, vectors)
    return _Memory(held, storage, vector_bytes(storage.dtype, vectors), batch)


def _largest_tensor(model: VisualCheckpoint) -> int:
    """Bytes of the largest tensor of the whole file in float32: what writing it holds at once."""
    specs = model.checkpoint.specs.values()
    return max(math.prod(spec.shape) for spec in specs) * _FLOAT_BYTES


def _merging_images(config: Config) -> int:
    """Of each task, in the mergings within soft Frank-Wolfe."""
    given = config.optimizer
    return given.images_per_step * given.steps if isinstance(config.method, FwSoft) else 0


def _step_seconds(
    config: Config, resolved: ResolvedModel, images: int, memory: _Memory, placement: Placement
) -> float:
    """About, by a short probe of this machine, whose cores all its workers share."""
    import torch

    from raymerge.models import build_skeleton
    from raymerge.speed import forward_flops, step_seconds

    processes = placement.processes
    sharing = 1 if placement.gpus_per_worker else processes
    return step_seconds(
        forward_flops(build_skeleton(resolved, "meta").visual),
        -(-images // processes) * sharing,
        memory.vector_bytes * sharing,
        torch.bfloat16 if config.precision == "bfloat16" else torch.float32,
    )


def _gpu_share(config: Config, resources: Resources | None) -> int | None:
    """What one worker may fill of a GPU's memory; several workers may share one."""
    if resources is None or resources.gpu_bytes is None:
        return None
    each = config.cluster.gpus_per_worker
    return resources.gpu_bytes if each == "auto" else int(min(1.0, each) * resources.gpu_bytes)


def _require_memory(plan: Plan, resources: Resources | None) -> None:
    """On this machine alone; a cluster's nodes are not asked."""
    if resources is None or not resources.elastic or plan.placement is None:
        return
    if plan.placement.gpus_per_worker:
        return
    each = sum(plan.bytes_per_worker.values())
    need, have = each * plan.placement.processes, resources.memory_bytes
    if have is not None and need > have:
        raise UserError(
            f"cluster.workers: {plan.placement.processes} workers x {human_bytes(each)} = "
            f"{human_bytes(need)}, but this machine has {human_bytes(have)}; use fewer workers, "
            "more cluster.shards, vectors.dtype: bfloat16 or vectors.location: disk"
        )


def _require_separate_output(config: Config, resolved: ResolvedModel) -> None:
    """A merge never replaces a file that it reads."""
    if config.output is None:
        return
    written = (Path(config.output) / WEIGHTS_FILE).resolve()
    for read in (resolved.weights, *map(Path, merged_checkpoints(config))):
        if written in (read.resolve(), (read / WEIGHTS_FILE).resolve()):
            raise UserError(
                f"output {config.output}: holds {written.name}, which this merge reads; choose "
                "another folder"
            )


def _require_disk(plan: Plan, output: str | None) -> None:
    if output is None or not plan.output_bytes:
        return
    folder = Path(output)
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"output {output}: {folder} is not writable; choose another folder")
    free = shutil.disk_usage(folder).free
    if free < plan.output_bytes:
        raise UserError(
            f"output {output}: needs {human_bytes(plan.output_bytes)}, but {folder} has "
            f"{human_bytes(free)} free"
        )


def _require_scratch(plan: Plan, config: Config) -> None:
    """Room for vectors that are kept on disk, on this machine."""
    if plan.storage.location != "disk" or plan.placement is None:
        return
    folder = Path(config.vectors.folder or tempfile.gettempdir())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"vectors.folder: {folder} is no writable folder; name another")
    need, free = plan.vector_bytes * plan.placement.processes, shutil.disk_usage(folder).free
    if need > free:
        halve = ", or use vectors.dtype: bfloat16" if plan.storage.dtype == "float32" else ""
        raise UserError(
            f"vectors.folder: {folder} has {human_bytes(free)} free, but the task vectors take "
            f"{human_bytes(need)}; name another folder{halve}"
        )


def _notes(config: Config) -> tuple[str, ...]:
    same = [t.name for t in config.tasks if t.adapt is not None and t.adapt == t.test]
    needed = needed_images(config)
    if not same or needed == "none":
        return ()
    if needed == "labelled":
        return (f"learns from the labels of the test images of {', '.join(same)}",)
    return (f"adapts on the test images of {', '.join(same)}, without labels (as the paper does)",)


def _dtype(expert: VisualCheckpoint | None) -> str:
    if expert is None:
        return "?"
    specs = expert.checkpoint.specs
    kinds = {str(specs[expert.prefix + name].dtype) for name in expert.layout.names}
    return "/".join(sorted(kind.removeprefix("torch.") for kind in kinds))


def human_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def plan_text(plan: Plan) -> str:
    """The plan for a person."""
    width = max(len(task.name) for task in plan.tasks)
    lines = [
        f"model      {plan.model}: {plan.parameters:,} visual parameters in {plan.tensors} tensors",
        f"method     {plan.method}: {_size_text(plan)}",
        "tasks",
    ]
    lines += [
        f"  {task.name:<{width}}  {task.classes:>4} classes  {task.dtype}  "
        f"{task.adapt_images:>6} adapt images  {task.test_images:>6} test images"
        for task in plan.tasks
    ]
    if plan.steps:
        lines.append(
            f"steps      {plan.steps}, each with {plan.step_images} images{_time_text(plan)}"
        )
    lines.append(f"workers    {_placement_text(plan.placement)}")
    total = sum(plan.bytes_per_worker.values())
    parts = ", ".join(f"{key} {human_bytes(n)}" for key, n in plan.bytes_per_worker.items())
    lines.append(f"memory     {human_bytes(total)} per worker ({parts})")
    if plan.steps:
        lines.append(f"vectors    {_storage_text(plan)}")
    if plan.output_bytes:
        lines.append(f"disk       {human_bytes(plan.output_bytes)} for the merged model")
    lines += [f"note       {note}" for note in plan.notes]
    return "\n".join(lines)


def _size_text(plan: Plan) -> str:
    models = f"{plan.models} model{'' if plan.models == 1 else 's'}"
    return f"{models} x {plan.layers} layers of coefficients" if plan.layers else models


def _time_text(plan: Plan) -> str:
    if plan.step_s is None:
        return ""
    whole = timedelta(seconds=round(plan.steps * plan.step_s))
    return f"; about {plan.step_s:.2g} s each on this machine, {whole} in all"


def _storage_text(plan: Plan) -> str:
    place = {
        "device": "where the model computes",
        "host": "in host memory",
        "disk": "in a mapped file",
    }
    batch = f"{plan.micro_batch} images a pass" if plan.micro_batch else "one pass"
    if plan.storage.location == "files":
        return f"read from the checkpoints in every step, never held; {batch}"
    return (
        f"{human_bytes(plan.vector_bytes)} per worker in {plan.storage.dtype}, "
        f"{place[plan.storage.location]}; {batch}"
    )


def _placement_text(placement: Placement | None) -> str:
    if placement is None:
        return "decided on the cluster"
    if placement.workers == 0:
        return "1, in this process (no Ray)"
    return (
        f"{placement.workers} = {placement.groups} groups x {placement.shards} shards, each with "
        f"{placement.cpus_per_worker} CPUs and {placement.gpus_per_worker:g} GPUs"
    )
