"""A run's plan: all checks, then the estimates, from headers and folder listings alone.

``check`` collects every problem; ``make_plan`` raises the first. ``raymerge plan`` and ``merge``
run the same checks. The checks themselves are in ``checks``, the estimates in ``estimates``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, ParamSpec, TypeVar

from raymerge.config import Config
from raymerge.data.slots import slot_counts
from raymerge.data.sources import labelled_images, unlabeled_images
from raymerge.distributed.placement import Placement, Resources, choose_placement, require_work
from raymerge.engine.memory import machine_bytes
from raymerge.errors import UserError
from raymerge.files.urls import redact_url
from raymerge.merging.layout import ParameterLayout
from raymerge.merging.registry import (
    describe,
    merged_checkpoints,
    method_of,
    needed_images,
    schedule_of,
)
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint
from raymerge.models.pretrained import open_pretrained, whole_bytes
from raymerge.models.resolve import ResolvedModel, resolve_model
from raymerge.runs.plan.checks import (
    check_declared_workers,
    check_disk,
    check_fit,
    check_heads,
    check_images,
    check_memory,
    check_method,
    check_separate_output,
    check_vector_folder,
    open_expert,
)
from raymerge.runs.plan.estimates import learning_memory, static_memory, step_seconds
from raymerge.runs.plan.expert_warnings import OpenedCheckpoint, expert_warnings
from raymerge.runs.plan.plan import Plan, TaskPlan
from raymerge.runs.plan.remote_headers import (
    HeaderConfig,
    fetch_checkpoints,
    fetch_headers,
    remote_checkpoints,
)
from raymerge.runs.tracking import require_trackers

_P = ParamSpec("_P")
_T = TypeVar("_T")


def local_resources() -> Resources:
    """Return this machine's cores, memory and GPUs, before any Ray is started."""
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count()
    totals = [torch.cuda.get_device_properties(gpu).total_memory for gpu in range(gpus)]
    return Resources(
        cpus, gpus, memory_bytes=machine_bytes(), gpu_bytes=min(totals) if totals else None
    )


def make_plan(config: Config, resources: Resources | None = None, *, experts: bool = True) -> Plan:
    """Return the plan, with every checkpoint behind a URL fetched.

    ``experts``: whether to check the tasks' checkpoints. Raises the first problem as a
    :class:`UserError` that says how many more there are.
    """
    # A mistake in the config is reported before gigabytes are fetched.
    if remote_checkpoints(config):
        with fetch_headers(config) as headers:
            problems = check(headers.config, resources, experts=experts, samples=False)[1]
            _raise_first(problems, headers)
        fetch_checkpoints(config)
    plan, problems = check(config, resources, experts=experts)
    _raise_first(problems)
    assert plan is not None  # no problem means a plan
    return plan


def _raise_first(problems: Sequence[UserError], headers: HeaderConfig | None = None) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more: see `raymerge plan`)" if len(problems) > 1 else ""
        text = headers.restore_urls(str(problems[0])) if headers else problems[0]
        raise type(problems[0])(f"{text}{more}")


def check_headers(
    config: Config, resources: Resources | None = None, *, probe: bool = False
) -> tuple[Plan | None, list[UserError]]:
    """Return the result of :func:`check` with only the headers of remote checkpoints fetched."""
    urls = remote_checkpoints(config)
    if not urls:
        return check(config, resources, probe=probe)
    with fetch_headers(config) as headers:
        plan, problems = check(headers.config, resources, probe=probe, samples=False)
        problems = [type(problem)(headers.restore_urls(str(problem))) for problem in problems]
        if plan is not None:
            tasks = tuple(
                replace(row, checkpoint=task.checkpoint and redact_url(task.checkpoint))
                for row, task in zip(plan.tasks, config.tasks, strict=True)
            )
            note = f"fetches what is new of {len(urls)} remote checkpoints before it merges"
            model = headers.restore_urls(plan.model)
            plan = replace(plan, tasks=tasks, model=model, notes=(*plan.notes, note))
        return plan, problems


def check(
    config: Config,
    resources: Resources | None = None,
    *,
    experts: bool = True,
    probe: bool = False,
    samples: bool = True,
) -> tuple[Plan | None, list[UserError]]:
    """Return the plan (None if the pretrained model cannot be opened) and every problem.

    ``resources``: None if not known yet. ``experts``: whether to check the tasks' checkpoints.
    ``probe``: also time this machine, for an estimate of a step's seconds. ``samples``: whether the
    checkpoints hold their numbers, which the warnings compare; stand-ins of headers do not.
    """
    problems = _Problems()
    # What is wrong with the tasks is reported even if the model cannot be opened.
    model = problems.attempt(_open_model, config)
    pretrained = model.pretrained if model else None
    indices = range(len(config.tasks))
    checked = [_check_task(config, k, pretrained, problems, experts) for k in indices]
    tasks = [task for task, _ in checked]
    problems.attempt(check_method, config)
    problems.attempt(require_trackers, config.tracking)
    if model is None:
        return None, problems.errors
    problems.attempt(check_fit, config, model.pretrained)
    problems.attempt(check_heads, config, model.resolved)
    # The remaining checks compare the estimates with this machine.
    plan = _estimate(config, model, tasks, resources, problems, probe)
    opened = [
        OpenedCheckpoint(task.name, str(task.checkpoint), expert)
        for task, expert in checked
        if expert is not None
    ]
    base = OpenedCheckpoint("model", config.model.reference, model.pretrained)
    warnings = problems.attempt(expert_warnings, base, opened, samples=samples)
    plan = replace(plan, warnings=warnings or ())
    problems.attempt(check_memory, plan, resources)
    problems.attempt(check_separate_output, config, model.resolved)
    problems.attempt(check_disk, plan, config.output)
    problems.attempt(check_vector_folder, plan, config)
    return plan, problems.errors


