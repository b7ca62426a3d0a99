"""Everything that can be checked before work starts, from headers and folder listings alone.

``check`` collects every problem; ``make_plan`` raises the first. ``merge`` runs the same checks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from raymerge.config import Config
from raymerge.data.slots import slot_counts
from raymerge.distributed.placement import Placement, Resources, choose_placement, require_work
from raymerge.engine.memory import (
    machine_bytes,
)
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
from raymerge.models.resolve import resolve_model
from raymerge.runs.plan.checks import (
    _adapt_images,
    _check_fit,
    _check_groups,
    _check_images,
    _check_method,
    _open_expert,
    _require_disk,
    _require_memory,
    _require_scratch,
    _require_separate_output,
    _test_images,
    check_heads,
)
from raymerge.runs.plan.estimates import _learned_memory, _static_memory, _step_seconds
from raymerge.runs.plan.plan import Plan, TaskPlan
from raymerge.runs.plan.remote_headers import (
    Outlined,
    fetch_checkpoints,
    outlined,
    remote_checkpoints,
)
from raymerge.runs.tracking import require_trackers


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
                replace(row, checkpoint=task.checkpoint and redact_url(task.checkpoint))
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
    learned = method_of(config.method).loop is not None
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
    if probe and learned and placement is not None and resources and resources.is_elastic:
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
        steps=schedule_of(config).steps if learned else 0,
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
        checkpoint=task.checkpoint and redact_url(task.checkpoint),
        dtype=_dtype(expert),
        classes=len(task.classnames),
        adapt_images=population,
        test_images=len(test) if test else 0,
        images_per_step=slot_counts([population], schedule_of(config).images)[0],
    )


def _placement(
    config: Config, resources: Resources | None, slots: int | None, found: _Findings
) -> Placement | None:
    if resources is None:
        if config.cluster.workers != "auto":
            found.attempt(lambda: require_work(int(config.cluster.workers), slots or None))
        return None
    return found.attempt(lambda: choose_placement(config.cluster, resources, slots or None))


def _layer_count(config: Config, layout: ParameterLayout) -> int:
    """Coefficients of each model; 0 where the method has none."""
    method = method_of(config.method)
    if not method.rows:
        return 0
    return len(layout.layers(method.granularity(config.method)).names)


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
