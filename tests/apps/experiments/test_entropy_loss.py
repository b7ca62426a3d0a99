"""Entropy against loss: the values of single images by any worker, and the tables of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from experiment_worlds import ARITHMETIC, STEPS, bench
from world import World

from raymerge.apps.experiments import entropy_loss
from raymerge.apps.experiments.entropy_bins import BIN_NAMES, ENTROPY_EDGES
from raymerge.config.experiments import EntropyLoss
from raymerge.engine.messages import ChunkScore, EvaluateRequest, WorkerSpec
from raymerge.engine.scores import Samples, samples, summarise
from raymerge.engine.worker.clip_source import ClipSource
from raymerge.engine.worker.worker import MergeWorker
from raymerge.errors import RunError

OPTIONS = EntropyLoss(name="entropy_loss")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymerge.engine.worker.evaluation.CHUNK", 5)


def _chunks(
    world: World, rank: int = 0, workers: int = 1, per_sample: bool = True
) -> list[ChunkScore]:
    config = world.parse()
    worker = MergeWorker(ClipSource(config.model, config.tasks), WorkerSpec(rank, workers))
    own = {task.name: str(task.checkpoint) for task in config.tasks}
    return worker.evaluate(EvaluateRequest(own, per_sample=per_sample))


def test_the_values_of_a_chunk_add_up_to_its_sums(world: World) -> None:
    for chunk in _chunks(world):
        assert chunk.losses.shape == chunk.entropies.shape == (chunk.examples,)
        assert chunk.losses.sum() == pytest.approx(chunk.loss, rel=1e-12)
        assert chunk.entropies.sum() == pytest.approx(chunk.entropy, rel=1e-12)


def test_values_are_sent_only_if_they_are_requested(world: World) -> None:
    for chunk in _chunks(world, per_sample=False):
        assert chunk.losses is None
        assert chunk.entropies is None


def test_two_workers_give_the_same_values_as_one(world: World) -> None:
    names = world.parse().task_names
    one = samples(_chunks(world), names)
    two = samples([*_chunks(world, 1, 2), *_chunks(world, 0, 2)], names)
    assert list(one) == list(two) == list(names)
    for task in names:
        np.testing.assert_array_equal(one[task].loss_N, two[task].loss_N)
        np.testing.assert_array_equal(one[task].entropy_N, two[task].entropy_N)


def test_the_means_of_the_values_are_the_tasks_scores(world: World) -> None:
    names = world.parse().task_names
    chunks = _chunks(world)
    rows = summarise(chunks, names)
    for task, values in samples(chunks, names).items():
        assert len(values.loss_N) == rows[task].examples
        assert values.loss_N.mean() == pytest.approx(rows[task].loss)
        assert values.entropy_N.mean() == pytest.approx(rows[task].entropy)


def test_the_values_are_of_the_model_that_was_merged(world: World, tmp_path: Path) -> None:
    """And of each task's own expert where nothing was."""
    given = bench(world, tmp_path)
    with given.workers() as group:
        for name, changes in {"ta": ARITHMETIC, "own": {"method": {"name": "individual"}}}.items():
            result = given.merge(name, changes, group)
            for task, values in entropy_loss.sample_values(result, group).items():
                assert values.loss_N.mean() == pytest.approx(result.scores[task].loss)


def test_every_image_is_in_one_bin_of_its_task_and_of_all(world: World, tmp_path: Path) -> None:
    findings = entropy_loss.run(bench(world, tmp_path, {"ta": ARITHMETIC, "ada": STEPS}), OPTIONS)
    correlations, bins = findings.tables
    together, *by_task = findings.curves
    tasks = world.parse().task_names
    assert list(correlations.columns) == [*tasks, "all"]
    assert list(bins.rows) == list(BIN_NAMES)
    assert len(BIN_NAMES) == len(ENTROPY_EDGES) + 1 == len(together.x)
    for i, (name, found) in enumerate(findings.data.items()):
        counts = [found[task]["counts"] for task in tasks]
        assert [sum(column) for column in zip(*counts, strict=True)] == list(found["all"]["counts"])
        assert sum(found["all"]["counts"]) == 18 + 12 + 12 + 24
        assert [int(row[2 * i]) for row in bins.rows.values()] == list(found["all"]["counts"])
        assert together.series[name] == found["all"]["mean_loss"]
        assert list(by_task[i].series) == list(tasks)


def test_the_published_number_is_marked_as_published(world: World, tmp_path: Path) -> None:
    findings = entropy_loss.run(bench(world, tmp_path, {"ta": ARITHMETIC}), OPTIONS)
    rows = findings.tables[0].rows
    assert [name for name, row in rows.items() if row[-1] == "0.87"] == ["published (ViT-B/32)"]
    assert any("0.87 is published" in note for note in findings.notes)


def test_all_is_of_the_images_and_not_of_the_tasks_means() -> None:
    """Within each task loss falls with entropy; over both it rises."""
    low = Samples(np.array([0.1, 0.2]), np.array([0.2, 0.1]))
    high = Samples(np.array([0.8, 0.9]), np.array([0.9, 0.8]))
    found = entropy_loss.relations({"low": low, "high": high})
    assert found["low"].spearman == found["high"].spearman == -1
    assert found["all"].spearman == pytest.approx(0.6)


def test_a_broken_model_is_named() -> None:
    broken = Samples(np.array([0.1, np.nan]), np.array([0.2, np.nan]))
    with pytest.raises(RunError, match="ta: 1 of 2 samples have no finite"):
        entropy_loss.relations({"a": broken}, "ta")
