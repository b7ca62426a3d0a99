"""Whole runs on stored data sets: the same bits as on the same images in folders."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import cache_tokenizer, read_json
from stored_sets import samples_of, write_npz, write_parquet, write_tar
from world import World, write_model

from raymerge.apps.experiments.corrupted_tasks import Corruption, corrupted_tasks
from raymerge.apps.finetune.run import finetune
from raymerge.config import Config, TaskConfig, parse_config
from raymerge.data.sources import labelled_images, unlabeled_images
from raymerge.errors import DataError
from raymerge.runs.merge import merge
from raymerge.runs.plan.make import check


@pytest.fixture(autouse=True)
def only_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_tokenizer(monkeypatch)
    monkeypatch.setattr("raymerge.runs.folder.write_plots", lambda folder: None)
    monkeypatch.setattr("raymerge.runs.folder.write_report", lambda folder: None)


@pytest.fixture(scope="module")
def stored(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The world's tasks: one Parquet, one tar, one npz, one left in its folder."""
    root = tmp_path_factory.mktemp("stored")
    tasks = deepcopy(list(world.config["tasks"]))
    for key in ("adapt", "test"):
        parquet, tar, npz, _ = tasks
        samples = [
            samples_of(task[key], task["classnames"] if key == "test" else None) for task in tasks
        ]
        parquet[key] = str(write_parquet(root / f"{key}.parquet", samples[0]))
        write_tar(root / f"{key}-0.tar", samples[1][:5])
        write_tar(root / f"{key}-1.tar", samples[1][5:])
        tar[key] = str(root / f"{key}-{{0..1}}.tar")
        npz[key] = str(write_npz(root / f"{key}.npz", samples[2]))
    return tasks


def _merge(world: World, output: Path, **changes: Any) -> tuple[Any, Any]:
    cluster = {"cpus_per_worker": 1, **changes.pop("cluster", {})}
    merge(world.parse(output=output, cluster=cluster, **changes))
    results = read_json(output / "results.json")
    return read_json(output / "lambdas.json"), (results["average"], results["tasks"])


def test_a_merge_learns_the_same_bits_from_every_form(world, stored, tmp_path):
    expected = _merge(world, tmp_path / "folders")
    assert _merge(world, tmp_path / "stored", tasks=stored) == expected


def test_workers_open_the_data_for_themselves(world, stored, tmp_path, local_ray):
    cluster = {"workers": 2, "gpus_per_worker": 0}
    expected, _ = _merge(world, tmp_path / "folders")
    learned, _ = _merge(world, tmp_path / "stored", tasks=stored, cluster=cluster)
    np.testing.assert_allclose(learned["values"], expected["values"], atol=1e-6)


def test_labelled_images_to_adapt_on(world, stored, tmp_path):
    """Cross-entropy of the test images: their labels go with the rows."""
    method = {"name": "adamerging", "objective": "cross_entropy"}
    optimizer = {"steps": 2, "batch_size": 100, "lr": 0.01}  # all of them, in whatever order

    def run(name: str, tasks: list[dict[str, Any]]) -> np.ndarray:
        tasks = [{**task, "adapt": task["test"]} for task in tasks]
        changes = {"tasks": tasks, "method": method, "optimizer": optimizer}
        return np.array(_merge(world, tmp_path / name, **changes)[0]["values"])

    np.testing.assert_allclose(
        run("stored", stored), run("folders", list(world.config["tasks"])), atol=1e-5
    )


def test_the_plan_names_what_is_wrong_before_anything_runs(world, stored, tmp_path):
    tasks = deepcopy(stored)
    bad = tmp_path / "bad.png"
    samples = samples_of(world.config["tasks"][0]["adapt"])
    bad.write_bytes(samples[0][0].read_bytes()[:300])
    tasks[0]["adapt"] = str(write_parquet(tmp_path / "x.parquet", [*samples, (bad, 0)]))
    tasks[1]["test"] = str(write_tar(tmp_path / "x.tar", [(samples[0][0], 7)]))
    tasks[2]["adapt"] = "hf:no/such:train"
    _, problems = check(world.parse(tasks=tasks))
    assert all(isinstance(problem, DataError) for problem in problems)
    messages = [str(problem) for problem in problems]
    assert len(messages) == 3
    for part in (
        f"image {tmp_path / 'x.parquet'} row 12: does not decode",
        "tasks[1].test: ",
        "1 of 1 labels are not in 0 to 1",
        "tasks[2].adapt: hf:no/such:train: cannot be fetched",
    ):
        assert any(part in message for message in messages), messages


# --- corrupted copies ----------------------------------------------------------------------------


def _tasks(stored: list[dict[str, Any]]) -> list[TaskConfig]:
    return [TaskConfig(**task) for task in stored]


