"""Wait for one answer of every worker; tell the dead, the frozen and the slow from each other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError

from raymerge.config import ClusterConfig
from raymerge.distributed.failures import Loss, loss_of
from raymerge.engine.messages import Heartbeat

W = TypeVar("W", bound=Hashable)

ACTOR_OPTIONS: Mapping[str, Any] = {
    "max_restarts": 0,
    "max_task_retries": 0,
    "max_concurrency": 1,
    "enable_task_events": False,
    "concurrency_groups": {"control": 2},
}
"""Of whoever is called here: one call at a time, and pings beside it.

Ray's own restart would re-run ``__init__`` alone, outside the group's generation: it is off. So is
its record of every call, of which the head keeps a hundred thousand: two a step and worker are soon
hundreds of megabytes.
"""

_TICK_S = 1.0
_GRACE_S = 0.5  # for what died with it to be known as well
_FIRST_STEP_S, _SHORTEST_STEP_S, _STEP_MEDIANS = 600.0, 60.0, 5.0


@dataclass(frozen=True)
class Call:
    """A call on its way: to which actor, and the reference of its answer."""

    actor: Any
    answer: Any


@dataclass(frozen=True)
class Limits:
    """``call_s``: for the answer. ``hang_s``: for the answer to a ping while it is awaited."""

    call_s: float
    hang_s: float
    key: str
    """The setting that raises ``call_s``."""


class StepLimits:
    """Of a step: what the config says, or several times what the last ones took.

    With fewer workers each has more to do, so what is known counts no more.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._seconds: deque[float] = deque(maxlen=20)
        self._workers = 0

    def took(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def of(self, workers: int) -> Limits:
        """Of the next step, of so many."""
        if workers < self._workers:
            self._seconds.clear()
        self._workers = workers
        given = self._config.step_timeout_s
        if given != "auto":
            limit_s = given
        elif self._seconds:
            limit_s = max(_SHORTEST_STEP_S, _STEP_MEDIANS * median(self._seconds))
        else:
            limit_s = _FIRST_STEP_S
        return Limits(limit_s, self._config.hang_timeout_s, "cluster.step_timeout_s")


def gather(
    calls: Mapping[W, Call], limits: Limits, on_answer: Callable[[W, Any], None]
) -> dict[W, Loss]:
    """Give each answer to ``on_answer`` as it comes; returns who was lost, when anyone was.

    Ends soon after the first loss: the others' answers are of no use without it. A worker's own
    error is raised as it was.
    """
    waiting = {call.answer: worker for worker, call in calls.items()}
    watch = _Watch({worker: call.actor for worker, call in calls.items()}, limits.hang_s)
    deadline = time.monotonic() + limits.call_s
    losses: dict[W, Loss] = {}
    while waiting and not losses:
        patience_s = min(watch.tick_s, max(0.0, deadline - time.monotonic()))
        done, _ = ray.wait(list(waiting), timeout=patience_s)
        for reference in done:
            _take(waiting.pop(reference), reference, on_answer, losses)
        if not done:
            losses |= watch.frozen(waiting.values())
            if time.monotonic() >= deadline:
                stuck = [worker for worker in waiting.values() if worker not in losses]
                losses |= {worker: watch.stuck(worker, limits) for worker in stuck}
    if losses and waiting:
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=_GRACE_S)
        for reference in done:
            _take(waiting[reference], reference, on_answer, losses)
    return losses


def _take(
    worker: W, reference: Any, on_answer: Callable[[W, Any], None], losses: dict[W, Loss]
) -> None:
    try:
        answer = ray.get(reference)
    except RayError as error:
        losses.setdefault(worker, loss_of(error))
    else:
        on_answer(worker, answer)


@dataclass
class _Watch(Generic[W]):
    """Pings those who keep us waiting, one ping at a time each."""

    actors: Mapping[W, Any]
    hang_s: float
    _asked: dict[W, tuple[Any, float]] = field(default_factory=dict)
    _heard: dict[W, float] = field(default_factory=dict)

    @property
    def tick_s(self) -> float:
        return min(_TICK_S, self.hang_s / 4)

    def frozen(self, waiting: Collection[W]) -> dict[W, Loss]:
        """Who has left a ping unanswered for ``hang_s``."""
        now = time.monotonic()
        out = {}
        for worker in waiting:
            if worker in self._asked:
                self._hear(worker)
            elif self._is_due(worker, now):
                self._asked[worker] = (ping(self.actors[worker]), now)
            if worker in self._asked and now - self._asked[worker][1] > self.hang_s:
                reason = f"answered no ping for {self.hang_s:g} s (cluster.hang_timeout_s)"
                out[worker] = Loss("worker", reason)
        return out

    def _is_due(self, worker: W, now: float) -> bool:
        return worker not in self._heard or now - self._heard[worker] > self.hang_s / 4

    def _hear(self, worker: W) -> None:
        reference, _ = self._asked[worker]
        if not ray.wait([reference], timeout=0)[0]:
            return
        del self._asked[worker]
        with suppress(RayError):  # dead or out of reach: its own call will say so
            ray.get(reference)
            self._heard[worker] = time.monotonic()

    def stuck(self, worker: W, limits: Limits) -> Loss:
        """It answers pings, but not the call: the one that works is to blame, not those who wait
        for it in a collective."""
        pulse = _pulse(self.actors[worker])
        at = "" if pulse is None else f" (it is in {pulse.phase} for {pulse.seconds:.0f} s)"
        reason = f"sent no answer within {limits.call_s:g} s{at}; raise {limits.key}"
        return Loss("worker", reason, gone=pulse is None or not pulse.waits_for_peers)


def is_free(actor: Any) -> bool:
    """Whether it says that it is in no collective; one that says nothing may be in one."""
    pulse = _pulse(actor)
    return pulse is not None and not pulse.waits_for_peers


def _pulse(actor: Any) -> Heartbeat | None:
    try:
        pulse: Heartbeat = ray.get(ping(actor), timeout=_TICK_S)
    except RayError:
        return None
    return pulse


def ping(actor: Any) -> Any:
    """A reference to its :class:`Heartbeat`; it answers while it works."""
    return actor.ping.options(concurrency_group="control").remote()
