"""What plan and merge say about experts before they merge them."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from commands import Commands, config_data, write_config
from safetensors.torch import load_file, save_file
from world import World

from raymerge.config import ModelConfig
from raymerge.errors import UserError
from raymerge.models.convert import convert as convert_checkpoint
from raymerge.models.resolve import resolve_model
from raymerge.runs.model_card import _HUB_MODEL
from raymerge.runs.plan.checks import check_separate_output
from raymerge.runs.plan.expert_warnings import OpenedCheckpoint

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def said(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Plans with the first task's checkpoint replaced; returns the lines of warnings."""

    def run(checkpoint: Path | str, **changes: Any) -> list[str]:
        tasks = [dict(task) for task in world.config["tasks"]]
        tasks[0]["checkpoint"] = str(checkpoint)
        data = config_data(world, tasks=tasks, method={"name": "average"}, **changes)
        ran = Commands(capsys).ok("plan", write_config(tmp_path / "c.yaml", data))
        return [line[11:] for line in ran.out.splitlines() if line.startswith("warning")]

    return run


def _whole(world: World, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """The first expert with the pretrained model's text tower, whose tensors may be changed."""
    state = load_file(world.root / "pretrained" / WEIGHTS)
    return {**state, **load_file(world.config["tasks"][0]["checkpoint"]), **changes}


def test_ordinary_experts_are_not_warned_of(world: World, said: Any, tmp_path: Path) -> None:
    assert said(world.config["tasks"][0]["checkpoint"]) == []
    save_file(_whole(world), tmp_path / "whole.safetensors")
    assert said(tmp_path / "whole.safetensors") == []
    halves = {key: each.half() for key, each in _whole(world).items()}
    save_file(halves, tmp_path / "half.safetensors")
    assert said(tmp_path / "half.safetensors") == []


def test_a_fine_tuned_text_tower_is_said(world: World, said: Any, tmp_path: Path) -> None:
    state = _whole(world)
    for key in ("ln_final.weight", "text_projection"):
        state[key] = state[key] + 0.1
    save_file(state, tmp_path / "x.safetensors")
    (warning,) = said(tmp_path / "x.safetensors")
    assert warning.startswith("colour: the text tower in ")
    assert "was fine-tuned too (2 of 17 tensors differ" in warning


@pytest.mark.parametrize("copy", [shutil.copyfile, lambda a, b: b.symlink_to(a), Path.hardlink_to])
def test_one_file_for_two_tasks_names_both(
    world: World, said: Any, tmp_path: Path, copy: Any
) -> None:
    other = Path(world.config["tasks"][1]["checkpoint"])
    if copy is Path.hardlink_to:
        (tmp_path / "x.safetensors").hardlink_to(other)
    else:
        copy(other, tmp_path / "x.safetensors")
    (warning,) = said(tmp_path / "x.safetensors")
    assert warning.startswith("colour and shade have the same weights (")
    assert "count twice in the merge" in warning


def test_the_same_weights_in_another_container_are_the_same(
    world: World, said: Any, tmp_path: Path
) -> None:
    state = load_file(world.config["tasks"][1]["checkpoint"])
    torch.save({"model": state, "epoch": 3}, tmp_path / "x.pt")
    (warning,) = said(tmp_path / "x.pt")
    assert "colour and shade have the same weights (x.pt and shade.safetensors)" in warning
    # One number at the end of one tensor makes another model.
    state["visual.conv1.weight"].view(-1)[-1] += 1
    torch.save(state, tmp_path / "x.pt")
    assert said(tmp_path / "x.pt") == []


def test_the_pretrained_model_as_an_expert_is_said(world: World, said: Any) -> None:
    (warning,) = said(world.root / "pretrained")
    assert warning.startswith("colour: pretrained holds the pretrained model's own weights")


def test_an_expert_of_another_base_is_doubted(world: World, said: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    stranger = {
        key: torch.randn(each.shape, generator=generator) * each.std().nan_to_num(1)
        for key, each in load_file(world.config["tasks"][0]["checkpoint"]).items()
    }
    save_file(stranger, tmp_path / "x.safetensors")
    (warning,) = said(tmp_path / "x.safetensors")
    assert "probably fine-tuned from other weights; check model.pretrained" in warning


def test_a_trained_classifier_is_said_to_be_left_out(
    world: World, said: Any, tmp_path: Path
) -> None:
    state = _whole(world, **{"classifier.weight": torch.ones(3, 24)})
    save_file(state, tmp_path / "x.safetensors")
    (warning,) = said(tmp_path / "x.safetensors")
    assert warning.startswith("colour: x.safetensors also holds 'classifier.weight': ")
    assert warning.endswith("so left out")


@pytest.mark.parametrize("beside", ["fc.weight", "head.bias", "text_model.ln.weight"])
def test_a_head_beside_a_bare_tower_is_said_and_an_optimizer_is_not(
    world: World, said: Any, tmp_path: Path, beside: str
) -> None:
    tower = load_file(world.config["tasks"][0]["checkpoint"])
    state = {key.replace("visual.", "encoder."): each for key, each in tower.items()}
    moments = {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}
    training = {"optimizer_states": [{"state": moments}], "optimizer": {"state": moments}}
    torch.save({"net": state, **training}, tmp_path / "x.pt")
    assert said(tmp_path / "x.pt") == []
    torch.save({"net": {**state, beside: torch.ones(3)}, **training}, tmp_path / "x.pt")
    (warning,) = said(tmp_path / "x.pt")
    assert f"also holds 'net.{beside}'" in warning


def test_the_choice_among_several_models_is_said(world: World, said: Any, tmp_path: Path) -> None:
    state = load_file(world.config["tasks"][0]["checkpoint"])
    torch.save({"model_ema": state, "model": state}, tmp_path / "x.pt")
    (warning,) = said(tmp_path / "x.pt")
    assert "the model under model.visual.* is taken; it also holds model_ema.visual.*" in warning
    assert "to take the other one write x.pt#model_ema" in warning
    assert said(f"{tmp_path}/x.pt#model_ema") == []


@pytest.mark.parametrize("library", ["open_clip", "huggingface"])
def test_the_choice_is_said_of_the_pretrained_model_too(
    world: World, said: Any, tmp_path: Path, library: str
) -> None:
    folder, weights = world.root / "pretrained", WEIGHTS
    if library == "huggingface":
        folder = tmp_path / "hf"
        convert_checkpoint(str(world.root / "pretrained"), folder, "huggingface")
        weights = "model.safetensors"
    state, own = load_file(folder / weights), tmp_path / "own"
    both = {f"{part}.{key}": each for part in ("net", "net_ema") for key, each in state.items()}
    shutil.copytree(folder, own)
    (own / weights).unlink()
    name = {"open_clip": "open_clip_model.bin", "huggingface": "pytorch_model.bin"}[library]
    torch.save(both, own / name)
    expert = world.config["tasks"][0]["checkpoint"]
    (warning,) = said(expert, model=f"local-dir:{own}")
    tower = "vision_model." if library == "huggingface" else ""
    assert warning.startswith(f"model: of own the model under net.{tower}* is taken; it also holds")
    assert "write own#net_ema" in warning
    assert said(expert, model=f"local-dir:{own}#net_ema") == []


def test_warnings_carry_neither_folders_nor_passwords(world: World) -> None:
    visual = None
    for reference, place in (
        ("/home/ada/secret/x.pt#model", "x.pt"),
        ("https://me:pw@host/x.pt?token=t#model", "https://host/x.pt"),
        ("hf-hub:ORG/NAME", "hf-hub:ORG/NAME"),
        ("local-dir:/home/ada/m", "m"),
    ):
        assert OpenedCheckpoint("a", reference, visual).place == place  # type: ignore[arg-type]


def test_merge_says_it_too_and_so_does_the_card(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    tasks = [dict(task) for task in world.config["tasks"]]
    tasks[0]["checkpoint"] = tasks[1]["checkpoint"]
    data = config_data(world, tasks=tasks, method={"name": "average"}, output=str(tmp_path / "out"))
    Commands(capsys).ok("merge", write_config(tmp_path / "c.yaml", data))
    assert "colour and shade have the same weights (shade.safetensors)" in caplog.text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- colour and shade have the same weights (shade.safetensors)" in card
    assert str(world.root) not in card


def test_eval_of_a_whole_model_takes_its_own_text_tower(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    """The same scores as when the model itself is the config's pretrained model."""
    generator = torch.Generator().manual_seed(3)
    state = load_file(world.root / "pretrained" / WEIGHTS)
    changed = {
        key: each + 0.5 * torch.randn(each.shape, generator=generator) if each.ndim == 2 else each
        for key, each in state.items()
    }
    folder = tmp_path / "own"
    shutil.copytree(world.root / "pretrained", folder)
    save_file(changed, folder / WEIGHTS)
    assert open_clip.create_model(f"local-dir:{folder}") is not None
    run = Commands(capsys)
    base = write_config(tmp_path / "base.yaml", config_data(world))
    own = write_config(tmp_path / "own.yaml", config_data(world, model=f"local-dir:{folder}"))

    def scores(*argv: object) -> Any:
        return json.loads(run.ok("eval", *argv, "--json").out)["tasks"]

    assert scores(base, "--model", folder / WEIGHTS) == scores(own)
    assert scores(own) != scores(base)
    # One of several models in a file, which is said.
    torch.save({"model": state, "model_ema": changed}, tmp_path / "x.pt")
    caplog.clear()
    assert scores(base, "--model", f"{tmp_path}/x.pt#model_ema") == scores(own)
    assert caplog.text == ""
    assert scores(base, "--model", tmp_path / "x.pt") == scores(base)
    assert "--model: of x.pt the model under model.visual.* is taken; it also" in caplog.text


def test_other_weights_reach_the_workers() -> None:
    config = ModelConfig(arch="local-dir:base").with_weights("x.pt#ema")
    assert pickle.loads(pickle.dumps(config)).other_weights == "x.pt#ema"


@pytest.mark.parametrize("reference", ["{}", "local-dir:{}", "{}#net", "{}/" + WEIGHTS + "#net"])
def test_a_merge_never_replaces_an_expert_however_it_is_named(
    world: World, tmp_path: Path, reference: str
) -> None:
    config = world.parse(output=tmp_path / "out")
    tasks = (config.tasks[0].model_copy(update={"checkpoint": reference.format(config.output)}),)
    resolved = resolve_model(config.model)
    with pytest.raises(UserError, match=f"holds {WEIGHTS}, which this merge reads"):
        check_separate_output(config.model_copy(update={"tasks": tasks}), resolved)
    check_separate_output(config, resolved)


def test_the_card_names_a_hub_model_without_its_part() -> None:
    for reference in ("hf-hub:ORG/NAME#net", "hf://ORG/NAME#net", "hf-hub:ORG/NAME"):
        match = _HUB_MODEL.match(reference)
        assert match is not None
        assert match[1] == "ORG/NAME"
