"""The common test of every method's row: what a user may expect of any of them.

A new row passes it or is not done: it merges a tiny world, gives the same bits again and the same
model for tasks in another order, refuses wrong options in one line, describes itself, stands in the
docs and has a config. No other file asks of which class a method's options are.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import cache_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from world import World

import raymerge
from raymerge.config import METHOD_NAMES
from raymerge.engine.driver.loops import LOOPS
from raymerge.errors import ConfigError
from raymerge.merging.registry import METHODS, describe
from raymerge.runs.merge import merge

ROOT = Path(__file__).parents[1]
PACKAGE = Path(raymerge.__file__).parent
SMALL: dict[str, dict[str, Any]] = {
    "fisher": {"images": 6},
    "regmean": {"images": 6},
    "regmean_pp": {"images": 6},
    "wudi": {"iterations": 20},
    "fw_hard": {"iterations": 2, "images": 5},
    "fw_soft": {"iterations": 2, "images": 5},
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_tokenizer(monkeypatch)
    monkeypatch.setattr("raymerge.runs.workers._uses_cluster", lambda config: False)
    monkeypatch.setattr("raymerge.runs.folder.write_plots", lambda folder: None)
    monkeypatch.setattr("raymerge.runs.folder.write_report", lambda folder: None)


def _options(world: World, name: str) -> dict[str, Any]:
    own = {"checkpoint": world.config["tasks"][0]["checkpoint"]} if name == "joint" else {}
    return {"name": name, **own, **SMALL.get(name, {})}


def _tasks(world: World, name: str) -> list[dict[str, Any]]:
    """The world's tasks; where labels are needed, with the labelled images to learn from."""
    tasks = [dict(task) for task in world.config["tasks"]]
    options = METHODS[name].options(**_options(world, name))
    for task in tasks if METHODS[name].images(options) == "labelled" else []:
        task["adapt"] = task["test"]
    return tasks


def _merged(world: World, output: Path, name: str, *, reverse: bool = False) -> dict[str, Tensor]:
    """The merged model's tensors, or the scores where the method writes no model."""
    tasks = _tasks(world, name)
    config = world.parse(
        output,
        method=_options(world, name),
        tasks=tasks[::-1] if reverse else tasks,
        cluster={"cpus_per_worker": 1},
        optimizer={"steps": 3, "batch_size": 4, "lr": 0.02},
    )
    result = merge(config)
    if METHODS[name].merges:
        return load_file(output / "open_clip_model.safetensors")
    return {task: torch.tensor(score.loss) for task, score in result.scores.items()}


@pytest.mark.parametrize("name", METHODS)
def test_it_gives_the_same_bits_again_and_the_same_model_in_any_order(
    world: World, tmp_path: Path, name: str
) -> None:
    first = _merged(world, tmp_path / "first", name)
    again = _merged(world, tmp_path / "again", name)
    permuted = _merged(world, tmp_path / "permuted", name, reverse=True)
    assert first.keys() == again.keys() == permuted.keys()
    for key, tensor in first.items():
        assert torch.equal(again[key], tensor), key
        torch.testing.assert_close(permuted[key], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_it_refuses_wrong_options_in_one_line_that_names_the_key(world: World, name: str) -> None:
    fields = METHODS[name].options.model_fields
    wrong: dict[str, Any] = {"nonsense": 1}
    wrong |= {key: {"a": "mapping"} for key in fields if key != "name"}
    for key, value in wrong.items():
        with pytest.raises(ConfigError) as caught:
            world.parse(method={**_options(world, name), key: value})
        assert f"method.{key}" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_it_describes_itself(world: World, name: str) -> None:
    row, options = METHODS[name], METHODS[name].options(**_options(world, name))
    assert describe(options).startswith(row.title)
    assert row.paper[-4:].isdigit() or "arXiv" in row.paper
    config = world.parse(method=_options(world, name), tasks=_tasks(world, name))
    account = row.account(options, config)
    assert account.endswith(".")
    assert "images" in account


@pytest.mark.parametrize("name", METHODS)
def test_it_stands_in_the_docs_and_has_a_config(name: str) -> None:
    for page in ("methods.md", "config.md"):
        assert f"`{name}`" in (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert (ROOT / "configs" / "methods" / f"{name}.yaml").exists()


def test_rows_options_and_loops_name_the_same_methods() -> None:
    assert set(METHODS) == set(METHOD_NAMES)
    for name, row in METHODS.items():
        assert row.options.model_fields["name"].annotation.__args__ == (name,)  # type: ignore[union-attr]
    assert {row.loop for row in METHODS.values()} - {None} == set(LOOPS)


def test_only_the_registry_asks_of_which_class_options_are() -> None:
    """isinstance tests on a method's options, outside the registry and the options themselves."""
    classes = {row.options.__name__ for row in METHODS.values()} | {"MethodOptions"}
    offenders = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).as_posix() in ("merging/registry.py", "config/methods.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                names = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                offenders += [f"{path}:{node.lineno}: {name}" for name in names & classes]
    assert offenders == []
