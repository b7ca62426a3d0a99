"""ActorGroup: W MergeWorkers as Ray actors, in G process groups of S shards.

It sends each request to the workers and orders the results by rank. Starting the actors is left to
``pool``, forming the groups to ``process_groups``, and lost workers to ``recovery``.

Legend: W workers, G groups, S shards.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raymerge.config import ClusterConfig
from raymerge.distributed.calls import Limits, StepLimits
from raymerge.distributed.placement import Placement
from raymerge.distributed.pool import CallFailedError, PoolWorker, WorkerPool
from raymerge.distributed.process_groups import ProcessGroups
from raymerge.distributed.recovery import Recovery
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
from raymerge.engine.worker.worker import MergeWorker
from raymerge.errors import RunError
from raymerge.files.progress import Progress


class ActorGroup:
    """All workers of a run as actors; see ``driver.WorkerGroup`` for the contract.

    A lost worker is restarted and the call repeated; each such incident is kept in ``incidents``.
    If it is not ready within ``cluster.replace_timeout_s``, the others take over its work, down to
    ``cluster.min_workers``, until it is. Raises :class:`~raymerge.errors.WorkerLostError` when a
    budget of ``cluster`` is spent or too few workers are left.

    ``worker``: the class behind the actors.
    """

    def __init__(
        self,
        source: ModelSource,
        spec: WorkerSpec,
        placement: Placement,
        config: ClusterConfig,
        worker: type[MergeWorker] = MergeWorker,
    ) -> None:
        self.source, self._config = source, config
        # The requests so far, which a restarted worker gets again.
        self._request: LoadRequest | None = None
        self._progress: Progress | None = None
        self._step_limits = StepLimits(config)
        self._blocks: dict[int, list[StatisticsRequest]] = {}
        """The earlier requests of a task whose blocks build on each other."""
        self._block_holders: dict[int, Any] = {}
        """The actor that holds the state of a task's blocks, and its number of shards."""
        self._load_limits = Limits(
            config.load_timeout_s, config.hang_timeout_s, "cluster.load_timeout_s"
        )
        # Start the actors last, so that close() can free whatever a failed start leaves.
        self._pool = WorkerPool(source, spec, placement, config, worker)
        self._groups = ProcessGroups(self._pool)
        self._recovery = Recovery(self._pool, self._groups, config, self._load_missing)
        try:
            self._recovery.start()
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        return len(self._groups.workers)

    @property
    def incidents(self) -> Sequence[Incident]:
        return self._recovery.incidents

    @property
    def preemption_pending(self) -> bool:
        """Return whether a node of a worker is about to be taken back."""
        return self._pool.preemption_pending(self._groups.workers)

    def require_visible(self, file: Path) -> None:
        self._recovery.retry("start", lambda: self._pool.require_visible(file))

    def load(self, request: LoadRequest, progress: Progress | None = None) -> list[LoadReport]:
        self._request, self._progress = request, progress
        self._step_limits = StepLimits(self._config)  # steps of another request may take longer
        for worker in self._groups.workers:
            worker.report = None
        self._recovery.retry("load", self._load_missing)
        self._progress = None
        return [worker.report for worker in self._groups.workers if worker.report is not None]

    def _load_missing(self) -> None:
        """Let those workers load that have not loaded, or whose assignment has changed since."""

        def keep(worker: PoolWorker, report: LoadReport) -> None:
            worker.report = report
            if self._progress is not None:
                self._progress(report.images)

        if self._request is not None:
            missing = [worker for worker in self._groups.workers if worker.report is None]
            self._pool.request("load", missing, self._request, self._load_limits, keep)

    def step(self, request: StepRequest) -> list[StepResult]:
        what = f"step {request.step + 1}"
        self._recovery.admit_late_workers()
        return self._recovery.retry(what, lambda: self._step(request, what))

    def _step(self, request: StepRequest, what: str) -> list[StepResult]:
        began, generation = time.monotonic(), self._groups.generation
        results: dict[PoolWorker, StepResult] = {}
        self._pool.request(
            "step",
            self._groups.workers,
            replace(request, generation=generation),
            self._step_limits.for_workers(self.workers),
            results.__setitem__,
        )
        ordered = [results[worker] for worker in self._groups.workers]
        for result in ordered:
            if result.generation != generation:
                raise RunError(
                    f"{what}: worker {result.rank} of {self.workers} sent a result of generation "
                    f"{result.generation}, but the current one is {generation}: "
                    "run again with --resume"
                )
        self._step_limits.record(time.monotonic() - began)
        return ordered

    def evaluate(
        self, request: EvaluateRequest, progress: Progress | None = None
    ) -> list[ChunkScore]:
        """Score the test images; after a failure only the missing chunks are scored again."""
        scores: dict[tuple[int, int, int], list[ChunkScore]] = {}

        def keep(worker: PoolWorker, chunks: list[ChunkScore]) -> None:
            scores[worker.assignment] = chunks
            if progress is not None:
                progress(sum(score.examples for score in chunks))

        def attempt() -> list[ChunkScore]:
            workers = self._groups.workers
            missing = [worker for worker in workers if worker.assignment not in scores]
            self._pool.request("evaluate", missing, request, self._load_limits, keep)
            return [score for worker in workers for score in scores[worker.assignment]]

        return self._recovery.retry("evaluate", attempt)

    def statistics(self, requests: Sequence[StatisticsRequest]) -> Iterator[StatisticsResult]:
        """Yield one result per request, in their order.

        At most two requests are pending at each worker, which bounds the memory for any number of
        tasks.
        """
        pending: deque[_PendingRequest] = deque()
        for request in requests:
            pending.append(_PendingRequest(request))
            self._send(pending[-1])
            if len(pending) == 2 * self.workers:
                yield self._take_oldest(pending)
        while pending:
            yield self._take_oldest(pending)

    def _take_oldest(self, pending: deque[_PendingRequest]) -> StatisticsResult:
        """Remove the oldest request and return its result, sent again as failures require."""
        results: list[StatisticsResult] = []
        oldest = pending[0]

        def attempt() -> None:
            for each in pending:
                if each.actor is not self._worker_for(each.request).actor:
                    self._send(each)
            try:
                self._pool.wait_for(
                    {self._worker_for(oldest.request): oldest.result},
                    self._load_limits,
                    lambda worker, result: results.append(result),
                )
            except CallFailedError:
                oldest.actor = self._block_holders[oldest.request.task] = None
                raise

        self._recovery.retry("statistics", attempt)
        pending.popleft()
        return results[0]

    def _worker_for(self, request: StatisticsRequest) -> PoolWorker:
        return self._groups.workers[request.task % self.workers]

    def _send(self, pending: _PendingRequest) -> None:
        """Send a request to the worker of its task.

        RegMean++ needs the task's earlier blocks at that worker: a new one gets them again.
        """
        request, worker = pending.request, self._worker_for(pending.request)
        actor, spec = worker.actor, worker.spec
        earlier = self._blocks.get(request.task, [])[: request.block]
        # A worker whose number of shards has changed has lost its state as well.
        holder = (actor, spec and spec.shards)
        if self._block_holders.get(request.task) != holder:
            for block in earlier:
                actor.statistics.remote(block)
        self._block_holders[request.task] = holder
        if request.kind == "block_grams":
            self._blocks[request.task] = [*earlier, request]
        pending.actor, pending.result = actor, actor.statistics.remote(request)

    def close(self) -> None:
        """Stop the actors and free their slots. Never raises, because it runs during cleanup."""
        self._pool.close()


@dataclass
class _PendingRequest:
    """A request for statistics, the actor that has it, and the reference of its result."""

    request: StatisticsRequest
    actor: Any = None
    result: Any = None
