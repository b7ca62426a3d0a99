"""Hugging Face's CLIP under open_clip's names: bit for bit, and the same logits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import open_clip
import pytest
import torch
from commands import Commands, refused
from huggingface_world import (
    PREPROCESSOR,
    as_version_4,
    as_version_5,
    clip_model,
    edit,
    open_clip_state,
    save,
    save_state,
    stored,
    vision_model,
)
from safetensors.torch import save_file
from world import World, make_world, write_model

from raymerge.config import ModelConfig
from raymerge.data.preprocess import make_preprocess
from raymerge.errors import CheckpointError
from raymerge.models.checkpoints.checkpoint import Checkpoint, read_tensor
from raymerge.models.checkpoints.huggingface import (
    HuggingFaceCheckpoint,
    open_clip_name,
    stored_keys,
)
from raymerge.models.checkpoints.huggingface_config import read_huggingface
from raymerge.models.checkpoints.inspect import inspect_checkpoint, inspection_text
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint, open_visual
from raymerge.models.pretrained import model_shapes, open_pretrained
from raymerge.models.resolve import resolve_model
from raymerge.models.skeleton import build_skeleton
from raymerge.runs.merge import merge

SHARD_BYTES = 100_000


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(clip_model(), tmp_path_factory.mktemp("hf") / "clip")


def resolved(folder: Path):
    return resolve_model(ModelConfig(arch=f"local-dir:{folder}"))


def pretrained(folder: Path) -> VisualCheckpoint:
    return open_pretrained(resolved(folder))[0]


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: read_tensor(checkpoint, name) for name in checkpoint.specs}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


# --- names and packing ---------------------------------------------------------------------------


def test_names_and_keys_are_inverse(clip: Path) -> None:
    names = model_shapes(resolved(clip))[1]
    for prefix in ("vision_model.", ""):
        for name in names:
            stored = stored_keys(name, prefix)
            assert stored is not None, name
            assert {open_clip_name(key, prefix) for key in stored.keys} == {name}


def test_a_whole_model_is_packed_bit_for_bit(clip: Path) -> None:
    checkpoint = open_checkpoint(clip)
    assert isinstance(checkpoint, HuggingFaceCheckpoint)
    assert_equal(tensors(checkpoint), open_clip_state(clip_model()))


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("layout", [as_version_4, as_version_5])
@pytest.mark.parametrize("root", ["", "module."])
def test_a_vision_model_in_both_layouts(tmp_path, projection, layout, root) -> None:
    model = vision_model(1, projection=projection)
    config = save(model, tmp_path / "own")
    state = {root + key: tensor for key, tensor in layout(stored(config)).items()}
    checkpoint = open_checkpoint(save_state(state, config, tmp_path / "renamed"))
    assert_equal(tensors(checkpoint), open_clip_state(model))


def test_any_columns_of_a_packed_or_transposed_tensor(clip: Path) -> None:
    checkpoint = open_checkpoint(clip)
    for name in ("visual.transformer.resblocks.1.attn.in_proj_weight", "visual.proj"):
        whole_n = read_tensor(checkpoint, name).reshape(-1)
        third = len(whole_n) // 3
        for start, stop in ((0, 5), (third - 3, third + 4), (2 * third - 1, len(whole_n)), (7, 8)):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                part_n = torch.empty(stop - start, dtype=dtype)
                checkpoint.fill(name, start, part_n)
                assert torch.equal(part_n, whole_n[start:stop].to(dtype))


def test_half_precision_is_preserved(tmp_path) -> None:
    folder = save(clip_model().half(), tmp_path / "half")
    actual = tensors(open_checkpoint(folder))
    assert_equal(actual, {k: t.half() for k, t in open_clip_state(clip_model()).items()})


def test_torch_files_open_too(tmp_path, clip: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    torch.save(stored(clip), folder / "pytorch_model.bin")
    (folder / "config.json").write_text((clip / "config.json").read_text())
    assert_equal(tensors(open_checkpoint(folder)), open_clip_state(clip_model()))
    assert pretrained(folder).prefix == "visual."


def test_q_k_and_v_belong_together(tmp_path, clip: Path) -> None:
    state = stored(clip)
    del state["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.bias missing"):
        open_checkpoint(save_state(state, clip, tmp_path / "x"))
    state = stored(clip)
    state["vision_model.encoder.layers.0.self_attn.v_proj.weight"] = torch.zeros(64, 3)
    with pytest.raises(CheckpointError, match=r"cannot be packed: .*v_proj.weight \[64, 3\]"):
        open_checkpoint(save_state(state, clip, tmp_path / "y"))


def test_a_tensor_without_a_name_in_open_clip_is_unexpected(tmp_path, clip: Path) -> None:
    state = {**stored(clip), "vision_model.encoder.gate": torch.ones(3)}
    folder = save_state(state, clip, tmp_path / "x")
    layout = pretrained(clip).layout
    with pytest.raises(CheckpointError, match=r"1 unexpected \(visual\.encoder\.gate\)"):
        open_visual(str(folder), layout)
    with pytest.raises(CheckpointError, match=r"architecture: 1 unexpected \(visual\.encoder\.g"):
        pretrained(folder)


# --- experts -------------------------------------------------------------------------------------


def test_a_tower_without_a_projection_takes_the_pretrained_one(tmp_path, clip: Path) -> None:
    base = pretrained(clip)
    expert = vision_model(3)
    folder = save(expert, tmp_path / "expert")
    with pytest.raises(CheckpointError, match=r"1 missing \(visual\.proj\)"):
        open_visual(str(folder), base.layout)
    opened = open_visual(str(folder), base.layout, base)
    expected = {
        **open_clip_state(expert),
        "visual.proj": open_clip_state(clip_model())["visual.proj"],
    }
    flat = base.layout.views(opened.flat())
    assert all(torch.equal(flat[name], expected[f"visual.{name}"]) for name in base.layout.names)


def test_the_expert_keeps_its_own_projection(tmp_path, clip: Path) -> None:
    base, expert = pretrained(clip), vision_model(3, projection=True)
    opened = open_visual(str(save(expert, tmp_path / "x")), base.layout, base)
    expected = open_clip_state(expert)["visual.proj"]
    assert torch.equal(base.layout.views(opened.flat())["proj"], expected)


# --- shards --------------------------------------------------------------------------------------


def test_shards_are_one_checkpoint(tmp_path) -> None:
    folder = save(clip_model(), tmp_path / "sharded", max_shard_size=SHARD_BYTES)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert_equal(tensors(open_checkpoint(folder)), open_clip_state(clip_model()))
    assert pretrained(folder).prefix == "visual."
    inspection = inspect_checkpoint(str(folder))
    assert inspection["container"] == "sharded safetensors"
    assert inspection["bytes"] > 4 * sum(p.numel() for p in clip_model().parameters())


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "../model.safetensors"}, r"refused: its weight_map names '\.\./model"),
        ({"x": "absent.safetensors"}, r"absent\.safetensors is missing beside it"),
        ({}, "has no weight_map"),
        ({"x": "model-1.safetensors"}, r"says that x is in model-1\.safetensors, which does not"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, weight_map, message) -> None:
    save_file({"y": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


# --- as the pretrained model ---------------------------------------------------------------------

CONFIGS = {
    "plain": {},
    "gelu": {"vision": {"hidden_act": "gelu"}, "text": {"hidden_act": "gelu"}},
    "wide": {"vision": {"intermediate_size": 200}, "text": {"intermediate_size": 97}},
    "eps": {"vision": {"layer_norm_eps": 1e-3}, "text": {"layer_norm_eps": 1e-2}},
    "heads": {"vision": {"num_attention_heads": 4}, "text": {"num_attention_heads": 4}},
    "old end": {"text": {"eos_token_id": 2}},
    "other end": {"text": {"eos_token_id": 320}},
}


@pytest.mark.parametrize("name", list(CONFIGS))
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path, name) -> None:
    theirs = clip_model(5, **CONFIGS[name])
    folder = save(theirs, tmp_path / "clip")
    model = resolved(folder)
    ours = build_skeleton(model)
    ours.load_state_dict(tensors(open_pretrained(model)[0].checkpoint), strict=True)
    ours.eval()
    texts = open_clip.get_tokenizer("ViT-B-32", context_length=16)(["a dog", "two small cats, a 1"])
    image = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    image_features, text_features, scale = ours(image, texts)
    logits = scale * image_features @ text_features.t()
    expected = theirs(input_ids=texts, pixel_values=image).logits_per_image
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1


def test_images_are_prepared_as_the_folder_says(tmp_path) -> None:
    import numpy as np
    from PIL import Image
    from transformers import CLIPImageProcessor

    folder = save(clip_model(), tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    preprocess = make_preprocess(build_skeleton(resolved(folder), "meta").visual)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 57, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    ours = preprocess.normalise(preprocess.to_pixels(image)[None])
    theirs = CLIPImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    assert (ours - theirs).abs().max() < 0.05  # two libraries resize within one level of 255
    assert preprocess.mean == (0.5, 0.4, 0.3)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "config.json",
            {"model_type": "siglip"},
            r"model_type is 'siglip': only a whole CLIPModel",
        ),
        ("config.json", {"vision_config.hidden_act": "gelu"}, "hidden_act"),
        (
            "config.json",
            {"vision_config.num_channels": 1},
            "num_channels: input should be 3",
        ),
        ("config.json", {"vision_config.num_attention_heads": 3}, "does not divide the width 64"),
        (
            "config.json",
            {"text_config.vocab_size": 30522},
            "vocab_size: .* 49408; got 30522",
        ),
        (
            "config.json",
            {"projection_dim": "wide"},
            "projection_dim: .*; got 'wide'",
        ),
        (
            "config.json",
            {"vision_config.patch_size": [8, 4]},
            r"g\.patch_size: .* got \[8, 4\]",
        ),
        ("config.json", {"text_config.eos_token_id": [1, 2]}, r"eos_token_id: .* got \[1, 2\]"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 64}}, "32 pixels a side"),
        ("preprocessor_config.json", {"resample": 0}, "resample: input should be 2 or 3; got 0"),
        ("preprocessor_config.json", {"rescale_factor": 0.5}, "divides by 255"),
        ("preprocessor_config.json", {"do_center_crop": False}, "crop_size"),
    ],
)
def test_settings_that_open_clip_cannot_express_are_refused(
    tmp_path, clip, file, change, message
) -> None:
    folder = save_state(stored(clip), clip, tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    resolved(folder)
    edit(folder / file, change)
    with pytest.raises(CheckpointError, match=message) as raised:
        resolved(folder)
    assert "\n" not in str(raised.value)
    assert str(folder / file) in str(raised.value)


def test_old_config_sections_take_precedence(tmp_path, clip: Path) -> None:
    folder = save_state(stored(clip), clip, tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config_dict"] = config.pop("vision_config")
    config["vision_config"] = {"hidden_size": 7}
    (folder / "config.json").write_text(json.dumps(config))
    assert resolved(folder).model_cfg == resolved(clip).model_cfg


def test_a_vision_model_is_refused_as_the_pretrained_model(tmp_path) -> None:
    folder = save(vision_model(), tmp_path / "tower")
    with pytest.raises(CheckpointError, match="'clip_vision_model': only a whole CLIPModel"):
        resolved(folder)


def test_from_the_hub_without_a_network(tmp_path, monkeypatch, clip: Path) -> None:
    """Files that the hub's own client has cached are used, of either library."""
    import huggingface_hub.constants

    repository = tmp_path / "models--org--clip"
    save_state(stored(clip), clip, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = resolve_model(ModelConfig(arch="hf-hub:org/clip"))
    assert model.model_cfg == resolved(clip).model_cfg
    assert_equal(tensors(open_checkpoint("hf-hub:org/clip")), open_clip_state(clip_model()))


# --- inspect -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("act", "name"), [("quick_gelu", "QuickGELU"), ("gelu", "GELU")])
def test_inspect_shows_layout_and_activation(tmp_path, clip: Path, act, name) -> None:
    folder = save_state(stored(clip), clip, tmp_path / "x")
    edit(folder / "config.json", {"vision_config.hidden_act": act})
    inspection = inspect_checkpoint(str(folder))
    assert inspection["format"] == "huggingface"
    assert inspection["container"] == "safetensors"
    assert inspection["layout"] == "CLIPModel, keys vision_model.*"
    assert inspection["activation"] == name
    assert inspection["visual"]["layers"] == 2
    assert inspection["visual"]["image_size"] == 32
    assert "vision_model.pre_layrnorm.weight" in inspection["keys"]
    assert "huggingface: CLIPModel, keys vision_model.*, in safetensors" in inspection_text(
        inspection
    )
    json.dumps(inspection)


def test_inspect_distinguishes_the_layouts(tmp_path) -> None:
    own = save(vision_model(projection=False), tmp_path / "own")
    four = save_state(as_version_4(stored(own)), own, tmp_path / "four")
    five = save_state(as_version_5(stored(own)), own, tmp_path / "five")
    assert inspect_checkpoint(str(four))["layout"] == "CLIPVisionModel, keys vision_model.*"
    assert inspect_checkpoint(str(five))["layout"] == "CLIPVisionModel, keys *"
    (five / "config.json").unlink()
    assert "not recorded" in inspect_checkpoint(str(five))["activation"]


# --- end to end ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Path]:
    """Return a world with the weights of a Hugging Face model, and the folder of that model."""
    root = tmp_path_factory.mktemp("two")
    theirs = save(clip_model(9), root / "theirs")
    model_cfg = dict(resolved(theirs).model_cfg)
    world = make_world(root / "world", tasks=2, adapt=4, test=2, model_cfg=model_cfg)
    base = world.root / "pretrained" / "open_clip_model.safetensors"
    save_file(open_clip_state(clip_model(9)), base)
    for k, task in enumerate(world.config["tasks"]):
        expert = vision_model(20 + k)
        save(expert, root / f"expert{k}")
        state = open_clip_state(expert)
        state["visual.proj"] = open_clip_state(clip_model(9))["visual.proj"]
        save_file(state, task["checkpoint"])
    return world, root


@pytest.mark.parametrize("method", ["ties", "adamerging"])
def test_a_merge_does_not_depend_on_the_library_of_its_models(two_worlds, tmp_path, method) -> None:
    world, root = two_worlds
    tasks = [dict(task) for task in world.config["tasks"]]
    changes = {"method": {"name": method}, "optimizer": {"steps": 3}}
    merge(world.parse(tmp_path / "own", **changes))
    tasks[1]["checkpoint"] = str(root / "expert1")
    merge(world.parse(tmp_path / "one", **changes, tasks=tasks))
    tasks[0]["checkpoint"] = str(root / "expert0")
    theirs = {**changes, "tasks": tasks, "model": f"local-dir:{root / 'theirs'}"}
    merge(world.parse(tmp_path / "all", **theirs))
    expected = (tmp_path / "own" / "open_clip_model.safetensors").read_bytes()
    for name in ("one", "all"):
        assert (tmp_path / name / "open_clip_model.safetensors").read_bytes() == expected
        for file in ("lambdas.json", "results.json"):
            ours = json.loads((tmp_path / "own" / file).read_text())
            other = json.loads((tmp_path / name / file).read_text())
            ours.pop("timings", None), other.pop("timings", None)
            assert ours == other
    open_clip.create_model(f"local-dir:{tmp_path / 'all'}")


@pytest.mark.parametrize("method", ["fisher", "regmean", "individual"])
def test_statistics_and_scores_of_a_bare_tower(two_worlds, tmp_path, method) -> None:
    world, root = two_worlds
    tasks = [{**task, "checkpoint": str(root / f"expert{k}")} for k, task in
             enumerate(world.config["tasks"])]  # fmt: skip
    ours = merge(world.parse(tmp_path / "own", method={"name": method}))
    theirs = merge(world.parse(tmp_path / "theirs", method={"name": method}, tasks=tasks))
    assert ours.scores == theirs.scores


def test_eval_accepts_a_bare_tower(two_worlds, tmp_path, capsys) -> None:
    world, root = two_worlds
    config = world.write(tmp_path / "x.yaml")
    commands = Commands(capsys)
    theirs = commands.ok("eval", config, "--model", root / "expert0", "--json").out
    own = commands.ok("eval", config, "--model", world.config["tasks"][0]["checkpoint"], "--json")
    assert json.loads(theirs)["tasks"] == json.loads(own.out)["tasks"]


def test_an_expert_of_another_size_is_one_line(two_worlds, tmp_path, capsys) -> None:
    world, _ = two_worlds
    wide = clip_model(1, vision={"hidden_size": 32, "num_attention_heads": 1})
    task = {**world.config["tasks"][0], "checkpoint": str(save(wide, tmp_path / "wide"))}
    ran = Commands(capsys)("plan", world.write(tmp_path / "x.yaml", tasks=[task]))
    refused(ran, "tasks[0]", "wide", "the pretrained model has")


def test_a_folder_of_both_libraries_is_read_as_open_clips(tmp_path) -> None:
    folder = tmp_path / "both"
    write_model(folder)
    model = clip_model()
    save(model, folder)
    assert open_checkpoint(folder).path.name == "open_clip_model.safetensors"
    assert resolved(folder).model_cfg["embed_dim"] == 24


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"vision_config": [3]}, "vision_config is [3], not a mapping"),
        ("config.json", {"text_config": "x"}, "text_config is 'x', not a mapping"),
        (
            "preprocessor_config.json",
            {"rescale_factor": "x"},
            "rescale_factor: 'x' is not a number",
        ),
        ("preprocessor_config.json", {"image_mean": 3}, "image_mean: 3 is not 3 numbers"),
        ("preprocessor_config.json", {"image_std": [1, 1, "x"]}, "image_std: 'x' is not a number"),
        ("preprocessor_config.json", {"resample": []}, "resample: input should be 2 or 3; got []"),
        (
            "preprocessor_config.json",
            {"image_processor": 3},
            ".json is 3, not a mapping",
        ),
    ],
)
def test_malformed_configs_are_refused(tmp_path, file, change, message) -> None:
    folder = save(clip_model(), tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text("{}")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **change}))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_huggingface(folder)
