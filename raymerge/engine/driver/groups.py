"""The driver's view of its workers: what a group can be asked, and the group of this process alone.

``LocalGroup`` calls one worker directly; ``distributed.actor_group`` asks Ray actors the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """What learning needs of a group: one result a worker.

    ``workers`` may change in ``step``: a group may lose some and go on.
    """

    @property
    def workers(self) -> int: ...

    @property
    def incidents(self) -> Sequence[Incident]:
        """The failures survived so far."""
        ...

    def step(self, request: StepRequest) -> list[StepResult]: ...


class WorkerGroup(Stepper, Protocol):
    """All workers of a run. Results come in rank order, whatever order they arrived in.

    Each call returns when every worker has answered, or raises: a worker's own error as it was, or
    :class:`~raymerge.errors.WorkerLostError` when one is dead or silent. After an error only
    ``close`` may be called.
    """

    source: ModelSource

    @property
    def preemption_pending(self) -> bool:
        """Whether a machine that works for it is about to be taken away."""
        ...

    def load(self, request: LoadRequest, progress: Progress | None = None) -> list[LoadReport]: ...

    def evaluate(
        self, request: EvaluateRequest, progress: Progress | None = None
    ) -> list[ChunkScore]: ...

    def statistics(self, requests: Sequence[StatisticsRequest]) -> Iterator[StatisticsResult]:
        """One answer a request, in their order; a task's are all served by one worker."""
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