class _Problems:
    """The errors of the checks, in their order."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    def attempt(self, check: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        """Return the check's result, or None if it raises an error, which is kept."""
        try:
            return check(*args, **kwargs)
        except UserError as problem:
            self.errors.append(problem)
        except OSError as error:  # no permission on the way, or too long a name
            self.errors.append(UserError(f"{error.filename}: {error.strerror}"))
        return None


class _Model(NamedTuple):
    """The opened pretrained model; ``leftovers``: the size of the text parameters beside it."""

    resolved: ResolvedModel
    pretrained: VisualCheckpoint
    leftovers: int


def _open_model(config: Config) -> _Model:
    resolved = resolve_model(config.model)
    return _Model(resolved, *open_pretrained(resolved))


def _check_task(
    config: Config,
    k: int,
    pretrained: VisualCheckpoint | None,
    problems: _Problems,
    experts: bool,
) -> tuple[TaskPlan, VisualCheckpoint | None]:
    """Return a task's row of the plan and its expert; what is wrong goes into ``problems``."""
    task, key = config.tasks[k], f"tasks[{k}]"
    expert = adapt = test = None
    # Each file and folder is opened on its own, so that every problem is listed.
    if experts and task.checkpoint is not None:
        expert = problems.attempt(open_expert, task, key, pretrained)
    if task.adapt:
        adapt = problems.attempt(unlabeled_images, task.adapt, f"{key}.adapt")
    if task.test:
        test = problems.attempt(labelled_images, task.test, task.classnames, f"{key}.test")
    for images in (adapt, test):
        if images is not None:
            problems.attempt(check_images, images.items)
    population = len(adapt) if adapt else 0
    row = TaskPlan(
        name=task.name,
        checkpoint=task.checkpoint and redact_url(task.checkpoint),
        dtype=_dtype(expert),
        classes=len(task.classnames),
        adapt_images=population,
        test_images=len(test) if test else 0,
        images_per_step=slot_counts([population], schedule_of(config).images)[0],
    )
    return row, expert


def _dtype(expert: VisualCheckpoint | None) -> str:
    """Return the number types of an expert's merged tensors; ``?`` if it could not be opened."""
    if expert is None:
        return "?"
    specs = expert.checkpoint.specs
    kinds = {str(specs[expert.prefix + name].dtype) for name in expert.layout.names}
    return "/".join(sorted(kind.removeprefix("torch.") for kind in kinds))


def _estimate(
    config: Config,
    model: _Model,
    tasks: Sequence[TaskPlan],
    resources: Resources | None,
    problems: _Problems,
    probe: bool,
) -> Plan:
    """Return the plan from the checked tasks; problems with the workers go into ``problems``."""
    method, layout = method_of(config.method), model.pretrained.layout
    # Only a method with a loop loads vectors and images into its workers.
    learns = method.loop is not None
    step_images = sum(task.images_per_step for task in tasks) if learns else 0
    placement = _placement(config, resources, step_images or None, problems)
    problems.attempt(check_declared_workers, config, placement)
    if learns:
        memory = learning_memory(
            config, model.pretrained, model.resolved, tasks, placement, resources
        )
    else:
        memory = static_memory(config, layout, model.resolved)
    # A probe of this machine says nothing about a cluster's nodes.
    step_s = None
    if probe and learns and placement is not None and resources and resources.is_elastic:
        step_s = step_seconds(config, model.resolved, step_images, memory, placement)
    return Plan(
        method=describe(config.method),
        model=model.resolved.name,
        parameters=layout.parameters,
        tensors=len(layout.names),
        layers=_layer_count(config, layout),
        models=len(merged_checkpoints(config)),
        tasks=tuple(tasks),
        placement=placement,
        steps=schedule_of(config).steps if learns else 0,
        step_images=step_images,
        bytes_per_worker=memory.bytes_per_worker,
        storage=memory.storage,
        vector_bytes=memory.vector_bytes,
        micro_batch=memory.micro_batch,
        step_s=step_s,
        output_bytes=whole_bytes(model.pretrained) if method.merges else 0,
        notes=_notes(config),
        warnings=(),
        resolved=model.resolved,
        leftovers=model.leftovers,
    )


def _placement(
    config: Config, resources: Resources | None, slots: int | None, problems: _Problems
) -> Placement | None:
    """Return the workers' placement; None if it is decided on the cluster, or impossible."""
    if resources is None:
        if config.cluster.workers != "auto":
            problems.attempt(require_work, int(config.cluster.workers), slots)
        return None
    return problems.attempt(choose_placement, config.cluster, resources, slots)


def _layer_count(config: Config, layout: ParameterLayout) -> int:
    """Return the coefficients of each model; 0 if the method has none."""
    method = method_of(config.method)
    if not method.rows:
        return 0
    return len(layout.layers(method.granularity(config.method)).names)


def _notes(config: Config) -> tuple[str, ...]:
    """Return what a reader of the results must know about the images."""
    same = [t.name for t in config.tasks if t.adapt is not None and t.adapt == t.test]
    needed = needed_images(config)
    if not same or needed == "none":
        return ()
    if needed == "labelled":
        return (f"learns from the labels of the test images of {', '.join(same)}",)
    return (f"adapts on the test images of {', '.join(same)}, without labels (as the paper does)",)
