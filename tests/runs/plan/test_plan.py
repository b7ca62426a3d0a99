"""The plan has the right numbers from headers alone, writes nothing and reports every problem."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import Commands, config_data, tree, write_config
from safetensors.torch import load_file
from world import CLASSES, World

from raymerge.distributed.placement import Resources
from raymerge.errors import CheckpointError, DataError
from raymerge.merging.layout import CELL
from raymerge.runs.plan.make import check, make_plan
from raymerge.runs.plan.plan import Plan, human_bytes, plan_text

HERE = Resources(cpus=2)


class _Process:
    """A process whose size does not change between two plans."""

    rss = 100_000_000

    def memory_info(self) -> _Process:
        return self


@pytest.fixture
def raymerge(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


def _plan(world: World, **changes: Any) -> Plan:
    return make_plan(world.parse(**changes), HERE)


@pytest.fixture(scope="module")
def visual(world: World) -> list[int]:
    """Return the size of each visual tensor, counted in the file itself."""
    state = load_file(world.root / "pretrained" / "open_clip_model.safetensors")
    return [t.numel() for key, t in state.items() if key.startswith("visual.")]


def test_counts_are_those_of_the_files(world: World, visual: list[int]) -> None:
    plan = _plan(world)
    assert (plan.parameters, plan.tensors, plan.layers) == (sum(visual), len(visual), len(visual))
    rows = [(t.name, t.classes, t.adapt_images, t.test_images, t.dtype) for t in plan.tasks]
    assert rows == [
        (name, len(CLASSES[name]), 12, 6 * len(CLASSES[name]), "float32") for name in CLASSES
    ]


@pytest.mark.parametrize(
    ("optimizer", "per_task", "pinned"),
    [
        ({"batch_size": 4, "steps": 5}, 4, 12),  # 20 draws, but only 12 images
        ({"batch_size": 4, "steps": 1}, 4, 4),
        ({"batch_size": 3, "batches": 2, "steps": 1}, 6, 6),
        ({"batch_size": 100, "steps": 5}, 12, 12),
    ],
)
def test_images_and_bytes_of_a_step(
    world: World, visual: list[int], optimizer: dict[str, int], per_task: int, pinned: int
) -> None:
    plan = _plan(world, optimizer=optimizer)
    assert (plan.steps, plan.step_images) == (optimizer["steps"], 4 * per_task)
    assert [task.images_per_step for task in plan.tasks] == [per_task] * 4
    padded = sum(-(-size // CELL) * CELL for size in visual)
    sizes = dict(plan.bytes_per_worker)
    assert sizes.pop("process") > 0
    assert sizes.pop("activations") > 0
    assert sizes == {
        "weights and gradient": 2 * 4 * padded,
        "pretrained": 4 * padded,
        "task vectors": 4 * 4 * padded,
        "images": 4 * pinned * 3 * 32 * 32,
        "coefficients": 4 * padded // CELL * 20,
    }
    assert plan.vector_bytes == sizes["task vectors"]
    weights = world.root / "pretrained" / "open_clip_model.safetensors"
    assert plan.output_bytes == sum(t.nbytes for t in load_file(weights).values())


def test_activations_are_those_of_one_pass(world: World) -> None:
    """Two workers, each with half of a step's 48 images."""
    optimizer, cluster = {"batch_size": 12}, {"workers": 2}
    one, six, rest, auto = (
        _plan(world, optimizer=optimizer, cluster={**cluster, "micro_batch": images})
        for images in (1, 6, "all", "auto")
    )
    assert [plan.micro_batch for plan in (one, six, rest)] == [1, 6, None]
    per_image = one.bytes_per_worker["activations"]
    assert six.bytes_per_worker["activations"] == 6 * per_image
    assert rest.bytes_per_worker["activations"] == 24 * per_image
    assert auto.bytes_per_worker["activations"] == 24 * per_image  # they are small
    assert auto.micro_batch is not None
    assert auto.micro_batch > 24


