"""MergeWorker: the plain class behind every actor, and behind the in-process run.

It is tested without Ray, and made an actor only where it is placed. One worker alone skips the
collectives, so that replicated, sharded and in-process work are one code path.
"""

from __future__ import annotations

import time

import torch

from raymerge.collectives import Collective
from raymerge.data.cache import PinnedImages
from raymerge.evaluation import Evaluator, deal_chunks, test_images
from raymerge.messages import (
    ChunkScore,
    EvaluateRequest,
    LoadReport,
    LoadRequest,
    Rendezvous,
    Statistics,
    StatisticsRequest,
    StepRequest,
    StepResult,
    WorkerSpec,
)
from raymerge.progress import Progress
from raymerge.share import ServedModel, Share, choose_device
from raymerge.statistics import ExpertStatistics


class MergeWorker:
    """One worker of a merge. The driver calls its methods one at a time.

    ``join`` first (only with S > 1); then ``load`` before ``step``; ``evaluate`` at any time.
    ``ping`` and ``abort`` answer while ``step`` is blocked. A failed ``step`` or ``evaluate`` may
    be called again; after a failed ``load`` call ``load`` again.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.collective = Collective()
        self._model: ServedModel | None = None
        self._share: Share | None = None
        self._images: dict[int, PinnedImages] = {}
        self._evaluator: Evaluator | None = None
        self._statistics: ExpertStatistics | None = None

    def ping(self) -> int:
        """This worker's rank, at once, even while a step runs."""
        return self.spec.rank

    def abort(self) -> None:
        """Free a ``step`` that waits for a lost peer; the group's generation is over."""
        self.collective.abort()

    def open_store(self, host: str) -> int:
        """Shard 0 of a group: start the rendezvous store on a free port; returns the port."""
        return self.collective.open_store(host, self.spec.shards)

    def join(self, rendezvous: Rendezvous) -> None:
        """Meet the other shards of the group; all of them must call this."""
        self.collective.join(
            rendezvous, self.spec.shard, self.spec.shards, choose_device(self.spec)
        )

    def load(self, request: LoadRequest, progress: Progress | None = None) -> LoadReport:
        """Pin the shard of θ₀ and V, the heads, and the images of this worker's slots.

        Raises :class:`~raymerge.errors.UserError` for a damaged checkpoint or image.
        """
        started = time.perf_counter()
        self._enter()
        vectors = None
        if self._share is not None and request.same_vectors(self._share.request):
            vectors = self._share.vectors
        self._share = None  # free the old vectors before the new ones are read
        self._share = Share(self.spec, request, self._ready(), self._images, progress, vectors)
        return LoadReport(
            rank=self.spec.rank,
            device=str(self._share.device),
            tasks=tuple(self.spec.task_names[part.task] for part in self._share.slots),
            vector_bytes=self._share.vectors.nbytes,
            images=sum(len(images) for images in self._images.values()),
            image_bytes=sum(images.nbytes for images in self._images.values()),
            seconds=time.perf_counter() - started,
        )

    def step(self, request: StepRequest) -> StepResult:
        """∂ℒ/∂λ of this worker's slots at ``request.lambdas``; keeps no state between steps."""
        if self._share is None or self._model is None:
            raise RuntimeError("step() before load()")
        self._enter()
        share, encoder, clock = self._share, self._model.encoder, _Clock()
        theta_N = self.collective.mine(encoder.theta_P)
        share.merge(request.lambdas, theta_N)
        clock.lap("merge")
        self.collective.all_gather(encoder.theta_P)
        clock.lap("communicate")
        sums = share.backward(request)
        clock.lap("compute")
        gradient_N = self.collective.reduce_scatter(encoder.gradient_P)
        clock.lap("communicate")
        gradient_KL = share.inner_products(gradient_N, request.rows)
        details = share.details(gradient_N, theta_N) if request.details else {}
        clock.lap("inner_products")
        return StepResult(
            step=request.step,
            rank=self.spec.rank,
            generation=request.generation,
            gradient=gradient_KL,
            loss=sums.loss,
            entropy=sums.entropy,
            probabilities=sums.probabilities,
            details=details,
            seconds=clock.laps,
        )

    def evaluate(
        self, request: EvaluateRequest, progress: Progress | None = None
    ) -> list[ChunkScore]:
        """This worker's chunks of the tasks' test images, scored on the given checkpoints."""
        self._enter()
        model = self._ready()
        if self._evaluator is None:
            images = test_images(self.spec.tasks)
            sizes = {task: len(listed) for task, listed in images.items()}
            dealt = deal_chunks(sizes, self.spec.workers)[self.spec.rank]
            self._evaluator = Evaluator(model.encoder, model.pretrained, dealt, images)
        names = self.spec.task_names
        return self._evaluator.scores(request, names, model.head, progress)

    def statistics(self, request: StatisticsRequest) -> Statistics:
        """What one task's expert makes of its images.

        For RegMean++ the calls of a task come block by block, and the worker keeps where its images
        have got to; the others keep nothing.
        """
        self._enter()
        if self._statistics is None:
            self._statistics = ExpertStatistics(self.spec, self._ready())
        return self._statistics.gather(request)

    def _ready(self) -> ServedModel:
        if self._model is None:
            self._model = ServedModel(self.spec)
        return self._model

    def _enter(self) -> None:
        # An actor's methods need not run on the thread of its __init__, and torch keeps the OpenMP
        # team size per thread: set it at every entry.
        if self.spec.threads is not None:
            torch.set_num_threads(self.spec.threads)


class _Clock:
    """Seconds per phase; GPU work is waited for, so that a phase is charged for its own work."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self._last
        self._last = now
