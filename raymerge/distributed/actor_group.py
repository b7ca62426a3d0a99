"""ActorGroup: W MergeWorkers as Ray actors, in G process groups of S shards.

Legend: W workers, G groups, S shards.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raymerge.config import ClusterConfig
from raymerge.distributed.calls import Limits, StepLimits
from raymerge.distributed.placement import Placement
from raymerge.distributed.team import LostError, Member, Team
from raymerge.engine.messages import (
    ChunkScore,
    EvaluateRequest,
    Incident,
    LoadReport,
    LoadRequest,
    Statistics,
    StatisticsRequest,
    StepRequest,
    StepResult,
    WorkerSpec,
)
from raymerge.engine.worker.worker import MergeWorker
from raymerge.errors import RunError
from raymerge.files.progress import Progress


class ActorGroup:
    """All workers of a run as actors; see ``driver.WorkerGroup`` for the contract.

    A lost worker is replaced and the call repeated; each such incident is kept in ``incidents``.
    When none comes in its place within ``cluster.replace_timeout_s``, the others share its work,
    down to ``cluster.min_workers``, and it joins them when it comes. Raises
    :class:`~raymerge.errors.WorkerLostError` when a budget of ``cluster`` is spent or too few are
    left.

    ``worker``: the class behind the actors.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        placement: Placement,
        config: ClusterConfig,
        worker: type[MergeWorker] = MergeWorker,
    ) -> None:
        self.spec, self._config = spec, config
        self._request: LoadRequest | None = None
        self._progress: Progress | None = None
        self._step_limits = StepLimits(config)
        self._blocks: dict[int, list[StatisticsRequest]] = {}
        self._homes: dict[int, Any] = {}
        """Of a task: the actor that knows its earlier blocks, and of how many shards."""
        self._load_limits = Limits(
            config.load_timeout_s, config.hang_timeout_s, "cluster.load_timeout_s"
        )
        self._team = Team(spec, placement, config, worker, self._load_missing)
        try:
            self._team.start()
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        return len(self._team.working)

    @property
    def incidents(self) -> Sequence[Incident]:
        return self._team.incidents

    @property
    def preemption_pending(self) -> bool:
        """Whether a node that a worker runs on is about to be taken back."""
        return self._team.preemption_pending

    def load(self, request: LoadRequest, progress: Progress | None = None) -> list[LoadReport]:
        self._request, self._progress = request, progress
        self._step_limits = StepLimits(self._config)  # its steps may be heavier
        for member in self._team.working:
            member.report = None
        self._team.survive("load", self._load_missing)
        self._progress = None
        return [member.report for member in self._team.working if member.report is not None]

    def _load_missing(self) -> None:
        """Let those load that have not, or have got another part since."""

        def keep(member: Member, report: LoadReport) -> None:
            member.report = report
            if self._progress is not None:
                self._progress(report.images)

        if self._request is not None:
            missing = [member for member in self._team.working if member.report is None]
            self._team.ask("load", missing, self._request, self._load_limits, keep)

    def step(self, request: StepRequest) -> list[StepResult]:
        what = f"step {request.step + 1}"
        self._team.welcome()
        return self._team.survive(what, lambda: self._step(request, what))

    def _step(self, request: StepRequest, what: str) -> list[StepResult]:
        began, generation = time.monotonic(), self._team.generation
        answers: dict[Member, StepResult] = {}
        stamped = replace(request, generation=generation)
        self._team.ask(
            "step",
            self._team.working,
            stamped,
            self._step_limits.of(self.workers),
            answers.__setitem__,
        )
        results = [answers[member] for member in self._team.working]
        for result in results:
            if result.generation != generation:
                raise RunError(
                    f"{what}: worker {result.rank} of {self.workers} answered for generation "
                    f"{result.generation}, but this is {generation}"
                )
        self._step_limits.took(time.monotonic() - began)
        return results

    def evaluate(
        self, request: EvaluateRequest, progress: Progress | None = None
    ) -> list[ChunkScore]:
        """What survivors of a lost worker have scored is not scored again."""
        scores: dict[tuple[int, int, int], list[ChunkScore]] = {}

        def keep(member: Member, part: list[ChunkScore]) -> None:
            scores[member.seat] = part
            if progress is not None:
                progress(sum(score.examples for score in part))

        def attempt() -> list[ChunkScore]:
            missing = [member for member in self._team.working if member.seat not in scores]
            self._team.ask("evaluate", missing, request, self._load_limits, keep)
            return [score for member in self._team.working for score in scores[member.seat]]

        return self._team.survive("evaluate", attempt)

    def statistics(self, requests: Sequence[StatisticsRequest]) -> Iterator[Statistics]:
        """At most two requests wait at each worker, and results are taken in order: so little is
        held however many tasks there are."""
        waiting: deque[_Asked] = deque()
        for request in requests:
            waiting.append(_Asked(request))
            self._send(waiting[-1])
            if len(waiting) == 2 * self.workers:
                yield self._first(waiting)
        while waiting:
            yield self._first(waiting)

    def _first(self, waiting: deque[_Asked]) -> Statistics:
        """The answer to the oldest request. After a loss, whoever serves its task is asked."""
        answers: list[Statistics] = []
        first = waiting[0]

        def attempt() -> None:
            for asked in waiting:
                if asked.actor is not self._server(asked.request).actor:
                    self._send(asked)
            try:
                self._team.await_answers(
                    {self._server(first.request): first.answer},
                    self._load_limits,
                    lambda _, answer: answers.append(answer),
                )
            except LostError:
                first.actor = self._homes[first.request.task] = None
                raise

        self._team.survive("statistics", attempt)
        waiting.popleft()
        return answers[0]

    def _server(self, request: StatisticsRequest) -> Member:
        return self._team.working[request.task % self.workers]

    def _send(self, asked: _Asked) -> None:
        """For RegMean++ a worker must have seen the task's earlier blocks: a new one catches up."""
        request, server = asked.request, self._server(asked.request)
        actor, assigned = server.actor, server.spec
        earlier = self._blocks.get(request.task, [])[: request.block]
        # With another number of shards a worker begins anew as well.
        home = (actor, assigned and assigned.shards)
        if self._homes.get(request.task) != home:
            for block in earlier:
                actor.statistics.remote(block)
        self._homes[request.task] = home
        if request.kind == "block_grams":
            self._blocks[request.task] = [*earlier, request]
        asked.actor, asked.answer = actor, actor.statistics.remote(request)

    def close(self) -> None:
        """Kill the actors and free their places. Never raises: it runs on the way out."""
        self._team.close()


@dataclass
class _Asked:
    """A request for statistics, to whom it went, and the reference of its answer."""

    request: StatisticsRequest
    actor: Any = None
    answer: Any = None
