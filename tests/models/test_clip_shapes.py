"""Shapes without a module equal open_clip's, or are None."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import pytest
from world import MODEL_CFG

from raymerge.merging.layout import ParameterLayout
from raymerge.models.clip_shapes import clip_vit_shapes
from raymerge.models.pretrained import model_shapes
from raymerge.models.resolve import ResolvedModel
from raymerge.models.skeleton import build_skeleton

BUILTIN = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
ANSWERED = [name for name, cfg in BUILTIN.items() if clip_vit_shapes(cfg) is not None]


def _resolved(cfg: dict[str, Any]) -> ResolvedModel:
    return ResolvedModel("x", cfg, {}, Path("unused"), "")


def _shallow(cfg: dict[str, Any]) -> dict[str, Any]:
    """Return the architecture with two layers: tensors keep their shapes, and it builds fast."""
    cfg = deepcopy(cfg)
    cfg["vision_cfg"]["layers"] = cfg["text_cfg"]["layers"] = 2
    return cfg


def _assert_open_clips(cfg: dict[str, Any]) -> None:
    skeleton = build_skeleton(_resolved(cfg), "meta")
    expected = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}
    ours = clip_vit_shapes(cfg)
    assert ours is not None
    assert list(ours.items()) == list(expected.items())
    layout, shapes = model_shapes(_resolved(cfg))
    assert layout == ParameterLayout.of(skeleton.visual.state_dict())
    assert shapes == expected


@pytest.mark.parametrize("name", ANSWERED)
def test_names_order_and_shapes_are_open_clips(name):
    _assert_open_clips(_shallow(BUILTIN[name]))


def test_the_number_of_layers_follows_the_config():
    _assert_open_clips(BUILTIN["ViT-B-32"])
    _assert_open_clips(dict(MODEL_CFG))


def test_the_architectures_of_the_papers_have_shapes():
    papers = {"ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14", "ViT-H-14"}
    assert papers <= set(ANSWERED)


@pytest.mark.parametrize(
    "name",
    ["RN50", "convnext_base", "ViT-B-16-SigLIP", "coca_ViT-B-32", "roberta-ViT-B-32", "EVA02-B-16"],
)
def test_other_architectures_return_none(name):
    assert clip_vit_shapes(BUILTIN[name]) is None


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vision_cfg", "timm_model_name", "vit"),
        ("vision_cfg", "layers", [1, 1, 1, 1]),
        ("vision_cfg", "layers", True),
        ("vision_cfg", "layers", 0),
        ("vision_cfg", "image_size", [32, 32]),
        ("vision_cfg", "image_size", "32"),
        ("vision_cfg", "width", 64.0),
        ("vision_cfg", "patch_size", None),
        ("vision_cfg", "mlp_ratio", 4.9231),  # ViT-g-14
        ("vision_cfg", "no_ln_pre", False),
        ("text_cfg", "hf_model_name", "x"),
        ("text_cfg", "vocab_size", -1),
        ("text_cfg", "heads", True),
        ("text_cfg", "pad_id", 1),
        (None, "custom_text", True),
        (None, "embed_dim", "24"),
        (None, "embed_dim", None),
        (None, "vision_cfg", None),
        (None, "text_cfg", []),
    ],
)
def test_an_unexpected_setting_returns_none(section, key, value):
    cfg: dict[str, Any] = deepcopy(dict(MODEL_CFG))
    (cfg if section is None else cfg[section])[key] = value
    assert clip_vit_shapes(cfg) is None


@pytest.mark.parametrize(
    "keys",
    [("embed_dim",), ("vision_cfg",), ("vision_cfg", "width"), ("text_cfg", "vocab_size")],
)
def test_a_missing_size_returns_none(keys):
    cfg: dict[str, Any] = deepcopy(dict(MODEL_CFG))
    section = cfg
    for key in keys[:-1]:
        section = section[key]
    del section[keys[-1]]
    assert clip_vit_shapes(cfg) is None
