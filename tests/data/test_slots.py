"""A slot's image is a pure function of (seed, task, step, slot); slots split exactly and evenly."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from raymerge.data.slots import SlotRange, slot_counts, split_slots, step_images

COUNTS = ([16] * 8, [3, 1, 7, 2], [5], [1, 1, 1], [0, 4, 0, 3])


def _images(
    seed: int = 0, task: str = "mnist", step: int = 0, count: int = 16, population: int = 90
):
    return step_images(seed, task, step, count, population).tolist()


def test_the_same_key_gives_the_same_images():
    assert _images() == _images()


def test_the_images_do_not_depend_on_the_interpreter():
    """Hash randomisation and global random states play no part, so a resumed run sees the same."""
    code = "from raymerge.data.slots import step_images as s; print(s(3, 'dtd', 7, 5, 40).tolist())"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    np.random.seed(5)
    assert runs[0] == runs[1] == f"{step_images(3, 'dtd', 7, 5, 40).tolist()}\n"


@pytest.mark.parametrize("change", [{"seed": 1}, {"task": "svhn"}, {"step": 1}])
def test_each_part_of_the_key_matters(change):
    assert _images(**change) != _images()


def test_images_are_distinct_within_a_step_and_in_range():
    for step in range(50):
        chosen = _images(step=step, count=16, population=17)
        assert len(set(chosen)) == 16
        assert set(chosen) <= set(range(17))


def test_steps_are_reshuffled_independently():
    """Every image is as likely as any other: 2000 draws of 4 from 20, 400 expected each."""
    draws = np.concatenate([_images(step=s, count=4, population=20) for s in range(2000)])
    counts = np.bincount(draws, minlength=20)
    assert counts.min() > 320
    assert counts.max() < 480
    assert len({tuple(_images(step=s)) for s in range(200)}) == 200


@pytest.mark.parametrize("population", [1, 5, 16])
def test_a_small_task_shows_all_its_images_once_in_every_step(population):
    for step in range(3):
        assert _images(step=step, count=16, population=population) == list(range(population))


def test_slot_counts_are_the_batch_or_the_whole_task():
    assert slot_counts([100, 16, 3, 17], 16) == [16, 16, 3, 16]


@pytest.mark.parametrize("counts", COUNTS)
def test_split_is_an_exact_partition_for_every_number_of_workers(counts):
    every_slot = [(task, slot) for task, count in enumerate(counts) for slot in range(count)]
    for workers in range(1, 51):
        split = split_slots(counts, workers)
        assert len(split) == workers
        in_rank_order = [
            (part.task, slot)
            for parts in split
            for part in parts
            for slot in range(part.start, part.stop)
        ]
        assert in_rank_order == every_slot  # each once, and contiguous


@pytest.mark.parametrize("counts", COUNTS)
def test_split_is_even(counts):
    for workers in range(1, 51):
        sizes = [sum(p.stop - p.start for p in parts) for parts in split_slots(counts, workers)]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("counts", COUNTS)
def test_a_worker_has_one_run_per_task_and_no_empty_run(counts):
    for workers in range(1, 51):
        for parts in split_slots(counts, workers):
            tasks = [part.task for part in parts]
            assert tasks == sorted(set(tasks))
            assert all(part.start < part.stop for part in parts)


def test_one_worker_per_task_gets_that_task():
    assert split_slots([4, 4, 4], 3) == [[SlotRange(t, 0, 4)] for t in range(3)]


def test_more_workers_than_tasks_cut_within_a_task():
    assert split_slots([4, 4], 4) == [
        [SlotRange(0, 0, 2)],
        [SlotRange(0, 2, 4)],
        [SlotRange(1, 0, 2)],
        [SlotRange(1, 2, 4)],
    ]
