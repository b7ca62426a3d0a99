"""More candidates for FW-Merging: the models, the start, and the memory they take."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiment_worlds import ARITHMETIC, STEPS, bench
from world import MODEL_CFG, World, write_model

from raymerge.apps.experiments import fw_candidates, fw_memory, fw_scaling
from raymerge.apps.experiments.bench import Bench
from raymerge.apps.zoo import ExpertRecipe, ModelRecipe, ZooRecipe
from raymerge.apps.zoo.extras import TURNS, Extra, ExtraRecipe, build_extras, draw_extra, extras
from raymerge.apps.zoo.images import FAMILIES, draw_images
from raymerge.config.experiments import FwScaling
from raymerge.errors import RunError, UserError

OPTIONS = FwScaling(name="fw_scaling")
TINY = ExtraRecipe(
    expert=ExpertRecipe(steps=2, images=8, batch=4, rehearsal_batch=2, rehearsal_images=1)
)
SMALL_ZOO = ZooRecipe(model=ModelRecipe(context_length=MODEL_CFG["text_cfg"]["context_length"]))


# --- the models --------------------------------------------------------------------------------


def test_extra_models_cycle_through_the_tasks_and_a_longer_list_starts_with_them() -> None:
    for relevance in ("relevant", "irrelevant"):
        found = extras(relevance, 16)
        assert len({extra.name for extra in found}) == 16
        assert [extra.task for extra in found] == [*FAMILIES, *FAMILIES]
        assert extras(relevance, 40)[:16] == found
    assert {extra.kind for extra in extras("relevant", 40)} == {"relevant"}
    assert {extra.kind for extra in extras("irrelevant", 16)} == {"turned", "tinted"}


@pytest.mark.parametrize("task", ["digits", "land"])
def test_a_relevant_model_learns_its_task_from_images_of_its_own(task: str) -> None:
    zoo = ZooRecipe()
    trained = draw_images(0, task, "train", 60, zoo.expert.images - 60)[0]
    tested = draw_images(0, task, "test", 200)[0]
    images, labels, names = draw_extra(Extra("relevant", task, 0), 0, zoo, 40)
    again = draw_extra(Extra("relevant", task, 1), 0, zoo, 40)[0]
    assert names == FAMILIES[task].classnames
    assert labels.max() < len(names)
    seen = {image.tobytes() for image in [*trained, *tested, *again]}
    assert not seen & {image.tobytes() for image in images}


def test_an_irrelevant_model_learns_an_untested_task() -> None:
    zoo = ZooRecipe()
    images, labels, names = draw_extra(Extra("turned", "arrows", 0), 0, zoo, 20)
    drawn, _ = draw_images(0, "arrows", "train", 20, zoo.expert.images + 20)
    assert names == TURNS
    for image, upright, label in zip(images, drawn, labels, strict=True):
        np.testing.assert_array_equal(np.rot90(upright, label), image)
    tinted = draw_extra(Extra("tinted", "land", 0), 0, zoo, 20)
    tested = {name for family in FAMILIES.values() for name in family.classnames}
    assert not tested & {*names, *tinted[2]}


def test_trained_models_are_kept_and_do_not_depend_on_their_order(tmp_path: Path) -> None:
    trained: list[str] = []

    def backwards(
        function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[Any]:
        for each in reversed(arguments):
            trained.append(each[2].name)
            yield function(*each)

    wanted = [Extra("relevant", "signs", 0), Extra("tinted", "digits", 0)]
    found = []
    for name, run in (("a", None), ("b", backwards)):
        write_model(tmp_path / name / "pretrained")
        source = (tmp_path / "a" / "pretrained" / "open_clip_model.safetensors").read_bytes()
        (tmp_path / name / "pretrained" / "open_clip_model.safetensors").write_bytes(source)
        paths = build_extras(tmp_path / name, wanted, zoo=SMALL_ZOO, recipe=TINY, run_tasks=run)
        found.append({key: path.read_bytes() for key, path in paths.items()})
    assert found[0] == found[1]
    assert len(set(found[0].values())) == 2
    build_extras(tmp_path / "b", wanted, zoo=SMALL_ZOO, recipe=TINY, run_tasks=backwards)
    assert trained == ["tinted-digits-0", "relevant-signs-0"]
    other = ExtraRecipe(expert=ExpertRecipe(steps=3))
    assert other.fingerprint(SMALL_ZOO, 0) != TINY.fingerprint(SMALL_ZOO, 0)
    assert TINY.fingerprint(SMALL_ZOO, 1) != TINY.fingerprint(SMALL_ZOO, 0)


# --- the experiment ----------------------------------------------------------------------------


def _bare(world: World, count: int = 1) -> list[dict[str, Any]]:
    """Return the world's tasks, the last ``count`` of them without images."""
    tasks = [dict(task) for task in world.config["tasks"]]
    for task in tasks[len(tasks) - count :]:
        del task["adapt"], task["test"]
    return tasks


