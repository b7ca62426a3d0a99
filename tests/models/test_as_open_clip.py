"""A base that open_clip loads is a base here, with the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.factory import load_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from world import MODEL_CFG, World

from raymerge.config import ModelConfig
from raymerge.errors import CheckpointError
from raymerge.models.pretrained import open_pretrained, unmerged_tensors
from raymerge.models.resolve import resolve_model

State = dict[str, Tensor]
SIDE = MODEL_CFG["vision_cfg"]["image_size"] // MODEL_CFG["vision_cfg"]["patch_size"]
WIDTH = MODEL_CFG["vision_cfg"]["width"]


def _positions(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


CHANGES: dict[str, Callable[[State], object]] = {
    "as it is": lambda s: s,
    "parallel": lambda s: {f"module.{key}": each for key, each in s.items()},
    "nested": lambda s: {"state_dict": s, "epoch": 3, "name": "x", "optimizer": {"state": {}}},
    "a scale of shape [1]": lambda s: {**s, "logit_scale": s["logit_scale"].reshape(1)},
    "a finer grid": lambda s: {
        **s,
        "visual.positional_embedding": _positions((2 * SIDE) ** 2 + 1, WIDTH),
    },
    "a coarser grid": lambda s: {**s, "visual.positional_embedding": _positions(1 + 1, WIDTH)},
    "longer texts": lambda s: {
        **s,
        "positional_embedding": _positions(99, s["positional_embedding"].shape[1]),
    },
}
WRAPPED: dict[str, Callable[[State], object]] = {
    "compiled": lambda s: {f"_orig_mod.{key}": each for key, each in s.items()},
    "Lightning": lambda s: {"state_dict": {f"net.{k}": v for k, v in s.items()}, "epoch": 1},
    "an average beside": lambda s: {
        "model_ema": {k: v + 1 if v.is_floating_point() else v for k, v in s.items()},
        "model": s,
    },
    "a nest": lambda s: {"a": {"model.clip": s}, "optimizer": {"state": {0: torch.ones(3)}}},
}


def _ours(state: object, folder: Path, cfg: object = MODEL_CFG) -> State:
    """The whole model as raymerge reads it."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "weights.pt")
    (folder / "model.json").write_text(json.dumps(cfg))
    config = ModelConfig(arch=str(folder / "model.json"), pretrained=str(folder / "weights.pt"))
    pretrained, _ = open_pretrained(resolve_model(config))
    theta_P, layout = pretrained.flat(), pretrained.layout
    tower = {
        f"visual.{name}": theta_P[start : start + shape.numel()].view(shape)
        for name, shape, start in zip(
            layout.names, map(torch.Size, layout.shapes), layout.offsets, strict=False
        )
    }
    return {**tower, **dict(unmerged_tensors(pretrained))}


def _same(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    for key, each in theirs.items():
        torch.testing.assert_close(ours[key], each, rtol=1e-6, atol=1e-6)


def _skeleton(folder: Path, cfg: object = MODEL_CFG) -> torch.nn.Module:
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": cfg, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return open_clip.create_model(f"local-dir:{folder}", load_weights=False)


@pytest.mark.parametrize("change", CHANGES)
def test_what_open_clip_loads_is_a_base_with_the_same_weights(
    world: World, tmp_path: Path, change: str
) -> None:
    state = CHANGES[change](load_file(world.root / "pretrained" / "open_clip_model.safetensors"))
    ours = _ours(state, tmp_path / "ours")
    model = _skeleton(tmp_path / "theirs")
    load_checkpoint(model, str(tmp_path / "ours" / "weights.pt"), strict=True)
    _same(ours, model.state_dict())


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_wrapped_base_is_the_plain_one(world: World, tmp_path: Path, wrap: str) -> None:
    state = load_file(world.root / "pretrained" / "open_clip_model.safetensors")
    _same(_ours(WRAPPED[wrap](state), tmp_path / "ours"), state)


def test_names_of_before_the_custom_text_tower_are_moved(world: World, tmp_path: Path) -> None:
    cfg = {**MODEL_CFG, "custom_text": True}
    state = load_file(world.root / "pretrained" / "open_clip_model.safetensors")
    ours = _ours(state, tmp_path / "ours", cfg)
    model = _skeleton(tmp_path / "theirs", cfg)
    load_checkpoint(model, str(tmp_path / "ours" / "weights.pt"), strict=True)
    _same(ours, model.state_dict())


@pytest.mark.parametrize("image_size", [[16, 32], [64, 32], 32])
def test_positions_become_those_of_any_shape_of_images(
    world: World, tmp_path: Path, image_size: Any
) -> None:
    cfg = {**MODEL_CFG, "vision_cfg": {**MODEL_CFG["vision_cfg"], "image_size": image_size}}
    state = load_file(world.root / "pretrained" / "open_clip_model.safetensors")
    state["visual.positional_embedding"] = _positions(5 * 5 + 1, WIDTH)
    ours = _ours(state, tmp_path / "ours", cfg)
    model = _skeleton(tmp_path / "theirs", cfg)
    load_checkpoint(model, str(tmp_path / "ours" / "weights.pt"), strict=True)
    _same(ours, model.state_dict())


@pytest.mark.parametrize("name", ["weights.pth", "epoch_3.bin", "my.safetensors"])
def test_a_folder_with_weights_of_any_name_is_what_open_clip_takes(
    world: World, tmp_path: Path, name: str
) -> None:
    state = load_file(world.root / "pretrained" / "open_clip_model.safetensors")
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (save_file if name.endswith(".safetensors") else torch.save)(state, tmp_path / name)
    assert open_clip.create_model(f"local-dir:{tmp_path}") is not None
    assert resolve_model(ModelConfig(arch=f"local-dir:{tmp_path}")).weights == tmp_path / name


def test_positions_that_are_no_square_are_refused(world: World, tmp_path: Path) -> None:
    state = load_file(world.root / "pretrained" / "open_clip_model.safetensors")
    state["visual.positional_embedding"] = torch.zeros(7, WIDTH)
    with pytest.raises(CheckpointError, match="7 positions, no class token and square grid"):
        _ours(state, tmp_path / "ours")


@pytest.mark.parametrize("image_size", [1 << 24, 1 << 16, [16, 1 << 24]])
def test_positions_for_enormous_images_are_refused(
    world: World, tmp_path: Path, image_size: object
) -> None:
    """A small file would ask for gigabytes, or more than any memory."""
    state = load_file(world.root / "pretrained" / "open_clip_model.safetensors")
    vision = {**MODEL_CFG["vision_cfg"], "image_size": image_size}
    with pytest.raises(CheckpointError, match="positional_embedding has shape"):
        _ours(state, tmp_path / "x", {**MODEL_CFG, "vision_cfg": vision})


@pytest.mark.parametrize("dtype", [torch.complex128, torch.uint16, torch.float8_e4m3fnuz])
def test_a_number_type_that_cannot_be_written_is_refused_at_once(
    world: World, tmp_path: Path, dtype: torch.dtype
) -> None:
    state = load_file(world.root / "pretrained" / "open_clip_model.safetensors")
    state["ln_final.weight"] = torch.zeros_like(state["ln_final.weight"]).to(dtype)
    if dtype == torch.uint16:  # safetensors holds it, so it passes through
        assert _ours(state, tmp_path / "ours")["ln_final.weight"].dtype == dtype
        return
    with pytest.raises(CheckpointError, match=f"ln_final.weight' is {dtype}.*save it as float32"):
        _ours(state, tmp_path / "ours")
