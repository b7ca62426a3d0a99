"""Worker slots in the cluster: one placement group per group of shards, one bundle per worker.

Ray chooses the nodes, and chooses again when a node is lost. How many slots there are is decided
in ``placement``.
"""

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
from raymerge.engine.worker.identity import Identity, own_identity
from raymerge.engine.worker.served import ModelSource
from raymerge.engine.worker.worker import MergeWorker


@dataclass(frozen=True)
class WorkerSlot:
    """Bundle ``bundle`` of the placement group of the ``group``-th group of shards."""

    group: int
    bundle: int
    placement_group: PlacementGroup


@dataclass(frozen=True)
class Location:
    """The node of an actor. ``interface``: the network interface that has ``address``.

    ``identity``: None on the driver's own node, which has the driver's files.
    """

    node: str
    gpus: tuple[str, ...]
    address: str
    interface: str | None
    pid: int
    identity: Identity | None = None


def reserve_slots(placement: Placement) -> list[WorkerSlot]:
    """Request a slot for every worker; returns before Ray has found nodes for them."""
    bundle: dict[str, float] = {"CPU": placement.cpus_per_worker}
    if placement.gpus_per_worker:
        bundle["GPU"] = placement.gpus_per_worker
    groups = [
        placement_group([bundle] * placement.shards, strategy="PACK")
        for _ in range(placement.groups)
    ]
    return [
        WorkerSlot(index, shard, group)
        for index, group in enumerate(groups)
        for shard in range(placement.shards)
    ]


def all_reserved(slots: Sequence[WorkerSlot]) -> bool:
    """Return whether Ray has found nodes for all slots."""
    tables = [ray.util.placement_group_table(slot.placement_group) for slot in slots]
    return all(table.get("state") == "CREATED" for table in tables)


def start_actor(
    worker_class: type[MergeWorker],
    source: ModelSource,
    spec: WorkerSpec,
    placement: Placement,
    slot: WorkerSlot,
) -> Any:
    """Start an actor in the slot, as soon as Ray has a node for it; returns its handle."""
    options = {
        "num_cpus": placement.cpus_per_worker,
        "num_gpus": placement.gpus_per_worker,
        **ACTOR_OPTIONS,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=slot.placement_group, placement_group_bundle_index=slot.bundle
        ),
    }
    return ray.remote(**options)(worker_class).remote(source, spec)


def request_location(actor: Any) -> Any:
    """Return a reference to the actor's :class:`Location`, which shows that it is ready."""
    return actor.__ray_call__.remote(_location, ray.get_runtime_context().get_node_id())


def _location(worker: MergeWorker, driver_node: str) -> Location:
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
    node = context.get_node_id()
    identity = None if node == driver_node else own_identity(worker.source.inputs())
    return Location(node, gpus, address, interface, os.getpid(), identity)


def raylet_of(location: Location) -> tuple[str, int] | None:
    """Return address and port of a location's node; None for the driver's own node."""
    if location.identity is None:
        return None
    for node in ray.nodes():
        if node["NodeID"] == location.node:
            return str(node["NodeManagerAddress"]), int(node["NodeManagerPort"])
    return None
