"""A whole run of every method in this process, and on Ray for the methods that use images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from commands import cache_tokenizer, read_json
from safetensors.torch import load_file
from world import World

from raymerge.config import METHOD_NAMES, Config
from raymerge.merging.registry import METHODS, describe
from raymerge.runs.merge import MergeResult, evaluate, merge

WEIGHTS = "open_clip_model.safetensors"
OPTIMIZER = {"steps": 3, "batch_size": 4, "lr": 0.02}

# The words that each method's card must have: what was done, and with which images.
CARDS = {
    "zero_shot": ("as it is: a reference", "Nothing was merged, and no images were used."),
    "joint": ("trained on all tasks at once", "Nothing was merged, and no images were used."),
    "average": ("4 fine-tuned models merged", "constants of the method; no images were used."),
    "task_arithmetic": ("(λ=0.3)", "constants of the method; no images were used."),
    "ties": ("(20%, sum, λ=0.3)", "constants of the method; no images were used."),
    "dare": ("(20%, λ=0.3)", "constants of the method; no images were used."),
    "tsv": ("TSV-Merge", "constants of the method; no images were used."),
    "iso_c": ("Iso-C", "follow from the checkpoints alone; no images were used."),
    "iso_cts": ("Iso-CTS", "constants of the method; no images were used."),
    "wudi": ("WUDI-Merging", "follow from the checkpoints alone; no images were used."),
    "swudi": ("SWUDI", "constants of the method; no images were used."),
    "aswudi": ("ASWUDI", "constants of the method; no images were used."),
    "fisher": ("statistics of each model on up to 6 unlabeled images of its own task, seed 1.",),
    "regmean": ("statistics of each model on up to 6 unlabeled images of its own task, seed 1.",),
    "regmean_pp": (
        "statistics of each model on up to 6 unlabeled images of its own task, seed 1.",
    ),
    "adamerging": (
        "learned without labels: 3 steps of Adam (lr 0.02, constant) on 4 unlabeled images of each "
        "task per step, seed 1.",
    ),
    "fw_hard": (
        "those of up to 2 Frank-Wolfe iterations, with gradients of cross-entropy on up to 5 "
        "labelled images of each task that has some, seed 1.",
        "It learns from the labels of the test images of colour, shade, tone, shape.",
    ),
    "fw_soft": (
        "those of 2 Frank-Wolfe iterations, with gradients of entropy on up to 5 unlabeled images",
        "Each iteration merged the models that the tasks chose by 3 steps of Adam (lr 0.02, "
        "constant), without labels, on 4 images of each task.",
        "It adapts on the test images of colour, shade, tone, shape, without labels",
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "fisher": {"images": 6},
    "regmean": {"images": 6},
    "regmean_pp": {"images": 6},
    "wudi": {"iterations": 20},
    "fw_hard": {"iterations": 2, "images": 5},
    "fw_soft": {"iterations": 2, "images": 5, "objective": "entropy"},
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_tokenizer(monkeypatch)


def _config(world: World, output: Path, method: dict[str, Any], **changes: Any) -> Config:
    tasks = [dict(task) for task in world.config["tasks"]]
    labels = method["name"].startswith("fw_") or method.get("objective") == "cross_entropy"
    for task in tasks if labels else []:
        task["adapt"] = task["test"]
    cluster = {"cpus_per_worker": 1, **changes.pop("cluster", {})}
    changes = {"optimizer": OPTIMIZER, **changes}
    return world.parse(output, method=method, tasks=tasks, cluster=cluster, **changes)


def _method(world: World, name: str) -> dict[str, Any]:
    own = {"checkpoint": world.config["tasks"][0]["checkpoint"]} if name == "joint" else {}
    return {"name": name, **own, **OPTIONS.get(name, {})}


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_every_method_writes_a_complete_folder(
    world: World, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymerge.runs.workers._uses_cluster", lambda config: False)
    config, out = _config(world, tmp_path / "out", _method(world, name)), tmp_path / "out"
    result = merge(config)
    method = METHODS[name]
    results = read_json(out / "results.json")
    assert (results["method"], results["description"]) == (name, describe(config.method))
    assert results["tasks"] == {task: asdict(row) for task, row in result.scores.items()}
    assert list(results["tasks"]) == list(config.task_names)
    assert results["average"]["top1"] == pytest.approx(result.top1)
    assert (out / "report.html").exists()
    if not method.merges:
        assert sorted(p.name for p in out.iterdir() if p.name[:1] != ".") == [
            "config.yaml", "environment.json", "report.html", "results.json"
        ]  # fmt: skip
        return
    _require_lambdas(out, result, method.rows)
    _require_card(out, name, method.rows)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    written, loaded = load_file(out / WEIGHTS), model.state_dict()
    assert all(torch.equal(loaded[key], written[key]) for key in written)
    assert evaluate(config, str(out)) == result.scores
    before = load_file(world.root / "pretrained" / WEIGHTS)
    assert written.keys() == before.keys()
    moved = [key for key in before if not torch.equal(before[key], written[key])]
    assert all(key.startswith("visual.") for key in moved)
    assert bool(moved) == (name != "zero_shot")


def _require_lambdas(out: Path, result: MergeResult, rows: bool) -> None:
    assert (out / "lambdas.json").exists() == (result.lambdas is not None) == rows
    assert rows or not (out / "lambda_heatmap.png").exists()
    if result.lambdas is not None:
        written = read_json(out / "lambdas.json")
        assert written["values"] == result.lambdas.tolist()
        assert written["tasks"] == list(result.config.model_names)
        assert written["layers"] == list(result.layers)


def _require_card(out: Path, name: str, rows: bool) -> None:
    card = (out / "README.md").read_text()
    for words in CARDS[name]:
        assert words in " ".join(card.split()), card
    assert ("`lambdas.json`" in card) == rows
    files = read_json(out / "environment.json")["hashes"]
    assert all(digest in card for digest in files.values())


def test_every_method_that_merges_has_card_words_here() -> None:
    assert CARDS.keys() == {name for name, method in METHODS.items() if method.merges}


def test_the_card_of_other_objectives(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymerge.runs.workers._uses_cluster", lambda config: False)
    words = {
        "kl": "without labels, each task from its own model: 3 steps",
        "cross_entropy": "learned from labels: 3 steps of Adam (lr 0.02, constant, sharpness-aware "
        "0.07) on 4 labelled images of each task per step",
    }
    for objective, expected in words.items():
        method = {"name": "adamerging", "objective": objective}
        optimizer = {**OPTIMIZER, "sharpness": 0.07 if objective == "cross_entropy" else 0.0}
        merge(_config(world, tmp_path / objective, method, optimizer=optimizer))
        card = " ".join((tmp_path / objective / "README.md").read_text().split())
        assert expected in card
    method = {"name": "fw_hard", "iterations": 1, "start": str(tmp_path / "kl")}
    merge(_config(world, tmp_path / "fw", method))
    assert ", from those of `kl`" in (tmp_path / "fw" / "README.md").read_text()


# --- the same on Ray ---------------------------------------------------------------------------

USES_IMAGES: dict[str, dict[str, Any]] = {
    "fisher": {"name": "fisher", "images": 6},
    "fisher exact": {"name": "fisher", "samples": "exact"},
    "regmean": {"name": "regmean"},
    "regmean_pp": {"name": "regmean_pp"},
    "kl": {"name": "adamerging", "objective": "kl", "clamp": "none"},
    "infomax": {"name": "adamerging", "objective": "infomax", "normalise": True},
    "cross_entropy": {"name": "adamerging", "objective": "cross_entropy"},
    "filter": {"name": "adamerging", "filter": 0.99},
    "dare": {"name": "adamerging", "task_vectors": "dare"},
    "tsv": {"name": "adamerging", "task_vectors": "tsv"},
    "iso": {"name": "adamerging", "task_vectors": "iso"},
    "aswudi": {"name": "adamerging", "task_vectors": "aswudi"},
    "fw_hard": {"name": "fw_hard", "iterations": 3, "scaling": 1.0, "images": 5},
    "fw_hard cosine": {"name": "fw_hard", "iterations": 3, "oracle": "cosine", "scaling": 1.0},
    "fw_soft": {"name": "fw_soft", "iterations": 2, "images": 5},
    "fw_soft cosine": {"name": "fw_soft", "iterations": 2, "oracle": "cosine"},
}


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("kind", USES_IMAGES)
def test_two_workers_do_what_one_process_does(
    world: World, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vectors are sharded if the method needs it or they are whole matrices."""
    monkeypatch.setattr("raymerge.runs.folder.write_plots", lambda folder: None)
    monkeypatch.setattr("raymerge.runs.folder.write_report", lambda folder: None)
    method = USES_IMAGES[kind]
    shards = 2 if kind in ("tsv", "iso", "dare", "aswudi") or "cosine" in kind else 1
    optimizer = {**OPTIMIZER, "sharpness": 0.07 if kind == "kl" else 0.0}
    results = {}
    for name, cluster in (("one", {"workers": 0}), ("two", {"workers": 2, "shards": shards})):
        config = _config(world, tmp_path / name, method, cluster=cluster, optimizer=optimizer)
        results[name] = merge(config)
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    before = load_file(world.root / "pretrained" / WEIGHTS)
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5)
    assert any((one[key] - before[key]).abs().max() > 1e-3 for key in one)
    first, second = results["one"].lambdas, results["two"].lambdas
    if METHODS[method["name"]].rows:
        assert first is not None
        assert second is not None
        # Of 0.06 that λ can move; the sharpness-aware ascent adds some rounding.
        assert (first - second).abs().max() < 5e-6
        assert first.std() > 1e-3  # λ moved: the comparison says something
    assert results["two"].scores.keys() == results["one"].scores.keys()