def test_corrupted_copies_keep_order_and_labels(stored, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("raymerge.apps.experiments.corrupted_tasks._CHUNK", 5)
    tasks, noise = _tasks(stored)[:3], Corruption("gaussian_noise", seed=3)
    copies = corrupted_tasks(tasks, noise)
    for task, copy in zip(tasks, copies, strict=True):
        names = task.classnames
        given = labelled_images(str(task.test), names, "w")
        made = labelled_images(str(copy.test), names, "w")
        assert made.labels == given.labels
        assert len(unlabeled_images(str(copy.adapt), "w")) == 12
        for a, b in zip(given.items[:2], made.items[:2], strict=True):
            before, after = (np.asarray(item.open(), dtype=int) for item in (a, b))
            assert before.shape == after.shape
            assert 1 < np.abs(before - after).mean() < 40
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.tar")}
    assert corrupted_tasks(tasks, noise, workers=2) == copies
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.tar")} == before


def test_processes_copy_what_one_copies(stored, tmp_path, monkeypatch):
    noise = Corruption("impulse_noise", seed=3)
    copies = {}
    for workers in (1, 2):
        monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / str(workers)))
        monkeypatch.setattr("raymerge.apps.experiments.corrupted_tasks._FEW", 0)
        corrupted_tasks(_tasks(stored)[:1], noise, workers=workers)
        copies[workers] = {
            path.relative_to(tmp_path / str(workers)): path.read_bytes()
            for path in (tmp_path / str(workers)).rglob("*.tar")
        }
    assert copies[1] == copies[2]
    assert len(copies[1]) == 2


# --- fine-tuning ---------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["none", "open_clip"])
def test_an_expert_is_trained_to_the_same_bits(world, stored, tmp_path, augment):
    write_model(tmp_path / "pretrained")

    def train(name: str, tasks: list[dict[str, Any]]) -> bytes:
        parts = ("name", "classnames")
        config = {
            "model": f"local-dir:{tmp_path / 'pretrained'}",
            "tasks": [{**{k: t[k] for k in parts}, "train": t["test"]} for t in tasks[:2]],
            "finetune": {"steps": 3, "warmup_steps": 1, "batch_size": 4, "augment": augment},
            "cluster": {"workers": 0, "cpus_per_worker": 1},
            "output": str(tmp_path / name),
        }
        finetune(_parsed(config, tmp_path))
        return b"".join(_tensors(p) for p in sorted((tmp_path / name).rglob("*.safetensors")))

    assert train("stored", stored) == train("folders", list(world.config["tasks"]))


def _parsed(config: dict[str, Any], root: Path) -> Config:
    return parse_config(config, root=root)


def _tensors(file: Path) -> bytes:
    """Without the header, which has the fingerprint of the images' names."""
    content = file.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


@pytest.fixture(scope="module")
def top1s() -> set[float]:
    return set()


@pytest.mark.parametrize("form", ["folder", "empty folder", "numbers", "texts", "tar"])
def test_a_class_without_test_images_is_scored_the_same_in_every_form(
    world: World, tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture, top1s: set[float]
) -> None:
    """The other classes' images keep their predictions: the missing class stays in the head."""
    tasks = deepcopy(list(world.config["tasks"]))
    names = tasks[0]["classnames"]
    kept = tmp_path / "test"
    shutil.copytree(tasks[0]["test"], kept)
    shutil.rmtree(kept / names[1])
    if form == "empty folder":
        (kept / names[1]).mkdir()
    samples = samples_of(kept, names)
    texts = [names[label] for _, label in samples]
    tasks[0]["test"] = {
        "folder": lambda: kept,
        "empty folder": lambda: kept,
        "numbers": lambda: write_parquet(tmp_path / "x.parquet", samples),
        "texts": lambda: write_parquet(tmp_path / "x.parquet", samples, labels=texts),
        "tar": lambda: write_tar(tmp_path / "x.tar", samples, "txt", texts),
    }[form]()
    tasks[0]["test"] = str(tasks[0]["test"])
    method = {"name": "task_arithmetic"}
    _, (_, whole) = _merge(world, tmp_path / "whole", method=method)
    _, (_, scores) = _merge(world, tmp_path / "out", tasks=tasks, method=method)
    task = tasks[0]["name"]
    assert scores[task]["examples"] == whole[task]["examples"] * 2 // 3
    top1s.add(scores[task]["top1"])
    assert len(top1s) == 1  # of every form
    assert {name: each for name, each in scores.items() if name != task} == {
        name: each for name, each in whole.items() if name != task
    }
    assert f"1 of 3 classes have no image ({names[1]!r})" in caplog.text