@pytest.mark.parametrize(
    ("most", "expected"), [(16, [4, 8, 16]), (5, [4, 5]), (4, [4]), (3, [3]), (0, [])]
)
def test_candidates_are_doubled_up_to_all_of_them(most: int, expected: list[int]) -> None:
    assert fw_candidates.candidate_counts(most) == expected


def test_a_base_without_candidates_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no candidates to add"):
        fw_scaling.run(bench(world, tmp_path), OPTIONS.model_copy(update={"own": 4}))


@pytest.mark.parametrize(
    ("own", "first"),
    [(1, ["colour"]), (2, ["colour", "shade"]), (("tone", "colour"), ["colour", "tone"])],
)
def test_a_pool_starts_with_some_models_and_grows_to_all(
    world: World, tmp_path: Path, own: Any, first: list[str]
) -> None:
    """At every size all tasks are tested and learned for, with the models of the pool only."""
    names = [task.name for task in world.parse().tasks]
    options = OPTIONS.model_copy(update={"own": own})
    (pool,) = fw_candidates.growing_pools(bench(world, tmp_path), options)
    assert [task.name for task in pool.own] == first
    assert pool.counts[-1] == len(names) - len(first)
    for count in pool.counts:
        tasks = pool.tasks(count)
        assert [task.name for task in tasks] == names
        assert all(task.adapt and task.test for task in tasks)
        assert sum(task.checkpoint is not None for task in tasks) == len(first) + count
        assert {task.name for task in tasks if task.checkpoint} >= set(first)
        learned = pool.with_images(count)
        assert learned is not None
        assert [task.adapt is not None for task in learned] == [bool(t.checkpoint) for t in tasks]
        assert all(task.test for task in learned)
    assert pool.tasks(pool.counts[-1]) == world.parse().tasks


def test_a_pool_cannot_start_with_a_missing_model(world: World, tmp_path: Path) -> None:
    for own, message in (("tint", "is not in the base"), ("shape", "no checkpoint or no images")):
        options = OPTIONS.model_copy(update={"own": (own,)})
        given = Bench(world.parse(tasks=_bare(world)), tmp_path)
        with pytest.raises(UserError, match=message):
            fw_candidates.growing_pools(given, options)


