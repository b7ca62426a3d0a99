"""The served model: the interface through which a worker uses a model and its tasks' examples.

CLIP with its heads and images is one kind (``clip_model``), a user's ``nn.Module`` with batches
another (``module_model``). The worker, its shard, the groups and the loops use only this interface.

Legend: B rows of logits, C classes, P columns of the flat vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymerge.engine.messages import ChunkScore, EvaluateRequest, StatisticsRequest, WorkerSpec
from raymerge.files.progress import Progress
from raymerge.merging.layout import ParameterLayout
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint

Examples = tuple[int, NDArray[np.int64]]
"""A task, and the sorted or drawn indices of some of its examples."""
Pinned = dict[int, Any]
"""The examples that a worker holds in memory, by task; each served model has its own form."""


class ServedModel(Protocol):
    """A model whose merged tensors are views into ``theta_P`` and their gradients into
    ``gradient_P``, and the examples of its tasks.

    An *example* is the content of one slot of a step: an image, or a user's batch.
    """

    layout: ParameterLayout
    pretrained: VisualCheckpoint
    theta_P: Tensor
    gradient_P: Tensor

    @property
    def classes(self) -> int:
        """Return the largest number of classes of any task."""
        ...

    @property
    def slots_per_pass(self) -> int | None:
        """Return the most examples that one forward and backward pass may hold; None for all."""
        ...

    def open_expert(self, reference: str) -> VisualCheckpoint:
        """Open the checkpoint that a request calls ``reference``."""
        ...

    def load_expert(self, task: int) -> None:
        """Set θ to the task's own expert."""
        ...

    def populations(self) -> list[int]:
        """Return the number of examples of each task, 0 where it has none."""
        ...

    def pin(
        self, needed: Mapping[int, NDArray[np.int64]], progress: Progress, threads: int
    ) -> None:
        """Load these examples of each task into memory.

        Raises :class:`~raymerge.errors.UserError` for a damaged one.
        """
        ...

    def pinned_bytes(self) -> int: ...

    def outputs(self, examples: Sequence[Examples], autocast: bool) -> list[Tensor]:
        """Return logits (B, C) for each entry, with equally many rows for each example."""
        ...

    def labels(self, task: int) -> Tensor:
        """Return the labels of all examples of a task, in their order."""
        ...

    def statistics(self, request: StatisticsRequest) -> dict[str, Tensor]:
        """Return the statistics of one task's expert on its own examples, by tensor name."""
        ...

    def scores(
        self, request: EvaluateRequest, rank: int, workers: int, progress: Progress | None
    ) -> list[ChunkScore]:
        """Score this worker's chunks of the labelled test examples."""
        ...


def choose_device(spec: WorkerSpec) -> torch.device:
    """Return the first GPU that torch sees, else the CPU.

    Ray's GPUs are logical (tests declare fake ones), so torch decides. ``spec.use_gpu`` keeps a
    worker without a GPU off the GPUs that Ray does not hide from it.
    """
    cuda = spec.use_gpu and torch.cuda.is_available()
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


class ModelSource(Protocol):
    """A description of a served model, small enough to send, from which a worker makes it."""

    @property
    def task_names(self) -> tuple[str, ...]: ...

    def inputs(self) -> Mapping[str, Callable[[], str]]:
        """Return a function for the digest of every input that a worker reads from its node."""
        ...

    def serve(self, spec: WorkerSpec, pinned: Pinned) -> ServedModel:
        """Make the model; ``pinned``: the examples that the worker holds already."""
        ...

    def store_parts(self, put: Callable[[Any], Callable[[], Any]]) -> ModelSource:
        """Return this source with its large parts stored by ``put``, which returns a getter."""
        ...
