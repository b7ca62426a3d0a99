"""The messages between the driver and the workers: small, picklable, without the model's tensors.

Sending them is left to the groups (``engine.driver.groups``, ``distributed``).

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
    """The place and precision of a worker's task vectors. ``folder``: for ``disk``."""

    dtype: VectorDtype = "float32"
    location: VectorLocation = "device"
    folder: str | None = None


@dataclass(frozen=True)
class LoadRequest:
    """A request to load what learning λ needs: the task vectors, and the examples of all steps.

    ``models``: the K checkpoints. ``slots_per_step``: the examples of each task in one step.
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
        """Return True if the vectors loaded for ``other`` serve this request."""
        if self.basis is not None or other.basis is not None:
            return False
        key = (self.models, self.granularity, self.storage)
        return key == (other.models, other.granularity, other.storage)


@dataclass(frozen=True)
class Rendezvous:
    """The meeting point of one group's workers: rank 0's store, and the name of this attempt.

    ``join_timeout_s``: the wait for all to join; ``timeout_s``: that of every later collective.
    """

    host: str
    port: int
    prefix: str
    timeout_s: float
    join_timeout_s: float
    interface: str | None = None


@dataclass(frozen=True)
class Heartbeat:
    """A worker's answer to a ping: its current phase, and the seconds since it began."""

    phase: str
    seconds: float

    @property
    def waits_for_peers(self) -> bool:
        return self.phase in ("join", "gather", "reduce")


@dataclass(frozen=True)
class LoadReport:
    """The examples and bytes that a worker has loaded once it is ready to step."""

    rank: int
    device: str
    tasks: tuple[str, ...]
    vector_bytes: int
    images: int
    image_bytes: int
    seconds: float


@dataclass(frozen=True)
class StepRequest:
    """A request for the local gradient of step ``step`` at the effective coefficients (K, L).

    ``weights`` (M,): the weights of the tasks' losses, None for 1. ``marginals`` (M, C): the mean
    predictions so far, for infomax. ``rows``: the models whose gradient is needed, if not all
    (the others' may be 0). ``details``: True to compute ``StepResult.details`` too.

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
    """One worker's part of a step: its gradient (K, L), and its parts of the tasks' means.

    ``loss``, ``entropy`` (M,); ``probabilities`` (M, C): the mean predictions. ``details``, per
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
"""The cause of a failure; an interruption is no worker's fault: a message or a peer was lost."""


@dataclass(frozen=True)
class Incident:
    """One failure that a run recovered from. ``ranks``: the lost ranks, as numbered at the time.

    ``kind``: the worst cause among them. ``detect_s``: from the failing call until the failure was
    known; ``recover_s``: from then until all workers were ready again. ``workers``: the number of
    workers that go on.
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
    """A request for one expert's statistics on its own examples; see ``clip_statistics``.

    ``images``: their number, drawn with ``seed``. ``samples``: for Fisher, the classes drawn per
    image, None for exact. ``block``, ``merged``: for RegMean++, the block, and the merged tensors
    that the worker does not have yet.
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
    """One task's arrays by tensor name, or its flat Fisher diagonal as ``fisher``."""

    task: int
    values: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class EvaluateRequest:
    """A request to score the test images of the tasks in ``checkpoints``, each on its checkpoint.

    ``per_sample``: True to return every image's own loss and entropy too.
    """

    checkpoints: Mapping[str, str]
    autocast: bool = False
    per_sample: bool = False


@dataclass(frozen=True)
class ChunkScore:
    """Sums over one fixed chunk of a task's test images, in nats.

    ``losses``, ``entropies`` (examples,): their terms in the order of the images, if requested.
    """

    task: int
    chunk: int
    examples: int
    correct: int
    loss: float
    entropy: float
    losses: FloatArray | None = field(default=None, compare=False)
    entropies: FloatArray | None = field(default=None, compare=False)