def test_frank_wolfe_uses_the_added_models_of_the_tested_tasks(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft Frank-Wolfe chooses one model per task, so every model of the pool is used."""
    monkeypatch.setattr(fw_scaling, "measure_memory", lambda *given: {})
    soft = {
        "method": {"name": "fw_soft", "iterations": 1, "images": 4},
        "optimizer": {"steps": 1, "batch_size": 4},
    }
    given = Bench(world.parse(), tmp_path, {"soft": soft, "ada": STEPS})
    findings = fw_scaling.run(given, OPTIONS)
    (table,) = findings.tables
    assert list(table.columns) == ["2 models", "+2"]
    assert all(isinstance(cell, float) for row in table.rows.values() for cell in row)
    for count in (0, 2):
        run = tmp_path / "runs" / f"soft_relevant_{count}"
        found = json.loads((run / "lambdas.json").read_text())
        assert found["tasks"] == [task["name"] for task in world.config["tasks"]][: 2 + count]
        assert all(any(row) for row in found["values"])


def test_the_objective_is_cross_entropy_if_the_images_are_labelled(
    world: World, tmp_path: Path
) -> None:
    assert fw_scaling.objective_of(bench(world, tmp_path)) == "entropy"
    labelled = [{**task, "adapt": task["test"]} for task in world.config["tasks"]]
    given = Bench(world.parse(tasks=labelled), tmp_path)
    assert fw_scaling.objective_of(given) == "cross_entropy"


def test_a_base_with_untested_models_is_measured_with_all_of_them(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fw_memory, "MEMORY_MODELS", (5, 6))
    monkeypatch.setattr(fw_scaling, "START", STEPS)
    monkeypatch.setattr(fw_memory, "peak_anonymous_bytes", lambda command: 7_000_000)
    still = {"method": {"name": "fw_hard", "iterations": 1, "step_size": 1e-30, "images": 4}}
    methods = {"ta": ARITHMETIC, "ada": STEPS, "fw": still}
    given = Bench(world.parse(tasks=_bare(world, 2)), tmp_path, methods)
    accuracy, memory = (findings := fw_scaling.run(given, OPTIONS)).tables
    assert list(accuracy.columns) == ["2 models", "+2"]
    assert accuracy.rows["ada"][1] is None  # it cannot learn for models without images
    started = json.loads((tmp_path / "runs" / "start_untested" / "results.json").read_text())
    assert accuracy.rows["fw"] == [started["average"]["top1"]] * 2
    assert list(memory.rows.values()) == [["7 MB", "7 MB", "+0.0%"]] * 2
    assert [list(curve.series) for curve in findings.curves] == [
        ["ta", "ada", "fw"],
        ["files", "device"],
    ]


def test_the_start_has_zero_rows_for_candidates(world: World, tmp_path: Path) -> None:
    """Its rows are those of the merge of the base's own models; the others are 0."""
    given = Bench(world.parse(tasks=_bare(world)), tmp_path)
    own, tasks = given.base.tasks[:3], given.base.tasks
    with given.workers(own) as group:
        start = given.merge("start", STEPS, group, own)
    path = fw_scaling._pad_start(start, tasks, tmp_path / "fw")
    padded = json.loads(Path(path).read_text())
    assert padded["tasks"] == [task.name for task in tasks]
    assert padded["values"][:3] == start.lambdas.tolist()
    assert not any(padded["values"][3])


def test_a_method_that_needs_images_gets_those_of_a_tested_task(world: World) -> None:
    own = world.parse().tasks[0]
    bare = own.model_copy(update={"name": "more", "adapt": None, "test": None, "classnames": ()})
    more = fw_candidates.Candidate(bare, own).with_images
    assert (more.name, more.adapt, more.classnames) == ("more", own.adapt, own.classnames)
    assert more.test is None


def test_models_repeat_under_other_names_until_there_are_enough(world: World) -> None:
    tasks = world.parse().tasks
    for models in (3, 4, 10):
        found = fw_memory.repeat_models(tasks, models)
        assert len({task.name for task in found}) == models
        assert [task.checkpoint for task in found] == [
            tasks[i % 4].checkpoint for i in range(models)
        ]
        assert sum(task.adapt is not None for task in found) == min(4, models)
        assert all(task.test is None for task in found)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_peak_memory_is_that_of_the_child_and_its_children() -> None:
    hold = "x = b'1' * 100_000_000; import time; time.sleep(.3)"
    alone = fw_memory.peak_anonymous_bytes([sys.executable, "-c", hold])
    assert 100e6 < alone < 140e6
    child = f"subprocess.run([sys.executable, '-c', {hold!r}])"
    nested = f"import subprocess, sys; y = b'1' * 60_000_000; {child}"
    assert 160e6 < fw_memory.peak_anonymous_bytes([sys.executable, "-c", nested]) < 220e6
    with pytest.raises(RunError, match="no such thing"):
        fw_memory.peak_anonymous_bytes([sys.executable, "-c", "raise SystemExit('no such thing')"])