@pytest.mark.parametrize(
    ("vectors", "in_memory", "whole"),
    [
        ({"dtype": "float32"}, 4, 4),
        ({"dtype": "bfloat16"}, 2, 2),
        ({"location": "host"}, 4, 4),
        ({"location": "disk", "dtype": "float32"}, 0, 4),
        ({"location": "disk", "dtype": "bfloat16"}, 0, 2),
        ({"location": "disk"}, 0, 4),
        ({"location": "files"}, 0, 4),
    ],
)
def test_the_storage_decides_the_bytes_of_the_vectors(
    world: World, vectors: dict[str, str], in_memory: int, whole: int
) -> None:
    plan, plain = _plan(world, vectors=vectors), _plan(world)
    numbers = plain.vector_bytes // 4
    assert plan.bytes_per_worker["task vectors"] == in_memory * numbers
    assert plan.vector_bytes == whole * numbers
    assert (plain.storage.dtype, plain.storage.location) == ("float32", "device")
    where = (
        "read from the checkpoints in every step"
        if vectors.get("location") == "files"
        else f"{human_bytes(plan.vector_bytes)} per worker in"
    )
    assert where in plan_text(plan)


def test_on_a_small_machine_the_vectors_take_less_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First their precision is reduced, then they move to disk; the rest stays."""
    monkeypatch.setattr(psutil, "Process", _Process)
    plain = _plan(world)
    rest = sum(plain.bytes_per_worker.values()) - plain.vector_bytes
    room = {"float32": 1.2, "bfloat16": 0.7, "disk": 0.2}
    for expected, part in room.items():
        memory = int((rest + part * plain.vector_bytes) / 0.92)
        storage = make_plan(world.parse(), Resources(cpus=2, memory_bytes=memory)).storage
        assert expected in (storage.dtype, storage.location)


@pytest.mark.parametrize(("granularity", "layers"), [("task", 1), ("block", 4), ("tensor", 32)])
def test_layers_by_granularity(world: World, granularity: str, layers: int) -> None:
    plan = _plan(world, method={"name": "adamerging", "granularity": granularity})
    assert plan.layers == layers


def test_a_static_method_takes_no_steps_and_no_vectors(world: World) -> None:
    plan = _plan(world, method={"name": "average"})
    assert (plan.steps, plan.step_images, plan.layers) == (0, 0, 1)
    assert list(plan.bytes_per_worker) == ["process", "merged model", "blocks"]
    assert (plan.vector_bytes, plan.micro_batch) == (0, None)
    assert "vectors " not in plan_text(plan)


def test_a_method_that_merges_nothing_needs_no_disk(world: World) -> None:
    assert _plan(world, method={"name": "individual"}).output_bytes == 0


@pytest.mark.parametrize("shards", [2, 4])
def test_a_shard_holds_its_part_of_the_vectors(world: World, shards: int) -> None:
    cluster = {"workers": 4, "shards": shards}
    plan, whole = _plan(world, cluster=cluster), _plan(world)
    assert plan.placement is not None
    assert (plan.placement.workers, plan.placement.groups) == (4, 4 // shards)
    for kind in ("task vectors", "pretrained"):
        share = plan.bytes_per_worker[kind] / whole.bytes_per_worker[kind]
        assert 1 / shards <= share <= 1 / shards + 0.1  # whole cells
    assert plan.bytes_per_worker["images"] == whole.bytes_per_worker["images"] / 4


def test_a_note_says_that_test_images_are_adapted_on(world: World) -> None:
    tasks = [{**task, "adapt": task["test"]} for task in world.config["tasks"][:2]]
    tasks += world.config["tasks"][2:]
    (note,) = _plan(world, tasks=tasks).notes
    assert "colour, shade" in note
    assert not _plan(world, tasks=tasks, method={"name": "average"}).notes


def test_of_stand_ins_only_headers_are_read_and_of_files_samples(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def fill(self: object, key: str, start: int, out_n: torch.Tensor) -> None:
        read.append(len(out_n))
        out_n.zero_()

    monkeypatch.setattr("raymerge.models.checkpoints.opening.SafetensorsCheckpoint.fill", fill)
    for method in ("average", "ties", "adamerging"):
        config = world.parse(method={"name": method})
        assert check(config, HERE, samples=False)[0]
        assert read == []
        assert check(config, HERE)[0]
        assert 0 < max(read) <= 1 << 16
        read.clear()


def test_a_plan_for_a_cluster_is_made_without_it(
    world: World, tmp_path: Path, raymerge: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = config_data(world, cluster={"workers": 16, "address": "192.0.2.1:6379"})
    config = write_config(tmp_path / "config.yaml", data)
    assert "decided on the cluster" in raymerge.ok("plan", config).out
    assert json.loads(raymerge.ok("plan", config, "--json").out)["placement"] is None
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    local = write_config(tmp_path / "local.yaml", config_data(world, cluster={"workers": 4}))
    assert "decided on the cluster" in raymerge.ok("plan", local).out


def test_every_problem_is_reported_in_order(world: World) -> None:
    tasks = [dict(task) for task in world.config["tasks"]]
    tasks[0]["checkpoint"] = "/nowhere/a.pt"
    tasks[1]["adapt"] = "/nowhere/b"
    tasks[2]["test"] = "/nowhere/c"
    tasks[3]["adapt"] = None
    _, problems = check(world.parse(tasks=tasks), HERE)
    assert [type(problem) for problem in problems] == [
        CheckpointError,
        DataError,
        DataError,
        DataError,
    ]
    for problem, word in zip(problems, ("/a.pt", "/b", "/c", "shape"), strict=True):
        assert word in str(problem)
    with pytest.raises(CheckpointError, match=r"a\.pt.* \(and 3 more: see `raymerge plan`\)"):
        make_plan(world.parse(tasks=tasks), HERE)


def test_experts_are_checked_even_without_a_pretrained_model(world: World) -> None:
    tasks = [dict(task) for task in world.config["tasks"]]
    tasks[1]["checkpoint"] = "/nowhere/b.pt"
    plan, problems = check(world.parse(model="local-dir:/nowhere", tasks=tasks), HERE)
    assert plan is None
    assert len(problems) == 2
    assert str(problems[0]) == "model: /nowhere: no such folder; check the path"
    assert "b.pt" in str(problems[1])


def test_text_and_json_say_the_same_and_write_nothing(
    world: World, tmp_path: Path, raymerge: Commands
) -> None:
    config = write_config(tmp_path / "config.yaml", config_data(world, output="out"))
    before = tree(tmp_path, world.root)
    text = raymerge.ok("plan", config)
    data = json.loads(raymerge.ok("plan", config, "--json").out)
    assert tree(tmp_path, world.root) == before
    assert text.err == ""
    assert data["parameters"] == 115_200
    assert "115,200 visual parameters in 32 tensors" in text.out
    assert "4 models x 32 layers" in text.out
    assert "12 adapt images      18 test images" in text.out
    assert "5, each with 16 images" in text.out
    assert "in this process (no Ray)" in text.out
    total = sum(data["bytes_per_worker"].values())
    assert data["total_bytes_per_worker"] == total
    # The process itself has grown between the two.
    assert re.search(r"memory +[\d.]+ [MG]B per worker \(process [\d.]+ [MG]B, ", text.out)
    assert f"{human_bytes(data['output_bytes'])} for the merged model" in text.out
    assert {"method", "model", "layers", "tasks", "placement", "steps", "step_images"} <= set(data)


def test_overrides_reach_the_plan(world: World, tmp_path: Path, raymerge: Commands) -> None:
    config = write_config(tmp_path / "config.yaml", config_data(world))
    changes = ("optimizer.steps=7", "optimizer.batch_size=2", "method.granularity=task")
    argv = [part for change in changes for part in ("-o", change)]
    data = json.loads(raymerge.ok("plan", config, "--json", *argv).out)
    assert (data["steps"], data["step_images"], data["layers"]) == (7, 8, 1)
    data = json.loads(raymerge.ok("plan", config, "--json", "-o", "method=ties").out)
    assert data["method"].startswith("TIES")


def test_paths_are_relative_to_the_config(
    world: World, tmp_path: Path, raymerge: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = config_data(world)
    data["model"] = "local-dir:pretrained"
    for task in data["tasks"]:
        task["checkpoint"] = f"experts/{task['name']}.safetensors"
        task["adapt"], task["test"] = f"data/{task['name']}/adapt", f"data/{task['name']}/test"
    (tmp_path / "home").mkdir()
    for name in ("pretrained", "experts", "data"):
        (tmp_path / "home" / name).symlink_to(world.root / name)
    config = write_config(tmp_path / "home" / "config.yaml", data)
    monkeypatch.chdir(tmp_path)
    assert json.loads(raymerge.ok("plan", config, "--json").out)["step_images"] == 16
    assert raymerge.ok("plan", "home/config.yaml").out


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (6_846_316, "6.8 MB"), (2e9, "2.0 GB"),
     (3.2e12, "3.20 TB")],
)  # fmt: skip
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_plan_text_names_groups_and_shards(world: World) -> None:
    text = plan_text(_plan(world, cluster={"workers": 4, "shards": 2, "cpus_per_worker": 2}))
    assert "4 = 2 groups x 2 shards, each with 2 CPUs and 0 GPUs" in text
