"""A tower in any nest of dicts, lists and prefixes; files that only look like checkpoints."""

from __future__ import annotations

import pickle
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from fuzzing import Ground, mutants
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raymerge.merging.layout import ParameterLayout
from raymerge.models.checkpoints.foreign import _MAGIC, _SUFFIXES
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.checkpoints.visual_tower import match_visual

SHAPES = {"conv1.weight": (2, 3, 2, 2), "class_embedding": (2,), "transformer.0.ln_1.bias": (2,)}
LAYOUT = ParameterLayout(tuple(SHAPES), tuple(SHAPES.values()))
NAMES = ("model", "_orig_mod", "module", "net.clip", "state_dict", "é", "0", "#", " ", "x" * 99)
OTHERS = ("optimizer", "epoch", "ema", "args", "visual", "head", "conv1", "rng")


def _tower(seed: int = 0, most: int = len(SHAPES)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
    return dict(list(tensors.items())[:most])


def _prefixed(value: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}.{key}": each for key, each in value.items()}


# What stands beside a model: no whole copy of it.
BESIDE = st.sampled_from(
    (
        3,
        None,
        torch.ones(3),
        torch.ones(()),
        [torch.ones(2)],
        {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]},
        _tower(1, most=2),
        {"deep": {"visual": _tower(2, most=1)}},
        defaultdict(list, {"a": [1]}),
        {"attr": (1, 2), "b": {3, 4}},
    )
)


@st.composite
def nests(draw: st.DrawFn) -> Any:
    """Return the tower in a few wrappers, with other things beside it at every level."""
    value: Any = _tower()
    for _ in range(draw(st.integers(0, 6))):
        kind, name = draw(st.sampled_from("pdol")), draw(st.sampled_from(NAMES))
        if kind == "p" and isinstance(value, dict):
            value = _prefixed(value, name)
            continue
        beside = draw(st.dictionaries(st.sampled_from(OTHERS), BESIDE, max_size=3))
        if kind == "l":
            value = draw(st.permutations([value, *beside.values()]))
        else:
            entries = draw(st.permutations([(name, value), *beside.items()]))
            value = (OrderedDict if kind == "o" else dict)(entries)
    return value


@given(value=nests(), container=st.sampled_from(("zip", "stream", "pickle")))
def test_the_tower_of_any_nest_is_found(ground: Ground, value: Any, container: str) -> None:
    path = ground.clean() / "x.pt"
    if container == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=container == "zip")

    def read() -> None:
        opened = match_visual(open_checkpoint(path), LAYOUT)
        assert opened.others == ()
        for name, tensor in LAYOUT.views(opened.flat()).items():
            assert torch.equal(tensor, _tower()[name])

    ground.examine("nests", read)


HEADS = (*(magic for magic, _, _ in _MAGIC), b"<!doctype html>", b"{}", b"Not found", b"PK\3\4")


@given(
    data=mutants([head + bytes(64) for head in HEADS]),
    suffix=st.sampled_from((".pt", ".safetensors", "", *_SUFFIXES)),
)
def test_files_that_look_like_others(ground: Ground, data: bytes, suffix: str) -> None:
    path = ground.clean() / f"x{suffix}"
    path.write_bytes(data)
    ground.examine("files of other kinds", lambda: open_checkpoint(path))
