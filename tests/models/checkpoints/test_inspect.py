"""``raymerge inspect`` describes a checkpoint from its header."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from raymerge.models.checkpoints.inspect import inspect_checkpoint, inspection_text


@pytest.fixture
def vit() -> dict[str, torch.Tensor]:
    """Return a ViT's names and shapes: width 8, patch 4, 3 × 3 patches, 2 blocks."""
    state = {
        "visual.class_embedding": torch.zeros(8),
        "visual.positional_embedding": torch.zeros(10, 8),
        "visual.conv1.weight": torch.zeros(8, 3, 4, 4),
        "visual.transformer.resblocks.0.ln_1.weight": torch.zeros(8),
        "visual.transformer.resblocks.1.ln_1.weight": torch.zeros(8),
    }
    return {
        **state,
        "logit_scale": torch.zeros(()),
        "visual.steps": torch.zeros(2, dtype=torch.int64),
    }


def test_dimensions_come_from_the_shapes(tmp_path, vit):
    save_file(vit, tmp_path / "x.safetensors")
    inspection = inspect_checkpoint(str(tmp_path / "x.safetensors"))
    visual = inspection["visual"]
    assert visual["prefix"] == "visual."
    dimensions = {key: visual[key] for key in ("width", "patch", "layers", "image_size")}
    assert dimensions == {"width": 8, "patch": 4, "layers": 2, "image_size": 12}
    assert inspection["format"] == "safetensors"
    assert inspection["tensors"] == 7
    assert inspection["parameters"] == 8 + 80 + 8 * 48 + 8 + 8 + 1 + 2
    assert inspection["dtypes"] == {"float32": 6, "int64": 1}
    assert inspection["bytes"] == (tmp_path / "x.safetensors").stat().st_size
    assert inspection["keys"]["visual.conv1.weight"] == {"shape": [8, 3, 4, 4], "dtype": "float32"}
    json.dumps(inspection)


@pytest.mark.parametrize("prefix", ["", "module.visual.", "model.visual."])
def test_the_prefix_is_detected(tmp_path, vit, prefix):
    state = {prefix + key.removeprefix("visual."): t for key, t in vit.items()}
    torch.save(state, tmp_path / "x.pt")
    inspection = inspect_checkpoint(str(tmp_path / "x.pt"))
    assert inspection["format"] == "torch"
    assert inspection["visual"]["prefix"] == prefix
    assert inspection["visual"]["layers"] == 2


def test_a_tower_without_blocks_or_positions(tmp_path, vit):
    state = {key: each for key, each in vit.items() if "resblocks" not in key}
    save_file({**state, "visual.positional_embedding": torch.zeros(0, 8)}, tmp_path / "x.pt")
    inspection = inspect_checkpoint(str(tmp_path / "x.pt"))
    assert (inspection["visual"]["layers"], inspection["visual"]["image_size"]) == (0, 0)
    assert "0 layers" in inspection_text(inspection)


def test_a_file_without_a_visual_tower(tmp_path):
    save_file({"bert.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    inspection = inspect_checkpoint(str(tmp_path / "x.safetensors"))
    assert inspection["visual"] is None
    assert "none with open_clip's names" in inspection_text(inspection)


@pytest.mark.parametrize(("quick", "name"), [(True, "QuickGELU"), (False, "GELU")])
def test_the_activation_comes_from_the_config_beside_the_weights(tmp_path, vit, quick, name):
    save_file(vit, tmp_path / "open_clip_model.safetensors")
    cfg = {"model_cfg": {"quick_gelu": quick, "vision_cfg": {}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(cfg))
    assert inspect_checkpoint(str(tmp_path))["activation"] == name


def test_without_a_config_the_activation_is_not_guessed(tmp_path, vit):
    save_file(vit, tmp_path / "x.safetensors")
    assert "not recorded" in inspect_checkpoint(str(tmp_path / "x.safetensors"))["activation"]


def test_the_text_lists_the_first_keys_and_counts_the_rest(tmp_path, vit):
    save_file(vit, tmp_path / "x.safetensors")
    inspection = inspect_checkpoint(str(tmp_path / "x.safetensors"))
    text = inspection_text(inspection, keys=3)
    assert "ViT, width 8, 2 layers, patch 4, 12 px" in text
    assert sum(key in text for key in inspection["keys"]) == 3
    assert "and 4 more" in text


@pytest.mark.parametrize("content", ["[]", '{"model_cfg": []}', '{"model_cfg": null}', "3"])
def test_a_malformed_config_beside_the_weights_is_ignored(tmp_path, vit, content):
    save_file(vit, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(content)
    assert inspect_checkpoint(str(tmp_path))["activation"] == "GELU"
