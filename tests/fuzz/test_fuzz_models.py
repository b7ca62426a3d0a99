"""Configs of model folders (open_clip's and Hugging Face's), LoRA adapters over a model, heads."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import ODD, Ground, json_bytes, json_files, mutants
from huggingface_world import clip_model, save
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import CONTAINERS, ClassificationHead, write_release
from safetensors.torch import save as packed
from world import MODEL_CFG, World

from raymerge.config import ModelConfig, TaskConfig
from raymerge.data.preprocess import make_preprocess
from raymerge.models.checkpoints.inspect import inspect_checkpoint
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint, open_visual
from raymerge.models.heads import saved_head
from raymerge.models.pretrained import open_pretrained
from raymerge.models.resolve import resolve_model
from raymerge.models.skeleton import build_skeleton, make_tokenizer

FEW = settings(max_examples=max(10, settings().max_examples // 10))
"""Building a model takes longer than reading a file."""


@pytest.fixture(scope="module")
def base(world: World) -> VisualCheckpoint:
    reference = f"local-dir:{world.root / 'pretrained'}"
    return open_pretrained(resolve_model(ModelConfig(arch=reference)))[0]


# --- configs -------------------------------------------------------------------------------------

OPEN_CLIP = {
    "model_cfg": {**MODEL_CFG, "quick_gelu": False},
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                       "resize_mode": "shortest", "mode": "RGB", "fill_color": 0},
}  # fmt: skip
MODEL_ODD = (
    *ODD, {"trust_remote_code": True}, {"layers": 10**9}, [10**9], "hf-hub:a/b", "timm", 3000,
    1 << 20, [700] * 4, [3] * 1000, {"depths": 10**5}, [[[10**4]] * 9] * 9,
)  # fmt: skip
with tempfile.TemporaryDirectory() as _folder:
    _saved = save(clip_model(), Path(_folder) / "clip")
    HF_CONFIG = json.loads((_saved / "config.json").read_text())
    HF_WEIGHTS = (_saved / "model.safetensors").read_bytes()
PREPROCESSOR = {
    "do_resize": True, "size": {"shortest_edge": 32}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


def build(folder: Path) -> None:
    resolved = resolve_model(ModelConfig(arch=f"local-dir:{folder}"))
    open_pretrained(resolved)
    inspect_checkpoint(str(folder))
    make_preprocess(build_skeleton(resolved, "meta").visual)


@FEW
@given(content=json_files(OPEN_CLIP, MODEL_ODD))
def test_open_clip_configs(ground: Ground, world: World, content: bytes) -> None:
    folder = ground.clean()
    weights = folder / "open_clip_model.safetensors"
    weights.symlink_to(world.root / "pretrained" / weights.name)
    (folder / "open_clip_config.json").write_bytes(content)
    ground.examine("open_clip configs", lambda: build(folder))


OWN_CODE = "own"
"""The folder of a tokenizer and a text tower with code of their own, beside the model."""
HUGGING_FACE_KEYS = ("hf_tokenizer_name", "hf_model_name", "tokenizer_kwargs", "hf_model_config")
HUGGING_FACE_VALUES = (OWN_CODE, OWN_CODE, {"trust_remote_code": True}, {"code": 1}, None, True)


def write_own_code(folder: Path, canary: Path) -> None:
    """Write a folder that transformers would ask to run."""
    auto_map = {name: ["code.T", "code.T"] for name in ("AutoTokenizer", "AutoConfig", "AutoModel")}
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w')\nclass T: pass\n")


@FEW
@given(
    extra=st.dictionaries(
        st.sampled_from(HUGGING_FACE_KEYS), st.sampled_from(HUGGING_FACE_VALUES), min_size=1
    )
)
def test_text_towers_of_hugging_face(ground: Ground, world: World, extra: dict[str, Any]) -> None:
    folder = ground.clean()
    weights = folder / "open_clip_model.safetensors"
    weights.symlink_to(world.root / "pretrained" / weights.name)
    write_own_code(folder / OWN_CODE, ground.canary)
    named = {key: str(folder / OWN_CODE) if v == OWN_CODE else v for key, v in extra.items()}
    model_cfg = {**MODEL_CFG, "text_cfg": {**MODEL_CFG["text_cfg"], **named}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))

    def read() -> None:
        make_tokenizer(resolve_model(ModelConfig(arch=f"local-dir:{folder}")))(["a photo"])
        build(folder)

    ground.examine("open_clip configs", read)


@FEW
@given(config=json_files(HF_CONFIG, MODEL_ODD), preprocessor=json_files(PREPROCESSOR))
def test_hugging_face_configs(ground: Ground, config: bytes, preprocessor: bytes) -> None:
    folder = ground.clean()
    (folder / "model.safetensors").write_bytes(HF_WEIGHTS)
    (folder / "config.json").write_bytes(config)
    ground.examine("Hugging Face configs", lambda: build(folder))
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    (folder / "preprocessor_config.json").write_bytes(preprocessor)
    ground.examine("Hugging Face configs", lambda: build(folder))


# --- LoRA ----------------------------------------------------------------------------------------

LAYER = "base_model.model.visual.transformer.resblocks.0.mlp.c_fc"
ADAPTER = {
    f"{LAYER}.lora_A.weight": torch.ones(4, 64),
    f"{LAYER}.lora_B.weight": torch.ones(256, 4),
}
ADAPTER_FILE = packed(ADAPTER)
ADAPTER_CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "fan_in_fan_out": False,
    "rank_pattern": {"c_fc": 4}, "alpha_pattern": {r".*\.c_fc": 8}, "init_lora_weights": True,
}  # fmt: skip
PATTERNS = ("(a+)+$", "(.*)*x", ".*.*.*.*.*.*y", "(?=x)", "[", "a{1,99999999}", "c_fc", r"(.)\1+")


@given(data=st.data())
def test_adapters(ground: Ground, base: VisualCheckpoint, data: st.DataObject) -> None:
    folder = ground.clean()
    config = data.draw(json_files(ADAPTER_CONFIG))
    if data.draw(st.booleans()):
        patterns = {pattern: data.draw(st.sampled_from(ODD)) for pattern in PATTERNS}
        chosen = data.draw(st.sampled_from(sorted(patterns)))
        config = json_bytes({**ADAPTER_CONFIG, "rank_pattern": {chosen: patterns[chosen]}})
    weights = ADAPTER_FILE if data.draw(st.booleans()) else data.draw(mutants([ADAPTER_FILE]))
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)

    def read() -> None:
        inspect_checkpoint(str(folder))
        open_visual(str(folder), base.layout, base).flat()

    ground.examine("LoRA adapters", read)


SLOW_PARTS = (".*", "a*", "(a|ab)", "(.|a.)", "a?", r"\d+", "a{0,9}", "b", ".")


@given(
    parts=st.lists(st.sampled_from(SLOW_PARTS), min_size=1, max_size=40),
    letters=st.sampled_from(("a", "a.", "ab", "0.a")),
    times=st.sampled_from((1, 30, 300, 3000)),
    section=st.sampled_from(("rank_pattern", "alpha_pattern")),
)
def test_patterns_over_long_names(
    ground: Ground, parts: list[str], letters: str, times: int, section: str
) -> None:
    folder = ground.clean()
    layer = f"base_model.model.{letters * times}.{LAYER.removeprefix('base_model.model.')}"
    state = {key.replace(LAYER, layer): each for key, each in ADAPTER.items()}
    (folder / "adapter_model.safetensors").write_bytes(packed(state))
    config = json_bytes({**ADAPTER_CONFIG, section: {"".join(parts): 4}})
    (folder / "adapter_config.json").write_bytes(config)
    ground.examine("LoRA adapters", lambda: inspect_checkpoint(str(folder)))


# --- heads ---------------------------------------------------------------------------------------

HEADS = [packed({"weight": torch.ones(3, 24), "bias": torch.zeros(3)})]
for _kind in CONTAINERS:
    with tempfile.TemporaryDirectory() as _folder:
        write_release(ClassificationHead(torch.ones(3, 24)), Path(_folder) / "h.pt", _kind)
        HEADS.append((Path(_folder) / "h.pt").read_bytes())
with tempfile.TemporaryDirectory() as _folder:
    _head = {"weight": torch.ones(3, 24), "bias": torch.zeros(1).expand(2**40)}
    torch.save(_head, Path(_folder) / "h.pt")
    HEADS.append((Path(_folder) / "h.pt").read_bytes())


@given(content=mutants(HEADS))
def test_heads(ground: Ground, content: bytes) -> None:
    path = ground.clean() / "head.pt"
    path.write_bytes(content)
    names = ("x", "y", "z")
    task = TaskConfig(name="a", checkpoint="x", classnames=names, head=str(path))
    ground.examine("heads", lambda: saved_head(task, "tasks[0]", 24))


@given(
    shape=st.lists(st.sampled_from((0, 1, 3, 24, 2**40)), max_size=3, unique=True),
    key=st.text(max_size=9),
)
def test_shapes_of_heads(ground: Ground, shape: list[int], key: str) -> None:
    path = ground.clean() / "head.pt"
    torch.save({"weight": torch.zeros(()).expand(shape), key: torch.zeros(1)}, path)
    task = TaskConfig(name="a", checkpoint="x", classnames=("x", "y", "z"), head=str(path))
    ground.examine("heads", lambda: saved_head(task, "tasks[0]", 24))
