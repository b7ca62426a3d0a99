"""Scores of a model on labelled images: from sums per chunk to accuracy and losses per task.

Computing the sums is left to ``engine.worker.evaluation``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from raymerge.engine.messages import ChunkScore, FloatArray


@dataclass(frozen=True)
class TaskScore:
    """One task's row of ``results.json``; accuracies in [0, 1], losses and entropies in nats."""

    top1: float
    loss: float
    entropy: float
    examples: int


@dataclass(frozen=True)
class Samples:
    """Entropy and cross-entropy of each test image of a task, (N,) in nats."""

    entropy_N: FloatArray
    loss_N: FloatArray


def summarise(scores: Iterable[ChunkScore], names: Sequence[str]) -> dict[str, TaskScore]:
    """Return one row for each task, in task order, whatever order the chunk sums come in."""
    ordered = sorted(scores, key=lambda s: (s.task, s.chunk))
    rows = {}
    for task in sorted({s.task for s in ordered}):
        chunks = [s for s in ordered if s.task == task]
        n = sum(s.examples for s in chunks)
        rows[names[task]] = TaskScore(
            top1=sum(s.correct for s in chunks) / n,
            loss=sum(s.loss for s in chunks) / n,
            entropy=sum(s.entropy for s in chunks) / n,
            examples=n,
        )
    return rows


def samples(scores: Iterable[ChunkScore], names: Sequence[str]) -> dict[str, Samples]:
    """Return every test image's values by task, in task and image order.

    The scores must be those of a request with ``per_sample``.
    """
    ordered = sorted(scores, key=lambda s: (s.task, s.chunk))
    parts: dict[str, list[tuple[FloatArray, FloatArray]]] = {}
    for score in ordered:
        assert score.losses is not None
        assert score.entropies is not None
        parts.setdefault(names[score.task], []).append((score.entropies, score.losses))
    return {
        name: Samples(*(np.concatenate(column) for column in zip(*chunks, strict=True)))
        for name, chunks in parts.items()
    }


def results_json(method: str, rows: Mapping[str, TaskScore]) -> dict[str, object]:
    """Return the content of ``results.json``: the tasks' rows and their unweighted means.

    A loss that is not finite (a model merged with too large a λ) is null: JSON has no NaN.
    """
    average = {
        key: _finite(sum(getattr(row, key) for row in rows.values()) / len(rows))
        for key in ("top1", "loss", "entropy")
        if rows
    }
    return {
        "method": method,
        "average": average,
        "tasks": {
            name: {key: _finite(value) for key, value in asdict(row).items()}
            for name, row in rows.items()
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
