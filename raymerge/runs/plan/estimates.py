"""Estimates of a run's memory and time, from headers and a short measurement of this machine.

The bytes are those of the largest worker, and come from the shapes of the model and the images of a
step; the rules for micro-batches and storage are in ``engine.memory``.
"""

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
_EFFICIENCY = 0.8  # of the probe's FLOPs, which a whole model reaches
_COEFFICIENT_BYTES = 4 + 4 + 4 + 8  # λ twice, ∂ℒ/∂λ, and ∂ℒ/∂λ as it is summed


@dataclass(frozen=True)
class MemoryEstimate:
    """The bytes of each worker by purpose, and the storage and micro-batch that follow."""

    bytes_per_worker: dict[str, int]
    storage: VectorStorage = field(default_factory=VectorStorage)
    vector_bytes: int = 0
    micro_batch: int | None = None


def static_memory(
    config: Config, layout: ParameterLayout, resolved: ResolvedModel
) -> MemoryEstimate:
    """Return the estimate for a merge without steps: the merged model and the blocks read into it.

    Statistics are about as large as the model: those of one task, and two sums.
    """
    sums = 3 if method_of(config.method).statistics is not None else 0
    return MemoryEstimate(
        {
            **({"statistics": sums * layout.columns * _FLOAT_BYTES} if sums else {}),
            "process": psutil.Process().memory_info().rss,
            "merged model": max(layout.columns * _FLOAT_BYTES, resolved.weights.stat().st_size),
            "blocks": STREAM_BYTES,
        }
    )


def learning_memory(
    config: Config,
    pretrained: VisualCheckpoint,
    resolved: ResolvedModel,
    tasks: Sequence[TaskPlan],
    placement: Placement | None,
    resources: Resources | None,
) -> MemoryEstimate:
    """Return the estimate for a merge with steps, and the storage of its task vectors."""
    from raymerge.models.skeleton import activation_bytes, build_skeleton  # imports open_clip

    # The shapes of the model and of one image.
    visual = build_skeleton(resolved, "meta").visual
    height, width = make_preprocess(visual).size
    processes = placement.processes if placement else 1
    shard = pretrained.layout.shard(0, config.cluster.shards)
    gpu = bool(resources and resources.gpus and config.cluster.gpus_per_worker != 0)
    per_image = activation_bytes(visual)
    # A worker pins every image that the steps use; a pass holds the activations of one micro-batch.
    slots = -(-sum(task.images_per_step for task in tasks) // processes)
    batch = micro_batch(config.cluster.micro_batch, per_image, gpu)
    schedule = schedule_of(config)
    images = max(schedule.steps * schedule.images, _inner_images(config))
    pinned = sum(min(task.adapt_images, images) for task in tasks)
    # Writing the merged model takes place in the worker's process if there is only one.
    export = 0 if gpu or processes > 1 else STREAM_BYTES + _largest_tensor(pretrained)
    needs = WorkerNeeds(
        process=psutil.Process().memory_info().rss,
        weights=2 * shard.padded_columns * _FLOAT_BYTES,
        pretrained=shard.columns * _FLOAT_BYTES,
        coefficients=len(config.models) * shard.cells * _COEFFICIENT_BYTES,
        images=-(-pinned // processes) * 3 * height * width,
        activations=max(export, pass_images(slots, batch) * per_image),
    )
    # The task vectors go where they fit beside the rest.
    vectors = len(config.models) * shard.columns * _FLOAT_BYTES
    storage = storage_for(
        config.vectors,
        needs,
        vectors,
        processes,
        resources.memory_bytes if resources else None,
        _gpu_share(config, resources) if gpu else None,
    )
    return MemoryEstimate(
        worker_bytes(needs, storage, vectors), storage, vector_bytes(storage.dtype, vectors), batch
    )


def _largest_tensor(model: VisualCheckpoint) -> int:
    """Return the float32 bytes of the file's largest tensor, which writing the model holds."""
    specs = model.checkpoint.specs.values()
    return max(math.prod(spec.shape) for spec in specs) * _FLOAT_BYTES


def _inner_images(config: Config) -> int:
    """Return the images of each task in the inner steps; 0 for a method without inner steps."""
    optimizer = config.optimizer
    inner = method_of(config.method).inner_steps
    return optimizer.images_per_step * optimizer.steps if inner else 0


def _gpu_share(config: Config, resources: Resources | None) -> int | None:
    """Return the bytes of a GPU's memory that one worker may fill; several may share a GPU."""
    if resources is None or resources.gpu_bytes is None:
        return None
    each = config.cluster.gpus_per_worker
    return resources.gpu_bytes if each == "auto" else int(min(1.0, each) * resources.gpu_bytes)


def step_seconds(
    config: Config,
    resolved: ResolvedModel,
    images: int,
    memory: MemoryEstimate,
    placement: Placement,
) -> float:
    """Return about how long a step takes on this machine, by a short probe.

    A worker does a forward and a backward pass (the work of three forward passes) of its images,
    and reads its task vectors twice. Workers without a GPU share this machine's cores.
    """
    from raymerge.models.skeleton import build_skeleton  # imports open_clip

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    flops_s, bytes_s = _rates(device, dtype)
    sharing = 1 if placement.gpus_per_worker else placement.processes
    shared_images = -(-images // placement.processes) * sharing
    flops = 3 * _forward_flops(build_skeleton(resolved, "meta").visual) * shared_images
    return flops / (_EFFICIENCY * flops_s) + 2 * memory.vector_bytes * sharing / bytes_s


def _forward_flops(visual: nn.Module) -> int:
    """Return the FLOPs of one image; ``visual`` is the tower on the ``meta`` device."""
    from torch.utils.flop_counter import FlopCounterMode

    height, width = make_preprocess(visual).size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        visual.train(False).requires_grad_(False)(torch.empty(1, 3, height, width, device="meta"))
    flops: int = counter.get_total_flops()
    return flops


def _rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return the FLOPs per second of a ViT-B's largest product, and bytes per second of a sum."""
    a_BW = torch.ones(800, 768, device=device, dtype=dtype)
    w_VW = torch.ones(3072, 768, device=device, dtype=dtype)
    long_N = torch.ones(8_000_000, device=device)
    product_s = _fastest(lambda: nn.functional.linear(a_BW, w_VW), device)
    return 2 * 800 * 768 * 3072 / product_s, long_N.nbytes / _fastest(long_N.sum, device)


def _fastest(work: Callable[[], Tensor], device: torch.device) -> float:
    """Return the seconds of the fastest of four calls."""
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
