"""The memory of a worker: what it needs, and where its task vectors fit.

The functions are pure decisions over numbers of bytes, so they are tested without much memory;
``benchmarks/memory.py`` compares the estimates with measured peaks. Measuring a model is left to
``runs.plan``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from raymerge.config import VectorDtype, VectorLocation, VectorsConfig
from raymerge.engine.messages import VectorStorage

_ACTIVATION_BYTES = 1 << 29
"""The activations of one pass on a CPU: passes of half a gigabyte run as fast as larger ones, and
leave the memory to the task vectors."""
_USABLE = 0.92
"""The fraction of a machine's memory that workers may use; the rest is the system's."""
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_bytes() -> int:
    """Return this machine's memory, or this container's limit if that is less."""
    total = int(psutil.virtual_memory().total)
    for name in _CGROUP_LIMITS:
        try:
            limit = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def micro_batch(
    setting: int | Literal["auto", "all"], bytes_per_image: int, gpu: bool
) -> int | None:
    """Return the largest number of images in one pass; None for all of them."""
    if setting == "all" or (setting == "auto" and gpu):
        return None
    if setting == "auto":
        return max(1, _ACTIVATION_BYTES // max(1, bytes_per_image))
    return setting


def pass_images(images: int, limit: int | None) -> int:
    """Return the images of one pass when ``images`` are split evenly into as few passes as fit.

    ``limit``: the most images that one pass may hold; None for any number.
    """
    if limit is None or images <= limit:
        return images
    return -(-images // -(-images // limit))


def choose_storage(
    config: VectorsConfig, float32_bytes: int, device_room: int | None, host_room: int | None
) -> VectorStorage:
    """Return the first of device, host and disk with room for the vectors, in float32 if it has.

    ``float32_bytes``: the size of one worker's vectors. ``device_room``, ``host_room``: the bytes
    left for them; None where that is not known, and then there is room.
    """
    dtypes: list[VectorDtype] = (
        ["float32", "bfloat16"] if config.dtype == "auto" else [config.dtype]
    )
    locations: list[VectorLocation] = (
        ["device", "host", "disk"] if config.location == "auto" else [config.location]
    )
    room = {"device": device_room, "host": host_room, "disk": None, "files": None}
    for location in locations:
        for dtype in dtypes:
            if _fits(vector_bytes(dtype, float32_bytes), room[location]):
                return VectorStorage(dtype, location, config.folder)
    return VectorStorage(dtypes[-1], locations[-1], config.folder)


def vector_bytes(dtype: VectorDtype, float32_bytes: int) -> int:
    """Return the bytes in ``dtype`` of vectors that take ``float32_bytes`` in float32."""
    return float32_bytes if dtype == "float32" else float32_bytes // 2


def _fits(need: int, room: int | None) -> bool:
    return room is None or need <= room


@dataclass(frozen=True)
class WorkerNeeds:
    """The bytes that one worker of a learned merge needs besides its task vectors."""

    process: int
    """Python with its libraries, before any model."""
    weights: int
    """θ and ∂ℒ/∂θ, flat, of the whole tower."""
    pretrained: int
    """θ₀ of the worker's shard."""
    images: int
    """Pinned, uint8."""
    coefficients: int
    """λ and ∂ℒ/∂λ of every cell, as the merge and the inner products spread them."""
    activations: int
    """The activations of one pass, or the memory to write the merged model if that is more."""

    @property
    def on_device(self) -> int:
        return self.weights + self.pretrained + self.coefficients + self.activations


def storage_for(
    config: VectorsConfig,
    needs: WorkerNeeds,
    float32_bytes: int,
    workers_here: int,
    memory_bytes: int | None,
    gpu_bytes: int | None,
) -> VectorStorage:
    """Return where a worker's vectors go when ``workers_here`` workers share this machine."""
    on_host = needs.process + needs.images + (0 if gpu_bytes else needs.on_device)
    host = None if memory_bytes is None else int(_USABLE * memory_bytes) // workers_here - on_host
    device = host if gpu_bytes is None else int(_USABLE * gpu_bytes) - needs.on_device
    return choose_storage(config, float32_bytes, device, host)


def worker_bytes(needs: WorkerNeeds, storage: VectorStorage, float32_bytes: int) -> dict[str, int]:
    """Return the bytes that a worker holds, by name; a mapped file counts 0."""
    vectors = vector_bytes(storage.dtype, float32_bytes)
    return {
        "process": needs.process,
        "weights and gradient": needs.weights,
        "pretrained": needs.pretrained,
        "task vectors": 0 if storage.location in ("disk", "files") else vectors,
        "images": needs.images,
        "coefficients": needs.coefficients,
        "activations": needs.activations,
    }
