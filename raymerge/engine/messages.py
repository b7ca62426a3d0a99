"""What travels between the driver and the workers: small, picklable, no tensors of the model.

Legend: K models, M tasks, L layers, C classes of the task with the most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raymerge.config import VectorDtype, VectorLocation
from raymerge.config.methods import Granularity
from raymerge.merging.basis import Basis
from raymerge.merging.method import Objective

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class WorkerSpec:
    """A worker's rank among the workers, and its resources.

    Rank r of W workers is shard r mod S of group r div S. ``threads``: CPU threads; None leaves
    torch's own choice.
    """

    rank: int = 0
    workers: int = 1
    shards: int = 1
    threads: int | None = None
    micro_batch: int | Literal["auto", "all"] = "auto"
    use_gpu: bool = True

    @property
    def shard(self) -> int:
        return self.rank % self.shards


@dataclass(frozen=True)
class VectorStorage:
    """Where and in which precision a worker pins its task vectors. ``folder``: for ``disk``."""

    dtype: VectorDtype = "float32"
    location: VectorLocation = "device"
    folder: str | None = None


@dataclass(frozen=True)
class LoadRequest:
    """Get ready to learn λ: which vectors to pin, and which images the steps will use.

    ``models``: the K checkpoints.
    """

    models: tuple[str, ...]
    granularity: Granularity
    objective: Objective
    slots_per_step: int
    batches: int
    steps: int
    seed: int
    autocast: bool = False
    basis: Basis | None = None
    storage: VectorStorage = VectorStorage()

    def same_vectors(self, other: LoadRequest) -> bool:
        """Whether what is pinned for the other serves this one."""
        mine = (self.models, self.granularity, self.storage)
        plain = self.basis is None and other.basis is None
        return plain and mine == (other.models, other.granularity, other.storage)


@dataclass(frozen=True)
class Rendezvous:
    """Where the workers of one group meet: rank 0's store, and the name of this attempt.

    ``join_timeout_s``: for all to come; ``timeout_s``: for every collective thereafter.
    """

    host: str
    port: int
    prefix: str
    timeout_s: float
    join_timeout_s: float
    interface: str | None = None


@dataclass(frozen=True)
class Heartbeat:
    """A worker's answer to a ping: what it is at, and for how long."""

    phase: str
    seconds: float

    @property
    def waits_for_peers(self) -> bool:
        return self.phase in ("join", "gather", "reduce")


@dataclass(frozen=True)
class LoadReport:
    """What a worker holds once it is ready to step."""

    rank: int
    device: str
    tasks: tuple[str, ...]
    vector_bytes: int
    images: int
    image_bytes: int
    seconds: float


@dataclass(frozen=True)
class StepRequest:
    """Compute the local gradient of step ``step`` at the effective coefficients (K, L).

    ``weights`` (M,): of the tasks' losses, None for 1. ``marginals`` (M, C): the running mean of
    the predictions, for infomax. ``rows``: the models whose gradient is wanted, if not all (the
    others' may be 0). ``details``: also what scores candidates (``StepResult.details``).
    Steps are idempotent: the same request gives the same result however often it is sent. A result
    carries its ``generation`` back, so that one of an abandoned group is recognised.
    """

    step: int
    lambdas: FloatArray
    generation: int = 0
    weights: FloatArray | None = None
    marginals: FloatArray | None = None
    rows: tuple[int, ...] | None = None
    details: bool = False


@dataclass(frozen=True)
class StepResult:
    """One worker's share of a step: its gradient (K, L), and its parts of the tasks' means.

    ``loss``, ``entropy`` (M,); ``probabilities`` (M, C): of the mean prediction. ``details``, per
    layer of its columns: ``gradient_base`` ⟨∂ℒ/∂θ, θ₀⟩, ``gradient_square``, ``theta_square`` (L,)
    and ``model_square`` ‖θ_k‖² (K, L).
    """

    step: int
    rank: int
    generation: int
    gradient: FloatArray
    loss: FloatArray
    entropy: FloatArray
    probabilities: FloatArray
    details: Mapping[str, FloatArray] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


IncidentKind = Literal["worker", "start", "preemption", "interruption"]
"""Whose fault a failure was; an interruption is nobody's: a message or a peer was lost."""


@dataclass(frozen=True)
class Incident:
    """One failure that a run survived. ``ranks``: who was lost, by their numbers at the time.

    ``kind``: the worst of what befell them. ``detect_s``: from the call that failed until it was
    known; ``recover_s``: from then until all were ready again. ``workers``: how many go on.
    """

    what: str
    kind: IncidentKind
    ranks: tuple[int, ...]
    reason: str
    detect_s: float
    recover_s: float
    workers: int


@dataclass(frozen=True)
class StatisticsRequest:
    """What one expert makes of its own task's images; see ``statistics.ExpertStatistics``.

    ``images``: how many, drawn with ``seed``. ``samples``: of Fisher, None for exact. ``block``,
    ``merged``: of RegMean++, which block, and the tensors that are merged by now and new to the
    worker.
    """

    kind: Literal["fisher", "grams", "block_grams"]
    task: int
    images: int
    seed: int
    samples: int | None = None
    block: int = 0
    merged: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class StatisticsResult:
    """Of one task: arrays by tensor name, or the flat Fisher diagonal as ``fisher``."""

    task: int
    values: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class EvaluateRequest:
    """Score the test images of the tasks named in ``checkpoints``, each on its checkpoint.

    ``per_sample``: also every image's own loss and entropy.
    """

    checkpoints: Mapping[str, str]
    autocast: bool = False
    per_sample: bool = False


@dataclass(frozen=True)
class ChunkScore:
    """Sums over one fixed chunk of a task's test images, in nats.

    ``losses``, ``entropies`` (examples,): their terms in the order of the images, if asked for.
    """

    task: int
    chunk: int
    examples: int
    correct: int
    loss: float
    entropy: float
    losses: FloatArray | None = field(default=None, compare=False)
    entropies: FloatArray | None = field(default=None, compare=False)
