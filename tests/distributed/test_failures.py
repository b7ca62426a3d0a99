"""The classification of failed calls, and the budget of failures. No cluster."""

from __future__ import annotations

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RaySystemError,
    RayTaskError,
)

from raymerge.config import ClusterConfig
from raymerge.distributed.failures import Budget, WorkerFailure, classify, root_cause
from raymerge.errors import PeerLostError, RunError, UserError


def _raised_by_worker(cause: Exception) -> RayTaskError:
    return RayTaskError("step", "a\ntraceback\nlast line", cause)


def test_dead_workers_are_restarted_and_unreachable_ones_are_not():
    assert classify(ActorDiedError()) == WorkerFailure("worker", "died")
    assert classify(OutOfMemoryError("")).needs_restart
    unreachable = classify(ActorUnavailableError("reset", None))
    assert (unreachable.kind, unreachable.needs_restart) == ("interruption", False)
    cut_off = classify(_raised_by_worker(PeerLostError("reset by peer")))
    assert (cut_off.kind, cut_off.needs_restart) == ("interruption", False)


def test_the_loss_of_a_preempted_node_is_no_worker_failure():
    error = ActorDiedError()
    error._preempted = True
    assert classify(error).kind == "preemption"


def test_a_failure_that_any_other_worker_would_repeat_is_raised():
    with pytest.raises(UserError, match="bad file"):
        classify(_raised_by_worker(UserError("bad file")))
    with pytest.raises(RunError, match="a worker failed: "):
        classify(_raised_by_worker(ZeroDivisionError("x")))
    trace = "ray::MergeWorker.load() (pid=7, ip=10.0.0.2, actor_id=a)\nModuleNotFoundError: pyarrow"
    with pytest.raises(RunError, match=r"a worker on node 10\.0\.0\.2 failed: ModuleNotFound"):
        classify(RayTaskError("load", trace, ModuleNotFoundError("pyarrow")))
    with pytest.raises(RunError, match="Ray failed: "):
        classify(RaySystemError("gone"))


def test_a_dead_worker_is_the_root_cause_of_its_peers_broken_connections():
    death = WorkerFailure("worker", "died")
    broken = WorkerFailure("interruption", "lost its peers", needs_restart=False)
    assert root_cause({2: broken, 1: death, 0: death}) == (death, (0, 1))
    assert root_cause({0: broken, 1: WorkerFailure("preemption", "")})[0].kind == "preemption"


def test_each_kind_has_its_own_budget():
    budget = Budget(ClusterConfig(max_worker_failures=2, max_start_failures=0))
    assert [budget.spend("worker") for _ in range(2)] == [None, None]
    assert budget.spend("worker") == "failure 3, and cluster.max_worker_failures is 2"
    assert budget.spend("start") == "failure 1, and cluster.max_start_failures is 0"
    assert all(budget.spend("preemption") is None for _ in range(100))


def test_interruptions_count_only_without_progress_between_them():
    budget = Budget(ClusterConfig())
    for _ in range(50):
        assert budget.spend("interruption") is None
        budget.reset_interruptions()
    refusals = [budget.spend("interruption") for _ in range(11)]
    assert refusals[:-1] == [None] * 10
    assert refusals[-1] == "interrupted 11 times in a row without any progress"
