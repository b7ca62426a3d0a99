"""Where workers run: one placement group for every group of shards, one bundle a worker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raymerge.distributed.calls import ACTOR_OPTIONS
from raymerge.distributed.placement import Placement
from raymerge.engine.messages import WorkerSpec
from raymerge.engine.worker.worker import MergeWorker


@dataclass(frozen=True)
class Place:
    """Bundle ``bundle`` of the ``group``-th group of shards. Ray moves it when its node is lost."""

    group: int
    bundle: int
    reserved: PlacementGroup


@dataclass(frozen=True)
class Whereabouts:
    """Where an actor has come to run. ``interface``: the network interface of its Ray address."""

    node: str
    gpus: tuple[str, ...]
    address: str
    interface: str | None
    pid: int


def reserve(placement: Placement) -> list[Place]:
    """Ask for all places; Ray finds them in its own time."""
    bundle: dict[str, float] = {"CPU": placement.cpus_per_worker}
    if placement.gpus_per_worker:
        bundle["GPU"] = placement.gpus_per_worker
    groups = [
        placement_group([bundle] * placement.shards, strategy="PACK")
        for _ in range(placement.groups)
    ]
    return [Place(g, b, group) for g, group in enumerate(groups) for b in range(placement.shards)]


def found(places: Sequence[Place]) -> bool:
    """Whether the cluster has found room for all of them."""
    tables = [ray.util.placement_group_table(place.reserved) for place in places]
    return all(table.get("state") == "CREATED" for table in tables)


def create(worker: type[MergeWorker], spec: WorkerSpec, placement: Placement, place: Place) -> Any:
    """The plain class becomes an actor here, and only here."""
    options = {
        "num_cpus": placement.cpus_per_worker,
        "num_gpus": placement.gpus_per_worker,
        **ACTOR_OPTIONS,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=place.reserved, placement_group_bundle_index=place.bundle
        ),
    }
    return ray.remote(**options)(worker).remote(spec)


def ask_whereabouts(actor: Any) -> Any:
    """A reference to its :class:`Whereabouts`: the first sign of life."""
    return actor.__ray_call__.remote(_whereabouts)


def _whereabouts(worker: MergeWorker) -> Whereabouts:
    context = ray.get_runtime_context()
    address: str = ray.util.get_node_ip_address()
    interface = next(
        (
            name
            for name, addresses in psutil.net_if_addrs().items()
            if any(a.address == address for a in addresses)
        ),
        None,
    )
    gpus = tuple(map(str, ray.get_gpu_ids()))
    return Whereabouts(context.get_node_id(), gpus, address, interface, os.getpid())
