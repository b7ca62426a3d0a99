"""The requests that forming the groups sends. Stand-ins replace the actors: no cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from raymerge.config import ClusterConfig, ModelConfig
from raymerge.distributed.actor_group import ActorGroup, _PendingRequest
from raymerge.distributed.calls import Limits
from raymerge.distributed.failures import MISSED_RENDEZVOUS, WorkerFailure
from raymerge.distributed.placement import Placement
from raymerge.distributed.placement_groups import Location, WorkerSlot
from raymerge.distributed.pool import CallFailedError, OnResult, PoolWorker, WorkerPool
from raymerge.distributed.process_groups import ProcessGroups
from raymerge.engine.messages import LoadReport, StatisticsRequest, WorkerSpec
from raymerge.engine.worker.clip_source import ClipSource

REPORT = LoadReport(0, "cpu", (), 0, 0, 0, 0.0)
LOCATION = Location("node", (), "127.0.0.1", None, 1)


class Actor:
    """Records the requests that it gets."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any]] = []

    def __getattr__(self, method: str) -> Any:
        actor = self

        class Method:
            def remote(self, argument: Any) -> str:
                actor.requests.append((method, argument))
                return method

        return Method()

    def arguments(self, method: str) -> list[Any]:
        return [argument for name, argument in self.requests if name == method]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> WorkerPool:
    """Four ready workers in two groups of two; every call succeeds at once."""
    slots = [WorkerSlot(n // 2, n % 2, None) for n in range(4)]  # type: ignore[arg-type]
    monkeypatch.setattr("raymerge.distributed.pool.reserve_slots", lambda placement: slots)
    source = ClipSource(ModelConfig(arch="local-dir:m"), ())
    placement = Placement(4, 2, 1, 0.0)
    pool = WorkerPool(source, WorkerSpec(), placement, ClusterConfig(), object)  # type: ignore[arg-type]
    pool._preemption.close()
    for worker in pool.workers:
        worker.actor, worker.location = Actor(), LOCATION

    def answer(results: Mapping[PoolWorker, Any], limits: Limits, on_result: OnResult) -> None:
        for worker, method in results.items():
            on_result(worker, 1 if method == "open_store" else None)

    monkeypatch.setattr(pool, "wait_for", answer)
    return pool


@pytest.fixture
def groups(pool: WorkerPool) -> ProcessGroups:
    return ProcessGroups(pool)


def test_every_worker_is_sent_its_assignment_at_every_forming(groups: ProcessGroups) -> None:
    """The previous call may have been lost: then it does not know the assignment that it has."""
    for times in (1, 2):
        groups.form()
        for rank, worker in enumerate(groups.workers):
            specs = worker.actor.arguments("assign")
            assert [spec.rank for spec in specs] == [rank] * times


def test_a_worker_without_a_rank_must_load_again(pool: WorkerPool, groups: ProcessGroups) -> None:
    groups.form()
    for worker in pool.workers:
        worker.report = REPORT
    pool.workers[3].location = None
    groups.form()
    first, second, idle, _ = pool.workers
    assert groups.workers == [first, second]
    assert idle.spec is idle.report is None
    pool.workers[3].location = LOCATION
    groups.form()
    assert groups.workers == pool.workers
    assert idle.report is None  # although its assignment is the same as before


def test_after_a_failed_rendezvous_every_worker_that_did_not_join_is_restarted(
    pool: WorkerPool, groups: ProcessGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch numbers the groups that fail to form, and workers of two numbers never meet."""
    groups.form()
    first, second = groups.workers[:2]
    succeed, died = pool.wait_for, WorkerFailure("worker", "died")

    def fail_joins(results: Mapping[PoolWorker, Any], limits: Limits, on_result: OnResult) -> None:
        if "join" in results.values():
            raise CallFailedError({second: died})
        succeed(results, limits, on_result)

    monkeypatch.setattr(pool, "wait_for", fail_joins)
    with pytest.raises(CallFailedError) as raised:
        groups.join([first, second])
    assert raised.value.failures == {first: MISSED_RENDEZVOUS, second: died}
    assert MISSED_RENDEZVOUS.needs_restart


def test_a_worker_whose_number_of_shards_has_changed_gets_the_earlier_blocks_again(
    pool: WorkerPool, groups: ProcessGroups
) -> None:
    groups.form()
    actors = object.__new__(ActorGroup)
    actors._pool, actors._groups, actors._blocks, actors._block_holders = pool, groups, {}, {}
    actor = groups.workers[0].actor

    def send(block: int) -> list[int]:
        actor.requests.clear()
        actors._send(_PendingRequest(StatisticsRequest("block_grams", 0, 4, 0, block=block)))
        return [request.block for request in actor.arguments("statistics")]

    assert send(0) == [0]
    assert send(1) == [1]
    for worker in pool.workers[1:]:
        worker.location = None
    groups.form()
    assert groups.workers[0].actor is actor
    assert send(2) == [0, 1, 2]
    assert send(3) == [3]
