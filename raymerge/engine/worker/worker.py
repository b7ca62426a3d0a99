"""MergeWorker: the plain class behind every actor, and behind a run in one process.

It is tested without Ray. A group of one skips the collectives, so that replicated, sharded and
in-process work are one code path. Making it an actor and restarting it are left to ``distributed``.
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
    ``ping`` and ``abort`` return while ``step`` is blocked. A failed ``step`` or ``evaluate`` may
    be called again; after a failed ``load``, and after ``assign``, call ``load`` again.

    ``begin`` is called wherever a phase begins: join, load, evaluate, statistics, and in a step
    merge, gather, compute, reduce and inner_products. Between calls the worker is idle.
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
        """Return the current phase at once, even while a step runs."""
        return Heartbeat(self._clock.phase, self._clock.phase_seconds())

    def abort(self, generation: int) -> None:
        """Begin ``generation``, and release a ``step`` of an older one that waits for a peer."""
        self._generation = generation
        self.collective.abort()

    def assign(self, spec: WorkerSpec) -> None:
        """Take another rank among the workers; loaded data that still fits is kept."""
        old, self.spec = self.spec, spec
        if (old.shard, old.shards) != (spec.shard, spec.shards):
            self._shard = None
        if old.shards != spec.shards:  # the length of θ, padded to whole shards
            self._model = None
            self.collective.leave()

    def begin(self, phase: str, step: int | None = None) -> None:
        """End the current phase and begin ``phase``, of ``step`` (counted from 0) if of one."""
        self._clock.begin(phase)

    def open_store(self, host: str) -> int:
        """Start the group's rendezvous store on a free port, as its shard 0; return the port."""
        return self.collective.open_store(host, self.spec.shards)

    def join(self, rendezvous: Rendezvous) -> None:
        """Form the process group with the other shards; all of them must call this."""
        spec = self.spec
        with self._call("join"):
            self.collective.join(rendezvous, spec.shard, spec.shards, choose_device(spec))

    def load(self, request: LoadRequest, progress: Progress | None = None) -> LoadReport:
        """Load this worker's shard of θ₀ and V, and the examples of its slots.

        Raises :class:`~raymerge.errors.UserError` for a damaged checkpoint or example.
        """
        with self._call("load"):
            return self._load(request, progress)

    def _load(self, request: LoadRequest, progress: Progress | None) -> LoadReport:
        start_s = time.perf_counter()
        # The vectors of the last request are kept if the new one asks for the same.
        store = None
        if self._shard is not None and request.same_vectors(self._shard.request):
            store = self._shard.store
        self._shard = None  # free the old vectors before the new ones are read
        self._shard = WorkerShard(
            self.spec, self.source.task_names, request, self._served_model(), progress, store
        )
        return LoadReport(
            rank=self.spec.rank,
            device=str(self._shard.device),
            tasks=tuple(self.source.task_names[part.task] for part in self._shard.slots),
            vector_bytes=self._shard.store.nbytes,
            images=sum(map(len, self._pinned.values())),
            image_bytes=self._served_model().pinned_bytes(),
            seconds=time.perf_counter() - start_s,
        )

    def step(self, request: StepRequest) -> StepResult:
        """Return ∂ℒ/∂λ of this worker's slots at ``request.lambdas``; keeps no state between steps.

        Raises :class:`~raymerge.errors.RunError` for a request of an earlier generation: it was
        sent before the group was built anew, and its result is no longer needed.
        """
        if request.generation < self._generation:
            raise RunError(
                f"step {request.step + 1}: the request is of generation {request.generation}, "
                f"this worker is in generation {self._generation}: run again with --resume"
            )
        if self._shard is None or self._model is None:
            raise RuntimeError("step() before load()")
        with self._call("merge", request.step):
            return self._step(request, self._shard, self._model)

    def _step(self, request: StepRequest, shard: WorkerShard, model: ServedModel) -> StepResult:
        # Merge the own columns of θ, then gather the others'.
        theta_N = self.collective.own_columns(model.theta_P)
        shard.merge(request.lambdas, theta_N)
        self.begin("gather", request.step)
        self.collective.all_gather(model.theta_P)
        # Differentiate the own slots by the whole θ, then sum the own columns of ∂ℒ/∂θ.
        self.begin("compute", request.step)
        sums = shard.backward(request)
        self.begin("reduce", request.step)
        gradient_N = self.collective.reduce_scatter(model.gradient_P)
        # ∂ℒ/∂λ follows from the own columns alone; the driver sums over the workers.
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
        """Score this worker's chunks of the tasks' test images on the requested checkpoints."""
        with self._call("evaluate"):
            return self._served_model().scores(request, self.spec.rank, self.spec.workers, progress)

    def statistics(self, request: StatisticsRequest) -> StatisticsResult:
        """Return the statistics of one task's expert on its own examples.

        For RegMean++ the calls of a task come block by block, and the served model keeps the hidden
        states of its images between them; the other statistics keep nothing.
        """
        with self._call("statistics"):
            values = self._served_model().statistics(request)
            return StatisticsResult(
                request.task, {name: t.cpu().numpy() for name, t in values.items()}
            )

    def _served_model(self) -> ServedModel:
        if self._model is None:
            self._model = self.source.serve(self.spec, self._pinned)
        return self._model

    @contextmanager
    def _call(self, phase: str, step: int | None = None) -> Iterator[None]:
        """Run a call from the driver, whose first phase is ``phase``."""
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
    """Counts seconds per phase; waits for GPU work, so that its time counts in its own phase."""

    def __init__(self) -> None:
        self.phase = "idle"
        self._laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def begin(self, phase: str) -> None:
        if torch.cuda.is_initialized():  # a worker on the CPU must not make a CUDA context
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._laps[self.phase] = self._laps.get(self.phase, 0.0) + now - self._since
        self.phase, self._since = phase, now

    def phase_seconds(self) -> float:
        """Return the seconds since the current phase began."""
        return time.perf_counter() - self._since

    def stop(self) -> dict[str, float]:
        """Return the seconds since the last stop by phase, and become idle."""
        self.begin("idle")
        laps, self._laps = self._laps, {}
        laps.pop("idle", None)
        return laps
