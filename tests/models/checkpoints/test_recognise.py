"""Finding a model in a nest of dicts and prefixes, by the names that it must have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raymerge.errors import CheckpointError
from raymerge.merging.layout import ParameterLayout
from raymerge.models.checkpoints.inspect import inspect_checkpoint, inspection_text
from raymerge.models.checkpoints.locate import split_part
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.checkpoints.recognise import prefixes_of
from raymerge.models.checkpoints.visual_tower import match_visual

SHAPES = {"conv1.weight": (4, 3, 2, 2), "class_embedding": (4,), "ln_post.weight": (4,)}
LAYOUT = ParameterLayout(tuple(SHAPES), tuple(SHAPES.values()))


def _tower(prefix: str = "visual.", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix + name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()
    }


def _optimizer(state: dict[str, Tensor]) -> dict[str, Any]:
    moments = {
        k: {"step": torch.tensor(3.0), "exp_avg": each} for k, each in enumerate(state.values())
    }
    return {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}


def _module() -> nn.Module:
    """A module of torch's own classes with the tower's names, to be pickled whole."""
    module = nn.Module()
    module.visual = nn.Module()
    for name, tensor in _tower("").items():
        first, _, leaf = name.rpartition(".")
        parent = module.visual
        if first:
            parent.add_module(first, nn.Module())
            parent = parent.get_submodule(first)
        parent.register_parameter(leaf, nn.Parameter(tensor))
    return module


NESTS: dict[str, Callable[[], Any]] = {
    "plain": _tower,
    "compiled": lambda: _tower("_orig_mod.visual."),
    "parallel and compiled": lambda: _tower("module._orig_mod.visual."),
    "Lightning": lambda: {
        "epoch": 3,
        "state_dict": _tower("model.clip.visual."),
        "optimizer_states": [_optimizer(_tower())],
        "hyper_parameters": {"lr": 0.1},
    },
    "model beside its average": lambda: {
        "model_ema": _tower(seed=1),
        "model": _tower(),
        "epoch": 2,
    },
    "model beside an optimizer": lambda: {
        "model": _tower(),
        "optimizer": _optimizer(_tower()),
        "epoch": 1,
    },
    "timm": lambda: {"state_dict": _tower(), "state_dict_ema": _tower(seed=1)},
    "deep": lambda: {"a": {"b": {"c": {"d": _tower("net.")}}}, "e": torch.ones(2)},
    "a pickled module in a dict": lambda: {"model": _module(), "epoch": 1},
    "a list": lambda: [_tower(), {"lr": 0.1}],
    "a tuple in a dict": lambda: {"models": (_tower(), _tower("ema.", seed=1)), "epoch": 1},
    "beside an optimizer that cannot be read": lambda: {
        "model": _tower(),
        "optimizer": {"state": {0: {"exp_avg": torch.eye(3).to_sparse()}}},
    },
    "student and teacher": lambda: {"teacher": _tower(seed=1), "student": _tower()},
}


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_the_tower_of_any_nest_is_the_plain_one(tmp_path: Path, nest: str, zipped: bool) -> None:
    torch.save(NESTS[nest](), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    opened = match_visual(open_checkpoint(tmp_path / "x.pt"), LAYOUT)
    expected = torch.cat([each.flatten() for each in _tower("").values()])
    assert torch.equal(_numbers(opened.flat()), _numbers(expected))


def _numbers(values: Tensor) -> Tensor:
    return values[values != 0].sort().values


def test_what_was_chosen_among_several_is_said_and_can_be_named(tmp_path: Path) -> None:
    torch.save(NESTS["model beside its average"](), tmp_path / "x.pt")
    opened = match_visual(open_checkpoint(tmp_path / "x.pt"), LAYOUT)
    assert (opened.prefix, opened.others) == ("model.visual.", ("model_ema.visual.",))
    text = inspection_text(inspect_checkpoint(str(tmp_path / "x.pt")))
    assert "keys model.visual.*; also model_ema.visual.*" in text
    average = match_visual(open_checkpoint(f"{tmp_path}/x.pt#model_ema"), LAYOUT)
    expected = torch.cat([each.flatten() for each in _tower("", seed=1).values()])
    assert torch.equal(_numbers(average.flat()), _numbers(expected))
    with pytest.raises(
        CheckpointError, match=r"#'model_emma' is unknown; did you mean model_ema\?"
    ):
        open_checkpoint(f"{tmp_path}/x.pt#model_emma")


def test_a_file_whose_name_has_a_hash_is_that_file(tmp_path: Path) -> None:
    torch.save(_tower(), tmp_path / "run#3")
    assert "visual.class_embedding" in open_checkpoint(tmp_path / "run#3").specs


def test_a_dict_that_holds_itself_ends(tmp_path: Path) -> None:
    state: dict[str, Any] = dict(_tower())
    state["self"] = state
    torch.save(state, tmp_path / "x.pt")
    assert set(open_checkpoint(tmp_path / "x.pt").specs) == set(_tower())


def test_the_prefix_with_the_most_names_comes_first_and_averages_last():
    names = ("a", "b.c")
    assert prefixes_of(["x.a", "y.a", "y.b.c", "a"], names) == ["y."]
    assert prefixes_of(["ema.a", "ema.b.c", "z.a", "z.b.c"], names) == ["z.", "ema."]
    assert prefixes_of(["semantic.a", "net.a"], names) == ["semantic.", "net."]
    assert prefixes_of(["q"], names) == []


def test_a_long_key_of_many_dots_costs_its_length():
    key = "a." * (1 << 20) + "b"
    assert prefixes_of([key], ("b", "c.d")) == [key[:-1]]


def test_a_hash_in_a_folder_names_no_part():
    assert split_part("run#3/x.pt") == ("run#3/x.pt", "")
    assert split_part("run#3/x.pt#model.clip") == ("run#3/x.pt", "model.clip")
    assert split_part("hf://ORG/NAME/x.pt#ema") == ("hf://ORG/NAME/x.pt", "ema")


@pytest.mark.parametrize("part", ["model", "model.net", "model.net.visual"])
def test_the_only_part_of_a_file_can_be_named(tmp_path: Path, part: str) -> None:
    torch.save({"model": {"net": _tower(), "temperature": 3}, "epoch": 1}, tmp_path / "x.pt")
    opened = match_visual(open_checkpoint(f"{tmp_path}/x.pt#{part}"), LAYOUT)
    expected = torch.cat([each.flatten() for each in _tower("").values()])
    assert torch.equal(_numbers(opened.flat()), _numbers(expected))
    with pytest.raises(CheckpointError, match="#'mode' is unknown"):
        open_checkpoint(f"{tmp_path}/x.pt#mode")
