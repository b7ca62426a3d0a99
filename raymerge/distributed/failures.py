"""Classify a failed call, find the root cause of several failures, and count them by kind.

These are pure decisions: nothing here talks to a cluster.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from raymerge.config import ClusterConfig
from raymerge.engine.messages import IncidentKind
from raymerge.errors import PeerLostError, RaymergeError, RunError

_CAUSE_ORDER: tuple[IncidentKind, ...] = ("worker", "start", "preemption", "interruption")
_BUDGET_KEYS: Mapping[IncidentKind, str] = {
    "worker": "cluster.max_worker_failures",
    "start": "cluster.max_start_failures",
    "preemption": "cluster.max_preemptions",
}
_MAX_CONSECUTIVE_INTERRUPTIONS = 10
_VERSION_HINT = "is the same raymerge installed on every node?"


@dataclass(frozen=True)
class WorkerFailure:
    """Why one worker's call failed.

    ``kind``: the budget that it counts against. ``needs_restart``: the worker is lost or unusable;
    otherwise it is healthy and only its call failed.
    """

    kind: IncidentKind
    reason: str
    needs_restart: bool = True


PREEMPTED = WorkerFailure("preemption", "was on a node that was preempted")
MISSED_RENDEZVOUS = WorkerFailure("interruption", "did not meet its peers")
ABORT_FAILED = WorkerFailure("worker", "did not abort a call that its peers had lost")


def classify(error: RayError) -> WorkerFailure:
    """Return what a failed call says about the worker that was called.

    Raises the worker's own error unchanged, and :class:`~raymerge.errors.RunError` for a failure
    that would repeat on any other worker.
    """
    if isinstance(error, RayTaskError):
        return _classify_worker_error(error)
    if isinstance(error, ActorUnavailableError):
        return WorkerFailure("interruption", "could not be reached", needs_restart=False)
    if isinstance(error, OutOfMemoryError):
        return WorkerFailure("worker", "was killed because its node ran out of memory")
    if isinstance(error, RayActorError):
        if error.actor_init_failed:
            what = f"a worker{_on_node(error)} did not start: {_last_line(error)}"
            raise RunError(f"{what}; {_VERSION_HINT}") from None
        return PREEMPTED if error.preempted else WorkerFailure("worker", "died")
    if isinstance(error, NodeDiedError | WorkerCrashedError):
        return WorkerFailure("worker", "died")
    if isinstance(error, ObjectLostError):
        return WorkerFailure("interruption", "sent a result that was lost", needs_restart=False)
    raise RunError(f"Ray failed: {_last_line(error)}") from None


def _classify_worker_error(error: RayTaskError) -> WorkerFailure:
    cause = error.cause
    if isinstance(cause, PeerLostError):
        return WorkerFailure("interruption", f"lost its peers ({cause})", needs_restart=False)
    if isinstance(cause, RaymergeError):
        raise cause from None
    raise RunError(f"a worker{_on_node(error)} failed: {_last_line(error)}") from None


def _on_node(error: Exception) -> str:
    """Return `` on node ADDRESS`` where Ray's text names the worker's address, else nothing."""
    match = re.search(r"\bip=([0-9A-Fa-f.:]+)", str(error))
    return f" on node {match[1]}" if match else ""


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def root_cause(failures: Mapping[int, WorkerFailure]) -> tuple[WorkerFailure, tuple[int, ...]]:
    """Return the failure that explains the others, and the ranks that failed in the same way.

    A lost worker breaks its peers' connections, so it explains their interruptions.
    """
    cause = min(failures.values(), key=lambda failure: _CAUSE_ORDER.index(failure.kind))
    ranks = (rank for rank, failure in failures.items() if failure.kind == cause.kind)
    return cause, tuple(sorted(ranks))


class Budget:
    """Counts failures by kind. The loss of a whole node at once is one failure.

    Interruptions have no limit over a run, only one on how many occur in a row without progress.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._limits: Mapping[IncidentKind, int | None] = {
            "worker": config.max_worker_failures,
            "start": config.max_start_failures,
            "preemption": config.max_preemptions,
            "interruption": _MAX_CONSECUTIVE_INTERRUPTIONS,
        }
        self._spent: Counter[IncidentKind] = Counter()

    def spend(self, kind: IncidentKind) -> str | None:
        """Count one failure. Return why the run must end, or None if it may continue."""
        self._spent[kind] += 1
        limit, spent = self._limits[kind], self._spent[kind]
        if limit is None or spent <= limit:
            return None
        if kind == "interruption":
            return f"interrupted {spent} times in a row without any progress"
        return f"failure {spent}, and {_BUDGET_KEYS[kind]} is {limit}"

    def reset_interruptions(self) -> None:
        """Start counting interruptions anew, because every worker has answered a call."""
        del self._spent["interruption"]
