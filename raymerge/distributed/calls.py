"""Wait for one result from every worker, and tell dead, frozen and slow workers apart.

While results are outstanding, each worker is pinged: its heartbeat says whether it works or waits
for its peers. What follows from a failure is decided in ``recovery``.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from statistics import median
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError

from raymerge.config import ClusterConfig
from raymerge.distributed.failures import WorkerFailure, classify
from raymerge.engine.messages import Heartbeat, IncidentKind

W = TypeVar("W", bound=Hashable)

ACTOR_OPTIONS: Mapping[str, Any] = {
    "max_restarts": 0,
    "max_task_retries": 0,
    "max_concurrency": 1,
    "enable_task_events": False,
    "concurrency_groups": {"control": 2},
}
"""Options of every worker's actor: one call at a time, and pings beside it.

Ray's own restart is off: it would run ``__init__`` alone, outside the group's generation. So is
Ray's record of every call, of which the head keeps a hundred thousand: at two per step and worker
they grow to hundreds of megabytes.
"""

_WAIT_S = 1.0
_GRACE_S = 0.5  # enough for failures of the same cause to become known
_FIRST_STEP_S, _MIN_STEP_S, _STEP_MEDIANS = 600.0, 10.0, 5.0
_PING_EVERY_S = 2.0
_PROBE_AFTER_S, _PROBE_S, _PROBES = 1.5, 1.0, 3
"""A node whose worker has left a ping unanswered for a while is probed, this often in a row."""


@dataclass(frozen=True)
class Call:
    """A call in progress: the actor and the reference of the result.

    ``node``: the address and port of its node's raylet, if it is another node.
    """

    actor: Any
    result: Any
    node: tuple[str, int] | None = None


@dataclass(frozen=True)
class Limits:
    """Time limits of a call.

    ``call_s``: until its result. ``hang_s``: until the heartbeat after a ping. ``key``: the config
    key that raises ``call_s``.
    """

    call_s: float
    hang_s: float
    key: str


class StepLimits:
    """Time limits of a step: the configured one, or a multiple of the median of recent steps.

    When workers are lost, each of the others has more to do, so recent times no longer count.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._seconds: deque[float] = deque(maxlen=20)
        self._workers = 0

    def record(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def for_workers(self, workers: int) -> Limits:
        """Return the limits of the next step on ``workers`` workers."""
        if workers < self._workers:
            self._seconds.clear()
        self._workers = workers
        configured = self._config.step_timeout_s
        if configured != "auto":
            limit_s = configured
        elif self._seconds:
            limit_s = max(_MIN_STEP_S, _STEP_MEDIANS * median(self._seconds))
        else:
            limit_s = _FIRST_STEP_S
        return Limits(limit_s, self._config.hang_timeout_s, "cluster.step_timeout_s")


def wait_for_results(
    calls: Mapping[W, Call], limits: Limits, on_result: Callable[[W, Any], None]
) -> dict[W, WorkerFailure]:
    """Pass each result to ``on_result`` as it arrives, and return the failures by worker.

    Returns soon after the first failure, because the other results are useless without it. Raises
    a worker's own error unchanged.
    """
    pending = {call.result: worker for worker, call in calls.items()}
    monitor = _HeartbeatMonitor(calls, limits.hang_s)
    deadline = time.monotonic() + limits.call_s
    failures: dict[W, WorkerFailure] = {}
    # Until the first failure: take results, and check on those who have not answered.
    while pending and not failures:
        wait_s = min(monitor.interval_s, max(0.0, deadline - time.monotonic()))
        done, _ = ray.wait(list(pending), timeout=wait_s)
        for reference in done:
            _take_result(pending.pop(reference), reference, on_result, failures)
        if not done:
            failures |= monitor.frozen(pending.values())
            if time.monotonic() >= deadline:
                late = [worker for worker in pending.values() if worker not in failures]
                failures |= {worker: monitor.timed_out(worker, limits) for worker in late}
    # A failure often has consequences elsewhere: give them a moment, so that one recovery has all.
    if failures and pending:
        done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_GRACE_S)
        for reference in done:
            _take_result(pending[reference], reference, on_result, failures)
    return failures


def _take_result(
    worker: W,
    reference: Any,
    on_result: Callable[[W, Any], None],
    failures: dict[W, WorkerFailure],
) -> None:
    try:
        result = ray.get(reference)
    except RayError as error:
        failures.setdefault(worker, classify(error))
    else:
        on_result(worker, result)


