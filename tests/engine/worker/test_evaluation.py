"""Scores equal open_clip's image by image, and do not depend on how chunks are dealt."""

from __future__ import annotations

import random
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from raymerge.config import Config
from raymerge.engine.messages import ChunkScore, EvaluateRequest, WorkerSpec
from raymerge.engine.scores import TaskScore, results_json, summarise
from raymerge.engine.worker.clip_source import ClipSource
from raymerge.engine.worker.evaluation import CHUNK, deal_chunks
from raymerge.engine.worker.evaluation import test_images as labelled_test_images
from raymerge.engine.worker.worker import MergeWorker
from raymerge.errors import DataError
from raymerge.models.heads import zero_shot_head

SIZES = {0: 6300, 1: CHUNK, 2: CHUNK + 1, 3: 1, 5: 1880}


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 50, 200])
def test_chunks_are_dealt_once_each_contiguously_and_evenly(workers):
    dealt = deal_chunks(SIZES, workers)
    assert len(dealt) == workers
    in_rank_order = [
        (s.task, c) for ranges in dealt for s in ranges for c in range(s.start, s.stop)
    ]
    assert in_rank_order == [
        (task, c) for task, n in SIZES.items() for c in range((n + CHUNK - 1) // CHUNK)
    ]
    counts = [sum(s.stop - s.start for s in ranges) for ranges in dealt]
    assert max(counts) - min(counts) <= 1


def test_the_order_of_the_sizes_does_not_matter():
    assert deal_chunks(dict(reversed(SIZES.items())), 3) == deal_chunks(SIZES, 3)


def _chunks() -> list[ChunkScore]:
    rng = random.Random(0)
    return [
        ChunkScore(task, chunk, 64, rng.randrange(65), 100 * rng.random(), 1e6 * rng.random())
        for task in (0, 2)
        for chunk in range(20)
    ]


def test_the_summary_is_bitwise_equal_in_any_order_of_chunks():
    chunks, names = _chunks(), ["a", "b", "c"]
    expected = summarise(chunks, names)
    assert list(expected) == ["a", "c"]
    for seed in range(10):
        shuffled = random.Random(seed).sample(chunks, len(chunks))
        assert summarise(shuffled, names) == expected
        assert list(summarise(shuffled, names)) == ["a", "c"]


def test_a_short_last_chunk_counts_by_its_images():
    chunks = [ChunkScore(0, 0, 64, 32, 64.0, 128.0), ChunkScore(0, 1, 16, 16, 0.0, 32.0)]
    assert summarise(chunks, ["a"]) == {"a": TaskScore(48 / 80, 64 / 80, 160 / 80, 80)}


def test_the_average_is_unweighted_over_tasks():
    rows = {"big": TaskScore(0.5, 1.0, 2.0, 9000), "small": TaskScore(1.0, 3.0, 0.0, 10)}
    results = results_json("average", rows)
    assert results["average"] == {"top1": 0.75, "loss": 2.0, "entropy": 1.0}
    assert results["tasks"]["small"] == {"top1": 1.0, "loss": 3.0, "entropy": 0.0, "examples": 10}
    assert results["method"] == "average"


def test_a_loss_that_is_not_finite_is_null():
    """JSON has neither NaN nor Infinity."""
    rows = {"a": TaskScore(0.5, float("nan"), 2.0, 9), "b": TaskScore(0.5, 1.0, 4.0, 9)}
    results = results_json("task_arithmetic", rows)
    assert results["average"] == {"top1": 0.5, "loss": None, "entropy": 3.0}
    assert results["tasks"]["a"]["loss"] is None
    assert results["tasks"]["b"]["loss"] == 1.0


def test_without_test_images_there_is_no_average():
    assert results_json("average", {}) == {"method": "average", "average": {}, "tasks": {}}


def test_only_tasks_with_a_test_folder_are_scored_and_errors_name_the_key(world, tmp_path):
    tasks = [dict(task) for task in world.config["tasks"]]
    del tasks[1]["test"]
    config = world.parse(tasks=tasks)
    images = labelled_test_images(config.tasks)
    assert sorted(images) == [0, 2, 3]
    assert [len(images[i]) for i in (0, 2, 3)] == [18, 12, 24]
    tasks[3]["test"] = str(tmp_path)
    with pytest.raises(DataError, match=r"tasks\[3\]\.test"):
        labelled_test_images(world.parse(tasks=tasks).tasks)


# --- a real model ---------------------------------------------------------------------------


def _chunk_scores(config: Config, rank: int = 0, workers: int = 1) -> list[ChunkScore]:
    """One worker's chunks, each task on its own expert."""
    worker = MergeWorker(ClipSource(config.model, config.tasks), WorkerSpec(rank, workers))
    return worker.evaluate(EvaluateRequest({t.name: t.checkpoint for t in config.tasks}))


def _literally(config: Config, task: int, checkpoint: str) -> TaskScore:
    """Return the scores from open_clip's own model and transform, one class at a time."""
    model, _, transform = open_clip.create_model_and_transforms(config.model.arch)
    tokenizer = open_clip.get_tokenizer(config.model.arch)
    model.eval()
    entry = config.tasks[task]
    head_DC = zero_shot_head(model, tokenizer, entry.classnames, entry.templates)
    expert = open_clip.factory.load_state_dict(checkpoint)
    visual = {k.removeprefix("visual."): v for k, v in expert.items() if k.startswith("visual.")}
    model.visual.load_state_dict(visual)
    rows = []
    for label, name in enumerate(entry.classnames):
        images = [Image.open(path) for path in Path(entry.test, name).iterdir()]
        with torch.no_grad():
            features = model.encode_image(torch.stack([transform(i) for i in images]))
        for feature in features:
            log_p = torch.log_softmax((feature / feature.norm() @ head_DC).double(), 0)
            h = -(log_p.exp() * log_p).sum()
            rows.append((float(log_p.argmax() == label), float(-log_p[label]), float(h)))
    top1, loss, entropy = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return TaskScore(top1, loss, entropy, len(rows))


@pytest.mark.parametrize("chunk", [64, 5])
def test_scores_equal_open_clips_image_by_image(world, monkeypatch, chunk):
    """Each task on its own checkpoint: a mixed-up checkpoint, head, label or chunk would show."""
    monkeypatch.setattr("raymerge.engine.worker.evaluation.CHUNK", chunk)
    config = world.parse()
    rows = summarise(_chunk_scores(config), config.task_names)
    assert list(rows) == list(config.task_names)
    for k, task in enumerate(config.tasks):
        expected = _literally(config, k, task.checkpoint)
        ours = rows[task.name]
        assert (ours.top1, ours.examples) == (expected.top1, expected.examples)
        assert ours.loss == pytest.approx(expected.loss, rel=1e-4)
        assert ours.entropy == pytest.approx(expected.entropy, rel=1e-4)


def test_three_workers_score_the_chunks_of_one_each_once_and_evenly(world, monkeypatch):
    """18, 12, 12 and 24 images in chunks of five: 4 + 3 + 3 + 5 chunks, cut within tasks."""
    monkeypatch.setattr("raymerge.engine.worker.evaluation.CHUNK", 5)
    config = world.parse()
    one = _chunk_scores(config)
    assert [(s.task, s.chunk) for s in one] == [
        (task, chunk) for task, chunks in enumerate((4, 3, 3, 5)) for chunk in range(chunks)
    ]
    assert [s.examples for s in one] == [5, 5, 5, 3, 5, 5, 2, 5, 5, 2, 5, 5, 5, 5, 4]
    three = [_chunk_scores(config, rank, 3) for rank in range(3)]
    assert [len(scores) for scores in three] == [5, 5, 5]
    assert [score for scores in three for score in scores] == one


def test_evaluating_again_gives_equal_scores_and_another_checkpoint_others(world):
    config = world.parse()
    worker = MergeWorker(ClipSource(config.model, config.tasks), WorkerSpec())
    first, second = (config.tasks[i].checkpoint for i in (0, 1))

    def score(checkpoint: str) -> list[ChunkScore]:
        return worker.evaluate(EvaluateRequest(dict.fromkeys(config.task_names, checkpoint)))

    before = score(first)
    assert score(second) != before  # cached pixels are not cached scores
    assert score(first) == before
