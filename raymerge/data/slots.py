"""The images that a step uses, and the worker that computes each.

A *slot* is one place in a step's batch: task k has ``slot_counts[k]`` of them. The image in a slot
is a pure function of (seed, task, step, slot), so nothing random has to be saved or restored, and
any number of workers sees the same images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SlotRange:
    """Slots ``start:stop`` of one task (its index in the config)."""

    task: int
    start: int
    stop: int


def slot_counts(populations: Sequence[int], slots_per_step: int) -> list[int]:
    """Return the slots of each task: ``slots_per_step``, or all images of a smaller task."""
    return [min(slots_per_step, population) for population in populations]


def step_images(seed: int, task: str, step: int, count: int, population: int) -> NDArray[np.int64]:
    """Return the image index of each of a task's slots: distinct, drawn anew in each step.

    All images, in order, when the task has no more than ``count``. Keyed by the task's name, so
    the order of tasks does not matter.
    """
    if population <= count:
        return np.arange(population)
    key = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "little")
    generator = np.random.default_rng([seed, key, step])
    return generator.choice(population, size=count, replace=False)


def split_slots(counts: Sequence[int], workers: int) -> list[list[SlotRange]]:
    """Split all slots, contiguous by task, evenly over the workers, which may outnumber tasks."""
    total = sum(counts)
    bounds = [total * worker // workers for worker in range(workers + 1)]
    return [_ranges(counts, a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def _ranges(counts: Sequence[int], first: int, last: int) -> list[SlotRange]:
    ranges = []
    offset = 0
    for task, count in enumerate(counts):
        start, stop = max(first - offset, 0), min(last - offset, count)
        if start < stop:
            ranges.append(SlotRange(task, start, stop))
        offset += count
    return ranges
