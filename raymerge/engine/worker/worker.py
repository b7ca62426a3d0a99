"""MergeWorker: the plain class behind every actor, and behind the in-process run.

It is tested without Ray, and made an actor only where it is placed. One worker alone skips the
collectives, so that replicated, sharded and in-process work are one code path.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raymerge.engine.messages import (
    ChunkScore,
    EvaluateRequest,
    Heartbeat,
    LoadReport,
    LoadRequest,
    Rendezvous,
    StatisticsRequest,
    StatisticsResult,
    StepRequest,
    StepResult,
    WorkerSpec,
)
from raymerge.engine.worker.collectives import Collective
from raymerge.engine.worker.served import ModelSource, Pinned, ServedModel, choose_device
from raymerge.engine.worker.shard import WorkerShard
from raymerge.errors import RunError
from raymerge.files.progress import Progress


class MergeWorker:
    """One worker of a merge. The driver calls its methods one at a time.

    ``join`` first (only with S > 1); then ``load`` before ``step``; ``evaluate`` at any time.
    ``ping`` and ``abort`` answer while ``step`` is blocked. A failed ``step`` or ``evaluate`` may
    be called again; after a failed ``load``, and after ``assign``, call ``load`` again.

    ``begin`` is called wherever a phase begins: join, load, evaluate, statistics, and of a step
    merge, gather, compute, reduce, inner_products; between calls the worker is idle.
    """

    def __init__(self, source: ModelSource, spec: WorkerSpec) -> None:
        self.source, self.spec = source, spec
        self.collective = Collective()
        self._clock = _Clock()
        self._generation = 0
        self._model: ServedModel | None = None
        self._shard: WorkerShard | None = None
        self._pinned: Pinned = {}

    def ping(self) -> Heartbeat:
        """What this worker is at, at once, even while a step runs."""
        return Heartbeat(self._clock.phase, self._clock.lasted())

    def abort(self, generation: int) -> None:
        """``generation`` begins: free a ``step`` of an older one that waits for a lost peer."""
        self._generation = generation
        self.collective.abort()

    def assign(self, spec: WorkerSpec) -> None:
        """Take another place among the workers; what is held and still fits is kept."""
        before, self.spec = self.spec, spec
        if (before.shard, before.shards) != (spec.shard, spec.shards):
            self._shard = None
        if before.shards != spec.shards:  # the length of θ, padded to whole shards
            self._model = None
            self.collective.leave()

    def begin(self, phase: str, step: int | None = None) -> None:
        """The phase before has ended and this one begins, of ``step`` (counted from 0)."""
        self._clock.begin(phase)

    def open_store(self, host: str) -> int:
        """Shard 0 of a group: start the rendezvous store on a free port; returns the port."""
        return self.collective.open_store(host, self.spec.shards)

    def join(self, rendezvous: Rendezvous) -> None:
        """Meet the other shards of the group; all of them must call this."""
        spec = self.spec
        with self._during("join"):
            self.collective.join(rendezvous, spec.shard, spec.shards, choose_device(spec))

    def load(self, request: LoadRequest, progress: Progress | None = None) -> LoadReport:
        """Pin the shard of θ₀ and V, the heads, and the images of this worker's slots.

        Raises :class:`~raymerge.errors.UserError` for a damaged checkpoint or image.
        """
        with self._during("load"):
            return self._load(request, progress)

    def _load(self, request: LoadRequest, progress: Progress | None) -> LoadReport:
        started = time.perf_counter()
        store = None
        if self._shard is not None and request.same_vectors(self._shard.request):
            store = self._shard.store
        self._shard = None  # free the old vectors before the new ones are read
        self._shard = WorkerShard(
            self.spec, self.source.task_names, request, self._ready(), progress, store
        )
        return LoadReport(
            rank=self.spec.rank,
            device=str(self._shard.device),
            tasks=tuple(self.source.task_names[part.task] for part in self._shard.slots),
            vector_bytes=self._shard.store.nbytes,
            images=sum(map(len, self._pinned.values())),
            image_bytes=self._ready().pinned_bytes(),
            seconds=time.perf_counter() - started,
        )

    def step(self, request: StepRequest) -> StepResult:
        """∂ℒ/∂λ of this worker's slots at ``request.lambdas``; keeps no state between steps.

        Raises :class:`~raymerge.errors.RunError` for a request of a generation that is over: it
        was on its way when the group was built anew, and nobody waits for it.
        """
        if request.generation < self._generation:
            raise RunError(
                f"step {request.step + 1}: of generation {request.generation}, and this is "
                f"{self._generation}"
            )
        if self._shard is None or self._model is None:
            raise RuntimeError("step() before load()")
        with self._during("merge", request.step):
            return self._step(request, self._shard, self._model)

    def _step(self, request: StepRequest, shard: WorkerShard, model: ServedModel) -> StepResult:
        theta_N = self.collective.mine(model.theta_P)
        shard.merge(request.lambdas, theta_N)
        self.begin("gather", request.step)
        self.collective.all_gather(model.theta_P)
        self.begin("compute", request.step)
        sums = shard.backward(request)
        self.begin("reduce", request.step)
        gradient_N = self.collective.reduce_scatter(model.gradient_P)
        self.begin("inner_products", request.step)
        gradient_KL = shard.inner_products(gradient_N, request.rows)
        details = shard.details(gradient_N, theta_N) if request.details else {}
        return StepResult(
            step=request.step,
            rank=self.spec.rank,
            generation=request.generation,
            gradient=gradient_KL,
            loss=sums.loss,
            entropy=sums.entropy,
            probabilities=sums.probabilities,
            details=details,
            seconds=self._clock.stop(),
        )

    def evaluate(
        self, request: EvaluateRequest, progress: Progress | None = None
    ) -> list[ChunkScore]:
        """This worker's chunks of the tasks' test images, scored on the given checkpoints."""
        with self._during("evaluate"):
            return self._ready().scores(request, self.spec.rank, self.spec.workers, progress)

    def statistics(self, request: StatisticsRequest) -> StatisticsResult:
        """The statistics of one task's expert on its own examples.

        For RegMean++ the calls of a task come block by block, and the served model keeps the hidden
        states of its images between them; the other statistics keep nothing.
        """
        with self._during("statistics"):
            values = self._ready().statistics(request)
            return StatisticsResult(
                request.task, {name: t.cpu().numpy() for name, t in values.items()}
            )

    def _ready(self) -> ServedModel:
        if self._model is None:
            self._model = self.source.serve(self.spec, self._pinned)
        return self._model

    @contextmanager
    def _during(self, phase: str, step: int | None = None) -> Iterator[None]:
        """The whole of a call, which begins with ``phase``."""
        # An actor's methods need not run on the thread of its __init__, and torch keeps the OpenMP
        # team size per thread: set it at every entry.
        if self.spec.threads is not None:
            torch.set_num_threads(self.spec.threads)
        self.begin(phase, step)
        try:
            yield
        finally:
            self._clock.stop()


class _Clock:
    """Seconds per phase; GPU work is waited for, so that a phase is charged for its own work."""

    def __init__(self) -> None:
        self.phase = "idle"
        self._laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def begin(self, phase: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._laps[self.phase] = self._laps.get(self.phase, 0.0) + now - self._since
        self.phase, self._since = phase, now

    def lasted(self) -> float:
        return time.perf_counter() - self._since

    def stop(self) -> dict[str, float]:
        """The seconds since the last stop, by phase; the clock is idle then."""
        self.begin("idle")
        laps, self._laps = self._laps, {}
        laps.pop("idle", None)
        return laps
