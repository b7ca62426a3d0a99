"""What travels between the driver and the workers: small, picklable, no tensors of the model.

Legend: K tasks, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raymerge.config import Granularity, ModelConfig, TaskConfig, VectorDtype, VectorLocation
from raymerge.merging.ties import TiesStatistics

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is: the model and the tasks it serves, and its place among the workers.

    Rank r of W workers is shard r mod S of group r div S. ``threads``: CPU threads; None leaves
    torch's own choice.
    """

    model: ModelConfig
    tasks: tuple[TaskConfig, ...]
    rank: int = 0
    workers: int = 1
    shards: int = 1
    threads: int | None = None
    micro_batch: int | Literal["auto", "all"] = "auto"
    use_gpu: bool = True

    @property
    def shard(self) -> int:
        return self.rank % self.shards

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)


@dataclass(frozen=True)
class VectorStorage:
    """Where and in which precision a worker pins its task vectors. ``folder``: for ``disk``."""

    dtype: VectorDtype = "float32"
    location: VectorLocation = "device"
    folder: str | None = None


@dataclass(frozen=True)
class LoadRequest:
    """Get ready to learn λ: which vectors to pin, and which images the steps will use."""

    granularity: Granularity
    objective: str
    images_per_step: int
    batches: int
    steps: int
    seed: int
    autocast: bool = False
    ties: TiesStatistics | None = None
    storage: VectorStorage = VectorStorage()


@dataclass(frozen=True)
class Rendezvous:
    """Where the workers of one group meet: rank 0's store, and the name of this attempt."""

    host: str
    port: int
    prefix: str
    timeout_s: float
    interface: str | None = None


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

    Steps are idempotent: the same request gives the same result however often it is sent. A result
    carries its ``generation`` back, so that one of an abandoned group is recognised.
    """

    step: int
    lambdas: FloatArray
    generation: int = 0


@dataclass(frozen=True)
class StepResult:
    """One worker's share of a step: its gradient (K, L), and per task it saw the sums (K,)."""

    step: int
    rank: int
    generation: int
    gradient: FloatArray
    loss: FloatArray
    entropy: FloatArray
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluateRequest:
    """Score the test images of the tasks named in ``checkpoints``, each on its checkpoint."""

    checkpoints: Mapping[str, str]
    autocast: bool = False


@dataclass(frozen=True)
class ChunkScore:
    """Sums over one fixed chunk of a task's test images."""

    task: int
    chunk: int
    examples: int
    correct: int
    loss: float
    entropy: float
