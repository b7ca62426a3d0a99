"""What a failed call says about its worker, and how many failures of each kind a run survives.

Pure decisions: nothing here talks to a cluster.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

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

_WORST_FIRST: tuple[IncidentKind, ...] = ("worker", "start", "preemption", "interruption")
_KEYS: Mapping[IncidentKind, str] = {
    "worker": "cluster.max_worker_failures",
    "start": "cluster.max_start_failures",
    "preemption": "cluster.max_preemptions",
}
_INTERRUPTIONS_IN_A_ROW = 10
_INSTALLED = "is the same raymerge installed on every node?"


@dataclass(frozen=True)
class Loss:
    """What befell one worker. ``gone``: it must be replaced; else it is well, but its call failed.

    ``kind``: whose fault it was.
    """

    kind: IncidentKind
    reason: str
    gone: bool = True


PREEMPTED = Loss("preemption", "was on a node that was taken back")
UNMET = Loss("interruption", "did not meet its peers")
DISOBEYED = Loss("worker", "did not let go of a call that its peers had lost")


def loss_of(error: RayError) -> Loss:
    """What a call's error says about the worker that was called.

    Raises the worker's own error as it was, and :class:`~raymerge.errors.RunError` for what no
    other worker would do better.
    """
    if isinstance(error, RayTaskError):
        return _own_error(error)
    if isinstance(error, ActorUnavailableError):
        return Loss("interruption", "could not be reached", gone=False)
    if isinstance(error, OutOfMemoryError):
        return Loss("worker", "was killed because its node ran out of memory")
    if isinstance(error, RayActorError):
        if error.actor_init_failed:
            raise RunError(f"a worker did not start: {_last_line(error)}; {_INSTALLED}") from None
        if error.preempted:
            return PREEMPTED
        return Loss("worker", "died")
    if isinstance(error, NodeDiedError | WorkerCrashedError):
        return Loss("worker", "died")
    if isinstance(error, ObjectLostError):
        return Loss("interruption", "gave a result that was lost on its way", gone=False)
    raise RunError(f"Ray failed: {_last_line(error)}") from None


def _own_error(error: RayTaskError) -> Loss:
    cause = error.cause
    if isinstance(cause, PeerLostError):
        return Loss("interruption", f"lost its peers ({cause})", gone=False)
    if isinstance(cause, RaymergeError):
        raise cause from None
    raise RunError(f"a worker failed: {_last_line(error)}") from None


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def worst(losses: Collection[Loss]) -> Loss:
    """The one that explains the others: a death breaks its peers' connections."""
    return min(losses, key=lambda loss: _WORST_FIRST.index(loss.kind))


def blame(losses: Mapping[int, Loss]) -> tuple[Loss, tuple[int, ...]]:
    """Of losses by rank, the one that explains the others, and whom its kind befell."""
    cause = worst(losses.values())
    return cause, tuple(sorted(rank for rank, loss in losses.items() if loss.kind == cause.kind))


@dataclass
class Budget:
    """Counts failures by kind. Losing a whole node at once is one failure.

    Interruptions have no limit over a run, only ``_INTERRUPTIONS_IN_A_ROW`` without any progress.
    """

    limits: Mapping[IncidentKind, int | None]
    spent: dict[IncidentKind, int] = field(default_factory=dict)

    @classmethod
    def of(cls, config: ClusterConfig) -> Budget:
        return cls(
            {
                "worker": config.max_worker_failures,
                "start": config.max_start_failures,
                "preemption": config.max_preemptions,
                "interruption": _INTERRUPTIONS_IN_A_ROW,
            }
        )

    def charge(self, kind: IncidentKind) -> str | None:
        """Count one more. None if the run survives it, else why it does not."""
        self.spent[kind] = self.spent.get(kind, 0) + 1
        limit = self.limits[kind]
        if limit is None or self.spent[kind] <= limit:
            return None
        if kind == "interruption":
            return f"interrupted {self.spent[kind]} times in a row without any progress"
        return f"failure {self.spent[kind]}, and {_KEYS[kind]} is {limit}"

    def progressed(self) -> None:
        """A call has been answered by everyone."""
        self.spent.pop("interruption", None)