@dataclass
class _HeartbeatMonitor(Generic[W]):
    """Pings the workers whose results are outstanding, each with one ping at a time."""

    calls: Mapping[W, Call]
    hang_s: float
    _pings: dict[W, tuple[Any, float]] = field(default_factory=dict)
    _last_heartbeats: dict[W, float] = field(default_factory=dict)
    _missed: dict[tuple[str, int], int] = field(default_factory=dict)
    """The probes in a row that each node has not answered."""

    @property
    def interval_s(self) -> float:
        return min(_WAIT_S, self.hang_s / 4)

    def frozen(self, pending: Collection[W]) -> dict[W, WorkerFailure]:
        """Return the workers that have left a ping unanswered for ``hang_s``."""
        now, every_s = time.monotonic(), min(self.hang_s / 4, _PING_EVERY_S)
        failures = {}
        for worker in pending:
            if worker in self._pings:
                self._take_heartbeat(worker)
            elif now - self._last_heartbeats.get(worker, -inf) > every_s:
                self._pings[worker] = (ping(self.calls[worker].actor), now)
            if worker in self._pings and now - self._pings[worker][1] > self.hang_s:
                reason = f"answered no ping for {self.hang_s:g} s (cluster.hang_timeout_s)"
                failures[worker] = WorkerFailure("worker", reason)
        return failures | self._unreachable(now, [w for w in pending if w not in failures])

    def _unreachable(self, now: float, pending: Sequence[W]) -> dict[W, WorkerFailure]:
        """Return the workers whose node answers no connection any more.

        The kernel answers a connection however busy its processes are, so this tells a cut link
        from a slow worker, and long before a heartbeat is given up.
        """
        late = [w for w, (_, since) in self._pings.items() if now - since > _PROBE_AFTER_S]
        nodes = {node for w in late if w in pending and (node := self.calls[w].node) is not None}
        failures: dict[W, WorkerFailure] = {}
        for node in nodes:
            missed = 0 if answers(node) else self._missed.get(node, 0) + 1
            self._missed[node] = missed
            if missed >= _PROBES:
                failure = WorkerFailure("worker", f"is on {node[0]}, which cannot be reached")
                failures |= {w: failure for w in pending if self.calls[w].node == node}
        return failures

    def _take_heartbeat(self, worker: W) -> None:
        reference, _ = self._pings[worker]
        if not ray.wait([reference], timeout=0)[0]:
            return
        del self._pings[worker]
        with suppress(RayError):  # if it is dead or unreachable, its own call fails as well
            ray.get(reference)
            self._last_heartbeats[worker] = time.monotonic()

    def timed_out(self, worker: W, limits: Limits) -> WorkerFailure:
        """Return the failure of a worker that answers pings but not its call.

        It needs a restart only if it is not merely waiting for its peers in a collective.
        """
        heartbeat = _heartbeat(self.calls[worker].actor)
        reason = f"sent no result within {limits.call_s:g} s"
        if heartbeat is not None:
            reason += f" (it has been in {heartbeat.phase} for {heartbeat.seconds:.0f} s)"
        is_stuck = heartbeat is None or not heartbeat.waits_for_peers
        kind: IncidentKind = "worker" if is_stuck else "interruption"  # whom a peer keeps waiting
        return WorkerFailure(kind, f"{reason}; raise {limits.key}", needs_restart=is_stuck)


def answers(node: tuple[str, int]) -> bool:
    """Return whether a node accepts a connection, or refuses it, within a moment."""
    try:
        with socket.create_connection(node, timeout=_PROBE_S):
            return True
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


def is_idle(actor: Any) -> bool:
    """Return whether the actor reports that it is in no collective; False if it does not answer."""
    heartbeat = _heartbeat(actor)
    return heartbeat is not None and not heartbeat.waits_for_peers


def _heartbeat(actor: Any) -> Heartbeat | None:
    try:
        heartbeat: Heartbeat = ray.get(ping(actor), timeout=_WAIT_S)
    except RayError:
        return None
    return heartbeat


def ping(actor: Any) -> Any:
    """Return a reference to the actor's :class:`Heartbeat`, which it sends even while it works."""
    return actor.ping.options(concurrency_group="control").remote()
