"""A model's own config runs no code of its author, and its numbers are bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
from commands import Commands, config_data, refused, write_config
from world import MODEL_CFG, World

from raymerge.config import ModelConfig
from raymerge.errors import CheckpointError
from raymerge.models.resolve import resolve_folder, resolve_model
from raymerge.models.skeleton import _inside_open_clip

CODE = "import pathlib; pathlib.Path({!r}).touch()\nclass T: pass\n"


def write_folder(folder: Path, world: World, cfg: dict[str, Any]) -> Path:
    folder.mkdir()
    weights = "open_clip_model.safetensors"
    (folder / weights).symlink_to(world.root / "pretrained" / weights)
    (folder / "open_clip_config.json").write_text(json.dumps(cfg))
    return folder


def with_text(**changes: Any) -> dict[str, Any]:
    return {"model_cfg": {**MODEL_CFG, "text_cfg": {**MODEL_CFG["text_cfg"], **changes}}}


def test_a_model_with_code_is_refused_before_it_runs(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """open_clip passes tokenizer_kwargs to transformers, which would import the file beside it."""
    cfg = with_text(hf_tokenizer_name="x", tokenizer_kwargs={"trust_remote_code": True})
    folder = write_folder(tmp_path / "model", world, cfg)
    (folder / "tokenization.py").write_text(CODE.format(str(tmp_path / "canary")))
    auto_map = {"AutoTokenizer": ["tokenization.T", None]}
    tokenizer_config = {"tokenizer_class": "T", "auto_map": auto_map}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    data = config_data(world, model=f"local-dir:{folder}", output=str(tmp_path / "out"))
    for command in ("plan", "merge", "eval"):
        ran = Commands(capsys)(command, write_config(tmp_path / "c.yaml", data))
        refused(ran, "trust_remote_code", "runs code that comes with the model")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("key", ["hf_tokenizer_name", "hf_model_name"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_with_code_of_its_own_is_refused_by_name(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, file: str
) -> None:
    """transformers would ask on the terminal whether to run it."""
    own = tmp_path / "tokenizer"
    own.mkdir()
    (own / "code.py").write_text(CODE.format(str(tmp_path / "canary")))
    (own / file).write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.T", None]}}))
    folder = write_folder(tmp_path / "model", world, with_text(**{key: str(own)}))
    data = config_data(world, model=f"local-dir:{folder}", output=str(tmp_path / "out"))
    for command in ("plan", "merge", "eval"):
        ran = Commands(capsys)(command, write_config(tmp_path / "c.yaml", data))
        refused(ran, key, "code of its own", "never run")
    assert not (tmp_path / "canary").exists()


def test_transformers_does_not_ask_while_open_clip_builds(world: World, tmp_path: Path) -> None:
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    folder = write_folder(tmp_path / "model", world, with_text(hf_tokenizer_name="none/such"))
    with _inside_open_clip(resolve_folder(folder)):
        assert dynamic_module_utils.TIME_OUT_REMOTE_CODE == 0
    assert dynamic_module_utils.TIME_OUT_REMOTE_CODE == seconds > 0


def test_a_config_of_more_layers_than_the_weights_can_hold_is_refused(
    world: World, tmp_path: Path
) -> None:
    vision = {**MODEL_CFG["vision_cfg"], "layers": [900, 900, 900, 900]}
    folder = write_folder(tmp_path / "model", world, {**MODEL_CFG, "vision_cfg": vision})
    weights = folder / "open_clip_model.safetensors"
    weights.unlink()
    weights.write_bytes(bytes(8))
    with pytest.raises(CheckpointError, match=r"has 901 layers, and .* too small for more than 64"):
        resolve_folder(folder)


@pytest.mark.parametrize("where", ["model_cfg", "vision_cfg", "deep"])
def test_trust_remote_code_is_detected_at_any_depth(
    world: World, tmp_path: Path, where: str
) -> None:
    remote_code = {"trust_remote_code": True}
    model_cfg: dict[str, Any] = {**MODEL_CFG}
    if where == "model_cfg":
        model_cfg |= remote_code
    else:
        vision = {"kwargs": [{"x": remote_code}]} if where == "deep" else remote_code
        model_cfg["vision_cfg"] = {**MODEL_CFG["vision_cfg"], **vision}
    folder = write_folder(tmp_path / "model", world, {"model_cfg": model_cfg})
    with pytest.raises(CheckpointError, match="refused: its config has trust_remote_code"):
        resolve_folder(folder, "m")


@pytest.mark.parametrize(
    ("key", "value"),
    [("layers", 10**9), ("context_length", 10**6), ("width", 10**12), ("layers", [1, 10**9])],
)
def test_sizes_beyond_any_model_are_refused(
    world: World, tmp_path: Path, key: str, value: object
) -> None:
    folder = write_folder(tmp_path / "model", world, with_text(**{key: value}))
    with pytest.raises(CheckpointError, match=rf"its config has {key} \d+; at most [\d,]+ is "):
        resolve_model(ModelConfig(arch=f"local-dir:{folder}"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mode", "CMYK"),
        ("mean", True),
        ("mean", [0.5]),
        ("std", [0.5, 0.5, 0]),
        ("interpolation", "nearest"),
        ("resize_mode", []),
        ("fill_color", "red"),
    ],
)
def test_preprocessing_that_open_clip_lacks_is_refused(
    world: World, tmp_path: Path, key: str, value: object
) -> None:
    cfg = {"model_cfg": MODEL_CFG, "preprocess_cfg": {key: value}}
    folder = write_folder(tmp_path / "model", world, cfg)
    with pytest.raises(CheckpointError, match=rf"model: m: preprocess_cfg\.{key}: .+"):
        resolve_folder(folder, "m")


def test_every_model_of_open_clip_passes(tmp_path: Path, world: World) -> None:
    for number, (arch, tag) in enumerate(open_clip.list_pretrained()):
        cfg = {
            "model_cfg": open_clip.get_model_config(arch),
            "preprocess_cfg": open_clip.get_pretrained_cfg(arch, tag),
        }
        resolve_folder(write_folder(tmp_path / str(number), world, cfg), arch)
