"""The plan as a value, and as the text that ``raymerge plan`` prints.

``make`` builds it; ``to_json`` is the same for programs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from raymerge.distributed.placement import Placement
from raymerge.engine.messages import VectorStorage
from raymerge.errors import escape_unprintable
from raymerge.models.resolve import ResolvedModel


@dataclass(frozen=True)
class TaskPlan:
    """One task: its checkpoint, its number type, and the counts of its classes and images."""

    name: str
    checkpoint: str | None
    dtype: str
    classes: int
    adapt_images: int
    test_images: int
    images_per_step: int


@dataclass(frozen=True)
class Plan:
    """The work of a run and its needs. Bytes are estimates for the largest worker."""

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
    """The size of one worker's task vectors, wherever they are."""
    micro_batch: int | None
    step_s: float | None
    """About how long a step takes, from a probe of this machine; None without one."""
    output_bytes: int
    notes: tuple[str, ...]
    """Facts for the reader of the results, each the end of a sentence about the merge."""
    warnings: tuple[str, ...]
    """A sentence for whatever is left out of the experts or should be doubted."""
    resolved: ResolvedModel = field(repr=False)
    leftovers: int
    """The size of the text parameters beside the pretrained tower; see ``open_pretrained``."""

    def to_json(self) -> dict[str, Any]:
        """Return what ``raymerge plan --json`` prints."""
        data = asdict(self)
        del data["resolved"], data["leftovers"]
        data["total_bytes_per_worker"] = sum(self.bytes_per_worker.values())
        return data


def human_bytes(count: float) -> str:
    """Return a size in decimal units, such as ``6.8 MB``."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def plan_text(plan: Plan) -> str:
    """Return what ``raymerge plan`` prints."""
    width = max(len(task.name) for task in plan.tasks)
    # The model, the method and a line for each task.
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
    # The work and what it takes; a merge without steps has no vectors in its workers.
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
    lines += [f"warning    {escape_unprintable(warning)}" for warning in plan.warnings]
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
        return f"read from the checkpoints in every step, never kept; {batch}"
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
