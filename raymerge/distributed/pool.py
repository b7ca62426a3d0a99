"""WorkerPool: the actors of a run in their worker slots, started, called, restarted and stopped.

A worker is ready once it has reported its location. Ranks are assigned in ``process_groups``, and
what follows from a failed call is decided in ``recovery``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import remove_placement_group

from raymerge.config import ClusterConfig
from raymerge.distributed.agreement import agreement_check, sees, unseen
from raymerge.distributed.calls import Call, Limits, wait_for_results
from raymerge.distributed.failures import PREEMPTED, Budget, WorkerFailure, classify
from raymerge.distributed.placement import Placement
from raymerge.distributed.placement_groups import (
    Location,
    WorkerSlot,
    all_reserved,
    raylet_of,
    request_location,
    reserve_slots,
    start_actor,
)
from raymerge.distributed.preemption import PreemptionMonitor
from raymerge.engine.messages import IncidentKind, LoadReport, WorkerSpec
from raymerge.engine.worker.served import ModelSource
from raymerge.engine.worker.worker import MergeWorker
from raymerge.errors import RunError, WorkerLostError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class PoolWorker:
    """A worker slot and the actor that runs in it now, if any.

    ``location_request``: the reference of the location, until the actor is ready. ``location``:
    None until then. ``raylet``: its node's address and port, None on the driver's own node.
    ``spec``: None while it has no rank. ``report``: None until it has loaded the current request.
    """

    slot: WorkerSlot
    actor: Any = None
    location_request: Any = None
    location: Location | None = None
    raylet: tuple[str, int] | None = None
    spec: WorkerSpec | None = None
    report: LoadReport | None = None

    @property
    def rank(self) -> int:
        return -1 if self.spec is None else self.spec.rank

    @property
    def assignment(self) -> tuple[int, int, int]:
        """Its rank, the number of workers and of shards, which decide its part of a request."""
        assert self.spec is not None
        return self.spec.rank, self.spec.workers, self.spec.shards


class CallFailedError(Exception):
    """Calls of some workers failed. ``recovery`` handles it; it never leaves ``distributed``."""

    def __init__(self, failures: Mapping[PoolWorker, WorkerFailure]) -> None:
        super().__init__()
        self.failures = dict(failures)


OnResult = Callable[[PoolWorker, Any], None]


@dataclass(frozen=True)
class StoredValue:
    """A getter of a value in the object store, so that it is sent once and fetched where used."""

    reference: Any

    def __call__(self) -> Any:
        return ray.get(self.reference)


class WorkerPool:
    """One worker per slot of ``placement``, ordered by location once they have started."""

    def __init__(
        self,
        source: ModelSource,
        spec: WorkerSpec,
        placement: Placement,
        config: ClusterConfig,
        worker_class: type[MergeWorker],
    ) -> None:
        self.placement, self.budget = placement, Budget(config)
        self.spec = replace(
            spec, threads=placement.cpus_per_worker, use_gpu=placement.gpus_per_worker > 0
        )
        # Store the source first: if it cannot be pickled, no slot stays reserved.
        self._check_agreement = agreement_check(source.inputs)
        self._source = source.store_parts(lambda value: StoredValue(ray.put(value)))
        self.workers = [PoolWorker(slot) for slot in reserve_slots(placement)]
        self.start_limits = Limits(
            config.start_timeout_s, config.hang_timeout_s, "cluster.start_timeout_s"
        )
        self._worker_class = worker_class
        self._preemption = PreemptionMonitor()

    @property
    def ready(self) -> list[PoolWorker]:
        return [worker for worker in self.workers if worker.location is not None]

    @property
    def starting(self) -> list[PoolWorker]:
        return [worker for worker in self.workers if worker.location_request is not None]

    def preemption_pending(self, workers: Iterable[PoolWorker]) -> bool:
        """Return whether a node of these workers is about to be taken back."""
        locations = (worker.location for worker in workers)
        return self._preemption.is_pending({at.node for at in locations if at is not None})

    def close(self) -> None:
        """Stop all actors and free their slots. Never raises, because it runs during cleanup."""
        self._preemption.close()
        for worker in self.workers:
            self.stop(worker)
        groups = {w.slot.group: w.slot.placement_group for w in self.workers}
        for group in groups.values():
            try:
                remove_placement_group(group)
            except (RayError, ValueError) as error:
                logger.debug("remove placement group: %s", error)
        self.workers = []

    # --- start, restart, stop ------------------------------------------------------------------

    def start(self, minimum: int) -> None:
        """Start every worker; see :meth:`wait_until_ready`."""
        for worker in self.workers:
            self._start(worker)
        self.wait_until_ready(self.start_limits.call_s, minimum)
        self.workers.sort(key=_by_location)

    def _start(self, worker: PoolWorker) -> None:
        worker.actor = start_actor(
            self._worker_class, self._source, self.spec, self.placement, worker.slot
        )
        worker.location_request = request_location(worker.actor)

    def stop(self, worker: PoolWorker) -> None:
        """Kill the actor, if there is one. The slot stays reserved."""
        if worker.actor is not None:
            try:
                ray.kill(worker.actor)
            except (RayError, ValueError) as error:
                logger.debug("kill: %s", error)
        worker.actor = worker.location_request = worker.location = None
        worker.spec = worker.report = None

    def restart(self, worker: PoolWorker) -> None:
        self.stop(worker)
        self._start(worker)

    def wait_until_ready(self, timeout_s: float, minimum: int) -> None:
        """Wait until all workers are ready, or until ``timeout_s`` once ``minimum`` of them are.

        Raises :class:`RunError` when fewer are ready within ``cluster.start_timeout_s``.
        """
        began, start_timeout_s = time.monotonic(), self.start_limits.call_s
        while starting := self.starting:
            is_enough = len(self.ready) >= minimum
            limit_s = timeout_s if is_enough else max(timeout_s, start_timeout_s)
            left_s = began + limit_s - time.monotonic()
            if left_s <= 0:
                break
            requests = {worker.location_request: worker for worker in starting}
            for request in ray.wait(list(requests), timeout=left_s)[0]:
                self.take_location(requests[request])
        if len(self.ready) < minimum:
            raise self._too_few_workers(minimum)

    def take_location(self, worker: PoolWorker) -> None:
        """Note that a worker is ready; restart it, while the budget allows, if it died instead."""
        try:
            location = ray.get(worker.location_request)
        except RayError as error:
            self._retry_start(worker, classify(error))
            return
        if location.identity is not None:
            self._check_agreement(location.address, location.identity)
        worker.location, worker.location_request = location, None
        worker.raylet = raylet_of(location)

    def _retry_start(self, worker: PoolWorker, failure: WorkerFailure) -> None:
        self.stop(worker)
        kind: IncidentKind = "preemption" if failure.kind == "preemption" else "start"
        refusal = self.budget.spend(kind)
        if refusal is None:
            self._start(worker)
        else:
            logger.warning(
                "a worker %s before it was ready (%s); its slot stays empty",
                failure.reason, refusal,
            )  # fmt: skip

    def _too_few_workers(self, minimum: int) -> RunError:
        placement, limit = self.placement, f"{self.start_limits.call_s:g} s"
        if not all_reserved([worker.slot for worker in self.workers]):
            return RunError(
                f"the cluster found no room for {placement.workers} workers with "
                f"{placement.cpus_per_worker} CPUs and {placement.gpus_per_worker:g} GPUs each "
                f"within {limit}; use fewer workers (cluster.workers) or raise "
                "cluster.start_timeout_s"
            )
        return WorkerLostError(
            f"{len(self.ready)} of {placement.workers} workers were ready within {limit}, but at "
            f"least {minimum} are needed; lower cluster.min_workers or raise "
            "cluster.start_timeout_s"
        )

    # --- calls ---------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        workers: Sequence[PoolWorker],
        argument: Any,
        limits: Limits,
        on_result: OnResult,
    ) -> None:
        """Call a method of each worker; raises :class:`CallFailedError` if any call fails."""
        results = {worker: getattr(worker.actor, method).remote(argument) for worker in workers}
        self.wait_for(results, limits, on_result)

    def wait_for(
        self, results: Mapping[PoolWorker, Any], limits: Limits, on_result: OnResult
    ) -> None:
        """Wait for the references ``results``; raises :class:`CallFailedError` if any fails."""
        calls = {
            worker: Call(worker.actor, result, worker.raylet) for worker, result in results.items()
        }
        failures = wait_for_results(calls, limits, on_result)
        if failures:
            raise CallFailedError({w: self.attribute(w, f) for w, f in failures.items()})

    def require_visible(self, file: Path) -> None:
        """Raise :class:`RunError` unless every node of a worker sees a file of the driver's."""
        nodes = {w.location.address: w for w in self.ready if w.location and w.location.identity}
        answers = {w: w.actor.__ray_call__.remote(sees, str(file)) for w in nodes.values()}
        blind: list[str] = []

        def note(worker: PoolWorker, is_seen: bool) -> None:
            if not is_seen and worker.location is not None:
                blind.append(worker.location.address)

        self.wait_for(answers, self.start_limits, note)
        if blind:
            raise unseen(file, sorted(blind))

    def attribute(self, worker: PoolWorker, failure: WorkerFailure) -> WorkerFailure:
        """Return the failure, as a preemption if the worker was lost with an announced node."""
        node = None if worker.location is None else worker.location.node
        is_announced = node in self._preemption.announced_nodes
        return PREEMPTED if is_announced and failure.needs_restart else failure


def _by_location(worker: PoolWorker) -> tuple[int, str, tuple[str, ...], int]:
    """Within a group, neighbours share a node; workers that are not ready come last."""
    slot, location = worker.slot, worker.location
    if location is None:
        return slot.group, "~", (), slot.bundle
    return slot.group, location.node, location.gpus, slot.bundle
