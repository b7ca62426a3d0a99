"""What a failed call says about its worker, and what a run survives: decided without a cluster."""

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
from raymerge.distributed.failures import Budget, Loss, loss_of, worst
from raymerge.errors import PeerLostError, RunError, UserError


def _raised_by_worker(cause: Exception) -> RayTaskError:
    return RayTaskError("step", "a\ntraceback\nlast line", cause)


def test_the_dead_are_replaced_and_those_who_only_lost_touch_are_not():
    assert loss_of(ActorDiedError()) == Loss("worker", "died")
    assert loss_of(OutOfMemoryError("")).gone
    unreachable = loss_of(ActorUnavailableError("reset", None))
    assert (unreachable.kind, unreachable.gone) == ("interruption", False)
    cut_off = loss_of(_raised_by_worker(PeerLostError("reset by peer")))
    assert (cut_off.kind, cut_off.gone) == ("interruption", False)


def test_a_node_that_was_taken_back_is_no_failure_of_ours():
    error = ActorDiedError()
    error._preempted = True
    assert loss_of(error).kind == "preemption"


def test_what_no_other_worker_would_do_better_is_raised():
    with pytest.raises(UserError, match="bad file"):
        loss_of(_raised_by_worker(UserError("bad file")))
    with pytest.raises(RunError, match="a worker failed: "):
        loss_of(_raised_by_worker(ZeroDivisionError("x")))
    with pytest.raises(RunError, match="Ray failed: "):
        loss_of(RaySystemError("gone"))


def test_a_death_explains_its_peers_broken_connections():
    death, echo = Loss("worker", "died"), Loss("interruption", "lost its peers", gone=False)
    assert worst([echo, death]) == death
    assert worst([echo, Loss("preemption", "")]).kind == "preemption"


def test_each_kind_has_its_own_budget():
    budget = Budget.of(ClusterConfig(max_worker_failures=2, max_start_failures=0))
    assert [budget.charge("worker") for _ in range(2)] == [None, None]
    assert budget.charge("worker") == "failure 3, and cluster.max_worker_failures is 2"
    assert budget.charge("start") == "failure 1, and cluster.max_start_failures is 0"
    assert all(budget.charge("preemption") is None for _ in range(100))


def test_interruptions_count_only_while_nothing_gets_done():
    budget = Budget.of(ClusterConfig())
    for _ in range(50):
        assert budget.charge("interruption") is None
        budget.progressed()
    refusals = [budget.charge("interruption") for _ in range(11)]
    assert refusals[:-1] == [None] * 10
    assert refusals[-1] == "interrupted 11 times in a row without any progress"
