"""The demo on a very small world: the files it writes, and that the zoo is deterministic."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest

from raymerge.apps.demo import run_demo
from raymerge.apps.experiments.methods import METHODS
from raymerge.apps.zoo import ExpertRecipe, PretrainRecipe, ZooPaths, ZooRecipe, build_zoo
from raymerge.config import load_config
from raymerge.errors import UserError
from raymerge.runs.plan.make import make_plan

CONTRACT = [
    *("zero_shot", "individual", "average", "task_arithmetic", "ties"),
    *("adamerging_task", "adamerging", "adamerging_pp"),
]


def tiny_recipe() -> ZooRecipe:
    recipe = ZooRecipe()
    return replace(
        recipe,
        pretrain=replace(PretrainRecipe(), steps=3, warmup=1, batch=16, images_per_style=40),
        expert=replace(ExpertRecipe(), steps=2, images=40, rehearsal_images=4),
        experts=(),
        adapt_images=20,
        test_images=200,
    )


def _hashes(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> ZooPaths:
    return build_zoo(tmp_path_factory.mktemp("zoo") / "a", recipe=tiny_recipe(), progress=False)


def test_the_zoo_is_a_model_and_a_config_that_plan_accepts(zoo: ZooPaths) -> None:
    open_clip.create_model(f"local-dir:{zoo.pretrained}")
    plan = make_plan(load_config(zoo.config))
    assert len(plan.tasks) == 8
    assert {(task.adapt_images, task.test_images) for task in plan.tasks} == {(20, 200)}


def test_two_processes_build_the_same_bytes_as_one(zoo: ZooPaths, tmp_path: Path) -> None:
    again = build_zoo(tmp_path / "b", recipe=tiny_recipe(), workers=2, progress=False)
    assert _hashes(again.root) == _hashes(zoo.root)


def test_an_interrupted_build_continues(zoo: ZooPaths, tmp_path: Path) -> None:
    first = True

    def interrupted(function, arguments):  # type: ignore[no-untyped-def]
        nonlocal first
        for i, each in enumerate(arguments):
            if function.__name__ == "train_expert" and i == 2 and first:
                first = False
                raise KeyboardInterrupt
            yield function(*each)

    def build() -> ZooPaths:
        return build_zoo(tmp_path, recipe=tiny_recipe(), progress=False, run_tasks=interrupted)

    with pytest.raises(KeyboardInterrupt):
        build()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "experts").iterdir()}
    assert len(kept) == 2
    assert _hashes(build().root) == _hashes(zoo.root)
    assert all((tmp_path / "experts" / name).stat().st_mtime_ns == t for name, t in kept.items())


def test_a_folder_that_is_not_a_zoo_is_refused(tmp_path: Path) -> None:
    precious = tmp_path / "data" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(UserError, match=r"zoo .*: is in use and was not written by"):
        build_zoo(tmp_path, recipe=tiny_recipe(), progress=False)
    assert precious.read_text() == "mine"


@pytest.mark.usefixtures("local_ray")
def test_the_demo_writes_its_files(
    zoo: ZooPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scalings = (0.2, 0.3)
    monkeypatch.setattr("raymerge.apps.demo.SCALINGS", scalings)
    table = run_demo(tmp_path / "demo", zoo.root, recipe=tiny_recipe(), steps=3)

    comparison = json.loads((tmp_path / "demo" / "comparison.json").read_text())
    rows = comparison["methods"]
    assert [name for name in rows if name != "joint"] == list(METHODS)
    assert ("joint" in rows) == zoo.joint.exists()
    assert set(CONTRACT) <= set(rows)
    for row in comparison["methods"].values():
        tops = [task["top1"] for task in row["tasks"].values()]
        assert len(tops) == 8
        assert row["average"]["top1"] == pytest.approx(sum(tops) / 8)
    scan = comparison["uniform_scan"]
    assert scan["scalings"] == list(scalings)
    # Two ways to the same model: the scan at 0.3 and the method at its default.
    arithmetic = comparison["methods"]["task_arithmetic"]["average"]["top1"]
    assert scan["top1"][scalings.index(0.3)] == pytest.approx(arithmetic)
    assert f"{100 * arithmetic:.1f}" in table
    for name in ("report.html", "lambda_heatmap.png", "lambda_curves.png"):
        assert (tmp_path / "demo" / name).stat().st_size > 1000


def test_the_demo_refuses_a_folder_that_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is in use and was not written by `raymerge demo`"):
        run_demo(tmp_path)
