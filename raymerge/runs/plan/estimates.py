"""Estimates of a run's memory and time, from headers and a short measurement of this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor, nn

from raymerge.config import Config
from raymerge.data.preprocess import make_preprocess
from raymerge.distributed.placement import Placement, Resources
from raymerge.engine.memory import (
    WorkerNeeds,
    micro_batch,
    pass_images,
    storage_for,
    vector_bytes,
    worker_bytes,
)
from raymerge.engine.messages import VectorStorage
from raymerge.merging.layout import ParameterLayout
from raymerge.merging.registry import method_of, schedule_of
from raymerge.models.checkpoints.task_vectors import STREAM_BYTES
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint
from raymerge.models.resolve import ResolvedModel
from raymerge.runs.plan.plan import TaskPlan

_FLOAT_BYTES = 4
_COEFFICIENT_BYTES = 4 + 4 + 4 + 8  # λ twice, ∂ℒ/∂λ, and ∂ℒ/∂λ as it is summed


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
    sums = 3 if method_of(config.method).statistics is not None else 0
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
    from raymerge.data.preprocess import make_preprocess
    from raymerge.models.skeleton import activation_bytes, build_skeleton

    visual = build_skeleton(resolved, "meta").visual
    height, width = make_preprocess(visual).size
    processes = placement.processes if placement else 1
    shard = pretrained.layout.shard(0, config.cluster.shards)
    gpu = bool(resources and resources.gpus and config.cluster.gpus_per_worker != 0)
    per_image = activation_bytes(visual)
    slots = -(-sum(row.images_per_step for row in rows) // processes)
    batch = micro_batch(config.cluster.micro_batch, per_image, gpu)
    shown = max(schedule_of(config).steps * schedule_of(config).images, _merging_images(config))
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
    return given.images_per_step * given.steps if method_of(config.method).inner_steps else 0


def _step_seconds(
    config: Config, resolved: ResolvedModel, images: int, memory: _Memory, placement: Placement
) -> float:
    """About, by a short probe of this machine, whose cores all its workers share."""
    import torch

    from raymerge.models.skeleton import build_skeleton

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


_EFFICIENCY = 0.8


def forward_flops(visual: nn.Module) -> int:
    """Of one image; ``visual`` is the tower on ``meta``."""
    from torch.utils.flop_counter import FlopCounterMode

    height, width = make_preprocess(visual).size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        visual.train(False).requires_grad_(False)(torch.empty(1, 3, height, width, device="meta"))
    flops: int = counter.get_total_flops()
    return flops


def step_seconds(flops_per_image: int, images: int, vector_bytes: int, dtype: torch.dtype) -> float:
    """Seconds of one worker's step on this machine: a forward and a backward pass (three forward
    passes' work) of its images, and two reads of its task vectors."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops_s, bytes_s = _rates(device, dtype)
    return 3 * flops_per_image * images / (_EFFICIENCY * flops_s) + 2 * vector_bytes / bytes_s


def _rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOPs and bytes per second of a ViT-B's largest product and of a long sum."""
    a_BW = torch.ones(800, 768, device=device, dtype=dtype)
    w_VW = torch.ones(3072, 768, device=device, dtype=dtype)
    long_N = torch.ones(8_000_000, device=device)
    product_s = _fastest(lambda: nn.functional.linear(a_BW, w_VW), device)
    return 2 * 800 * 768 * 3072 / product_s, long_N.nbytes / _fastest(long_N.sum, device)


def _fastest(work: Callable[[], Tensor], device: torch.device) -> float:
    seconds = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
