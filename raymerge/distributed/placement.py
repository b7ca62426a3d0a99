"""Decide how many workers a run has, and how many CPUs and GPUs each of them gets.

These are pure decisions, tested without a cluster; ``placement_groups`` asks Ray for the slots.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace

from raymerge.config import ClusterConfig
from raymerge.errors import UserError


@dataclass(frozen=True)
class Resources:
    """Logical CPUs, GPUs and nodes of the whole cluster.

    ``is_elastic``: a private local cluster, which may declare more CPUs than the machine has.
    """

    cpus: int
    gpus: int = 0
    nodes: int = 1
    is_elastic: bool = True
    per_node: tuple[tuple[int, int], ...] = ()
    """CPUs and GPUs of each node, if known."""
    memory_bytes: int | None = None
    """Memory of this machine; None if the workers run elsewhere."""
    gpu_bytes: int | None = None
    """Memory of this machine's smallest GPU; None if there is none or it is unknown."""


@dataclass(frozen=True)
class Placement:
    """W workers in G groups of S shards; 0 workers means one worker in this process."""

    workers: int
    shards: int
    cpus_per_worker: int
    gpus_per_worker: float

    @property
    def groups(self) -> int:
        return self.workers // self.shards

    @property
    def processes(self) -> int:
        """Number of processes that hold data: at least this one."""
        return max(1, self.workers)


def environment_address() -> str | None:
    """Return RAY_ADDRESS, unless it is the dashboard's URL, which ``ray job submit`` uses."""
    address = os.environ.get("RAY_ADDRESS") or None
    return None if address is None or address.startswith("http") else address


def on_ray() -> bool:
    """Return whether this process is connected to Ray, without importing it."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def choose_placement(config: ClusterConfig, resources: Resources, slots: int | None) -> Placement:
    """Return the number of workers and what each of them gets.

    ``slots``: images per step, None if there are no steps. ``workers: auto`` is one worker per GPU,
    else one per node; a single worker on a local machine needs no Ray, so it becomes 0. Raises
    :class:`UserError` if the cluster is too small.
    """
    auto = config.workers == "auto"
    workers = _auto_workers(config, resources, slots) if auto else int(config.workers)
    require_work(workers, slots)
    gpus = _gpus_per_worker(config, resources)
    if config.shards > 1 and 0 < gpus < 1:
        raise UserError(
            f"cluster.gpus_per_worker: {gpus:g}, but the shards of one group cannot share a GPU; "
            "use 1, or shards: 1"
        )
    cpus = _cpus_per_worker(config, resources, max(1, workers))
    if not resources.is_elastic and workers:
        _require_fit("CPU", workers, cpus, resources.cpus)
    if workers:
        _require_fit("GPU", workers, gpus, resources.gpus)
    return Placement(workers, config.shards, cpus, gpus)


def regroup(placement: Placement, alive: int) -> Placement:
    """Return the placement for ``alive`` workers: complete groups, or a single smaller one.

    Each worker of a smaller group holds more, so that all tasks and vectors are still covered.
    """
    shards = min(placement.shards, alive)
    return replace(placement, workers=alive - alive % shards, shards=shards)


def require_work(workers: int, slots: int | None) -> None:
    """Raise :class:`UserError` if a step has fewer images than there are workers."""
    if slots is not None and workers > slots:
        raise UserError(
            f"cluster.workers: {workers} workers for {slots} images per step would leave "
            f"{workers - slots} idle; use at most {slots}"
        )


def _auto_workers(config: ClusterConfig, resources: Resources, slots: int | None) -> int:
    workers = resources.gpus or resources.nodes
    if slots is not None:
        workers = min(workers, slots)
    workers = max(config.shards, workers - workers % config.shards)
    return 0 if workers == 1 and resources.is_elastic else workers


def _gpus_per_worker(config: ClusterConfig, resources: Resources) -> float:
    if config.gpus_per_worker != "auto":
        return config.gpus_per_worker
    return 1.0 if resources.gpus else 0.0


def _cpus_per_worker(config: ClusterConfig, resources: Resources, workers: int) -> int:
    if config.cpus_per_worker != "auto":
        if resources.is_elastic and config.cpus_per_worker > resources.cpus:
            raise UserError(
                f"cluster.cpus_per_worker: {config.cpus_per_worker}, but this machine has "
                f"{resources.cpus}; use at most that, or auto"
            )
        return config.cpus_per_worker
    return max(1, min(resources.cpus // workers, _fair_cpus(resources, workers)))


def _fair_cpus(resources: Resources, workers: int) -> int:
    """Return the CPUs per worker on the smallest node with workers: a GPU node, if any exist."""
    hosts = [(c, g) for c, g in resources.per_node if g or not resources.gpus]
    if not hosts:
        return resources.cpus
    if resources.gpus:
        return min(cpus // gpus for cpus, gpus in hosts)
    return min(cpus for cpus, _ in hosts) // -(-workers // len(hosts))


def _require_fit(kind: str, workers: int, each: float, available: float) -> None:
    if workers * each > available:
        key = f"cluster.{kind.lower()}s_per_worker"
        raise UserError(
            f"cluster.workers: {workers} workers x {each:g} {kind}s = {workers * each:g}, but the "
            f"cluster has {available:g}; lower cluster.workers or {key}"
        )
