"""The driver's view of its workers: the calls of a worker group, and a group in this process.

``LocalGroup`` calls one worker directly; ``distributed.actor_group`` sends the same requests to Ray
actors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from raymerge.engine.messages import (
    ChunkScore,
    EvaluateRequest,
    Incident,
    LoadReport,
    LoadRequest,
    StatisticsRequest,
    StatisticsResult,
    StepRequest,
    StepResult,
    WorkerSpec,
)
from raymerge.engine.worker.served import ModelSource
from raymerge.files.progress import Progress


class Stepper(Protocol):
    """The calls of a group that a learning loop uses: one result for each worker.

    ``workers`` may change in ``step``: a group may lose workers and go on.
    """

    @property
    def workers(self) -> int: ...

    @property
    def incidents(self) -> Sequence[Incident]:
        """The failures that the group has recovered from so far."""
        ...

    def step(self, request: StepRequest) -> list[StepResult]: ...


class WorkerGroup(Stepper, Protocol):
    """All workers of a run. Results come in rank order, whatever order they arrived in.

    Each call returns when every worker has returned its result, or raises: a worker's own error
    unchanged, or :class:`~raymerge.errors.WorkerLostError` when a worker is dead or does not
    respond. After an error only ``close`` may be called.
    """

    source: ModelSource

    @property
    def preemption_pending(self) -> bool:
        """True while a machine of the group is about to be taken away."""
        ...

    def require_visible(self, file: Path) -> None:
        """Raise :class:`~raymerge.errors.RunError` unless every worker sees the driver's file."""
        ...

    def load(self, request: LoadRequest, progress: Progress | None = None) -> list[LoadReport]: ...

    def evaluate(
        self, request: EvaluateRequest, progress: Progress | None = None
    ) -> list[ChunkScore]: ...

    def statistics(self, requests: Sequence[StatisticsRequest]) -> Iterator[StatisticsResult]:
        """Yield one result for each request, in order; one worker serves all those of a task."""
        ...

    def close(self) -> None: ...


class LocalGroup:
    """One worker in this process, without Ray."""

    workers = 1
    incidents: Sequence[Incident] = ()
    preemption_pending = False

    def __init__(self, source: ModelSource, spec: WorkerSpec) -> None:
        from raymerge.engine.worker.worker import MergeWorker

        self.source = source
        self._worker = MergeWorker(source, spec)

    def require_visible(self, file: Path) -> None:
        pass

    def load(self, request: LoadRequest, progress: Progress | None = None) -> list[LoadReport]:
        return [self._worker.load(request, progress)]

    def step(self, request: StepRequest) -> list[StepResult]:
        return [self._worker.step(request)]

    def evaluate(
        self, request: EvaluateRequest, progress: Progress | None = None
    ) -> list[ChunkScore]:
        return self._worker.evaluate(request, progress)

    def statistics(self, requests: Sequence[StatisticsRequest]) -> Iterator[StatisticsResult]:
        return map(self._worker.statistics, requests)

    def close(self) -> None:
        pass
