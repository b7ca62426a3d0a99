"""ProcessGroups: ranks for the ready workers, and one process group per group of shards.

Every forming is a new generation, so that nothing left over from an abandoned one is taken for
current. When to form the groups is decided in ``recovery``.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from raymerge.distributed.failures import MISSED_RENDEZVOUS
from raymerge.distributed.placement import regroup
from raymerge.distributed.pool import CallFailedError, PoolWorker, WorkerPool
from raymerge.engine.messages import Rendezvous

_JOIN_TIMEOUT_S = 60.0
_COLLECTIVE_TIMEOUT_S = 1200.0  # a last resort: the driver's own deadlines should fire first


class ProcessGroups:
    """``workers``: those with a rank, in rank order. ``generation``: the number of this forming."""

    def __init__(self, pool: WorkerPool) -> None:
        self.generation = 0
        self.workers: list[PoolWorker] = []
        self._pool, self._run = pool, uuid.uuid4().hex

    def form(self) -> None:
        """Give the ready workers their ranks and join them; raises :class:`CallFailedError`."""
        # The rendezvous store still holds the keys of the previous generation.
        self.generation += 1
        # Choose who takes part, and note whose assignment has changed.
        placement, ready = self._pool.placement, self._pool.ready
        shape = regroup(placement, len(ready))
        self.workers = _complete_groups_first(ready, placement.shards)[: shape.workers]
        for worker in ready:
            if worker not in self.workers:  # it will miss the requests that the others get
                worker.spec = worker.report = None
        for rank, worker in enumerate(self.workers):
            spec = replace(self._pool.spec, rank=rank, workers=shape.workers, shards=shape.shards)
            if worker.spec != spec:
                worker.spec, worker.report = spec, None
        # Send unchanged assignments as well, because the previous call may have been lost.
        assigned = {worker: worker.actor.assign.remote(worker.spec) for worker in self.workers}
        self._pool.wait_for(assigned, self._pool.start_limits, lambda worker, result: None)
        if shape.shards > 1:
            for first in range(0, shape.workers, shape.shards):
                self.join(self.workers[first : first + shape.shards])

    def join(self, workers: Sequence[PoolWorker]) -> None:
        """Join one group of shards; raises :class:`CallFailedError` naming all who did not meet."""
        locations = [worker.location for worker in workers if worker.location is not None]
        limits, host = self._pool.start_limits, locations[0].address
        # Shard 0 opens the store where all of them meet.
        ports: list[int] = []
        self._pool.request(
            "open_store", workers[:1], host, limits, lambda worker, port: ports.append(port)
        )
        is_across_nodes = len({location.address for location in locations}) > 1
        joins: dict[PoolWorker, Any] = {}
        for worker, location in zip(workers, locations, strict=True):
            rendezvous = Rendezvous(
                host=host,
                port=ports[0],
                prefix=f"{self._run}/{workers[0].rank}/gen{self.generation}",
                timeout_s=_COLLECTIVE_TIMEOUT_S,
                join_timeout_s=_JOIN_TIMEOUT_S,
                interface=location.interface if is_across_nodes else None,
            )
            joins[worker] = worker.actor.join.remote(rendezvous)
        # torch cannot forget a group that failed to form, so whoever did not join must restart.
        joined: set[PoolWorker] = set()
        try:
            self._pool.wait_for(joins, limits, lambda worker, result: joined.add(worker))
        except CallFailedError as error:
            failures = {
                worker: replace(error.failures.get(worker, MISSED_RENDEZVOUS), needs_restart=True)
                for worker in workers
                if worker not in joined
            }
            raise CallFailedError(failures) from None


def _complete_groups_first(ready: Sequence[PoolWorker], shards: int) -> list[PoolWorker]:
    """Order workers so that groups which lost nobody keep their shards, and so their vectors."""
    sizes = Counter(worker.slot.group for worker in ready)
    return sorted(ready, key=lambda worker: sizes[worker.slot.group] < shards)
