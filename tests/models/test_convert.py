"""``raymerge convert`` keeps the numbers, and both libraries compute the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from commands import Commands, config_data, refused, tree, write_config
from huggingface_world import PREPROCESSOR, clip_model, open_clip_state, save, vision_model
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPModel
from world import MODEL_CFG, RESNET, World, write_model

import raymerge.models.convert
from raymerge.errors import RunError
from raymerge.files.atomic import reserve_space
from raymerge.models.convert import convert

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(clip_model(), tmp_path_factory.mktemp("theirs") / "clip")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours") / "clip"
    write_model(folder)
    return folder


@torch.no_grad()
def logits_of_both(own: Path, other: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both libraries' logits for the same images and texts, each from its own folder."""
    model = open_clip.create_model(f"local-dir:{own}").eval()
    texts = open_clip.get_tokenizer(f"local-dir:{own}")(["a photo of a dog", "red, 2 lamps"])
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    image_features, text_features, scale = model(images, texts)
    hf = CLIPModel.from_pretrained(other).eval()
    expected = hf(input_ids=texts, pixel_values=images).logits_per_image
    return scale * image_features @ text_features.t(), expected


def assert_same_logits(own: Path, other: Path) -> None:
    actual, expected = logits_of_both(own, other)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01


def assert_same_state(path: Path, expected: dict[str, torch.Tensor]) -> None:
    state = load_file(path)
    assert sorted(state) == sorted(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


# --- both ways -----------------------------------------------------------------------------------


def test_to_open_clip(run, tmp_path, theirs) -> None:
    ran = run.ok("convert", theirs, tmp_path / "own", "--to", "open_clip")
    assert "agree to" in ran.out
    assert_same_state(tmp_path / "own" / WEIGHTS, open_clip_state(clip_model()))
    assert_same_logits(tmp_path / "own", theirs)
    written = json.loads((tmp_path / "own" / "open_clip_config.json").read_text())
    assert written["preprocess_cfg"]["mean"] == PREPROCESSOR["image_mean"]
    assert written["preprocess_cfg"]["interpolation"] == "bilinear"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]


def test_to_hugging_face(run, tmp_path, ours) -> None:
    run.ok("convert", ours, tmp_path / "hf", "--to", "hf")
    assert_same_logits(ours, tmp_path / "hf")
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "hf")
    assert processor.crop_size["height"] == 32


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu": {"vision": {"hidden_act": "gelu"}, "text": {"hidden_act": "gelu"}},
    "wide": {"vision": {"intermediate_size": 200}, "text": {"intermediate_size": 97}},
    "eps": {"vision": {"layer_norm_eps": 1e-3}, "text": {"layer_norm_eps": 1e-2}},
    "old end": {"text": {"eos_token_id": 2}},
    "other end": {"text": {"eos_token_id": 320}},
}


@pytest.mark.parametrize("name", list(CASES))
def test_there_and_back_is_the_same_model(tmp_path, name) -> None:
    first = save(clip_model(3, **CASES[name]), tmp_path / "first")
    (first / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    assert convert(str(first), tmp_path / "own", "open_clip") < 1e-5
    assert convert(str(tmp_path / "own"), tmp_path / "second", "hf") < 1e-5
    assert_same_state(
        tmp_path / "second" / "model.safetensors", load_file(first / "model.safetensors")
    )
    assert convert(str(tmp_path / "second"), tmp_path / "again", "open_clip") < 1e-5
    for file in (WEIGHTS, "open_clip_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "own" / file).read_bytes()
    assert_same_logits(tmp_path / "own", tmp_path / "second")


def test_half_precision_and_large_tensors_keep_their_bits(tmp_path, monkeypatch, ours) -> None:
    """Parts may end anywhere within q, k and v."""
    state = {k: t.bfloat16() for k, t in load_file(ours / WEIGHTS).items()}
    half = tmp_path / "half"
    half.mkdir()
    save_file(state, half / WEIGHTS)
    (half / "open_clip_config.json").write_text((ours / "open_clip_config.json").read_text())
    monkeypatch.setattr(raymerge.models.convert, "_COLUMNS", 1000)
    convert(str(half), tmp_path / "hf", "hf", verify=False)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    convert(str(tmp_path / "hf"), tmp_path / "back", "open_clip", verify=False)
    assert_same_state(tmp_path / "back" / WEIGHTS, state)


def test_sharded_and_torch_files(tmp_path, theirs) -> None:
    sharded = save(clip_model(), tmp_path / "sharded", max_shard_size=100_000)
    torch_file = tmp_path / "bin"
    torch_file.mkdir()
    torch.save(clip_model().state_dict(), torch_file / "pytorch_model.bin")
    (torch_file / "config.json").write_text((theirs / "config.json").read_text())
    for name, folder in (("a", sharded), ("b", torch_file)):
        assert convert(str(folder), tmp_path / name, "open_clip") is not None
        assert_same_state(tmp_path / name / WEIGHTS, open_clip_state(clip_model()))


def test_a_bare_state_dict_needs_its_architecture(run, tmp_path, ours) -> None:
    lone = tmp_path / "lone"
    lone.mkdir()
    torch.save(load_file(ours / WEIGHTS), lone / "x.pt")
    ran = run("convert", lone / "x.pt", tmp_path / "hf", "--to", "hf")
    refused(ran, "x.pt", "--arch")
    cfg = tmp_path / "cfg.json"
    cfg.write_text(json.dumps(MODEL_CFG))
    run.ok("convert", lone / "x.pt", tmp_path / "hf", "--to", "hf", "--arch", cfg)
    assert_same_logits(ours, tmp_path / "hf")
    run.ok("convert", lone / "x.pt", tmp_path / "own", "--to", "open_clip", "--arch", cfg)
    assert_same_state(tmp_path / "own" / WEIGHTS, load_file(ours / WEIGHTS))
    run.ok(
        "convert", lone / "x.pt", tmp_path / "hf2", "--to", "hf", "--arch", f"local-dir:{ours}"
    )  # fmt: skip
    assert_same_logits(ours, tmp_path / "hf2")


# --- what is refused -----------------------------------------------------------------------------


def test_nothing_is_overwritten(run, tmp_path, theirs) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    refused(run("convert", theirs, tmp_path / "own", "--to", "open_clip"), "own", "is in use")
    assert tree(tmp_path) == before


def test_a_tower_alone_is_refused(run, tmp_path) -> None:
    tower = save(vision_model(), tmp_path / "tower")
    refused(run("convert", tower, tmp_path / "x", "--to", "open_clip"), "only a whole CLIPModel")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("model_cfg", "message"),
    [
        (RESNET, "a ResNet's"),
        (
            {**MODEL_CFG, "vision_cfg": {**MODEL_CFG["vision_cfg"], "ls_init_value": 0.1}},
            "vision_cfg.ls_init_value is 0.1",
        ),
        (
            {**MODEL_CFG, "text_cfg": {**MODEL_CFG["text_cfg"], "pool_type": "last"}},
            "text_cfg.pool_type is 'last'",
        ),
        ({**MODEL_CFG, "custom_text": True}, "custom_text is True"),
    ],
)
def test_settings_that_hugging_face_lacks_are_refused(run, tmp_path, model_cfg, message) -> None:
    write_model(tmp_path / "own", model_cfg)
    refused(run("convert", tmp_path / "own", tmp_path / "x", "--to", "hf"), message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]


def test_neutral_settings_are_accepted(run, tmp_path) -> None:
    vision = {**MODEL_CFG["vision_cfg"], "pool_type": "tok", "mlp_ratio": 4.0, "patch_dropout": 0.0}
    text = {**MODEL_CFG["text_cfg"], "pool_type": "argmax", "ls_init_value": None}
    write_model(tmp_path / "own", {**MODEL_CFG, "vision_cfg": vision, "text_cfg": text})
    run.ok("convert", tmp_path / "own", tmp_path / "hf", "--to", "hf")
    assert_same_logits(tmp_path / "own", tmp_path / "hf")


def test_no_incomplete_folder_is_left(run, tmp_path, monkeypatch, theirs) -> None:
    def full(handle: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("raymerge.models.checkpoints.safetensors_file.reserve_space", full)
    ran = run("convert", theirs, tmp_path / "own", "--to", "open_clip")
    assert ran.code == 1
    assert "No space left" in ran.err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("raymerge.models.checkpoints.safetensors_file.reserve_space", reserve_space)


def test_libraries_that_disagree_leave_nothing(tmp_path, monkeypatch, ours) -> None:
    own = raymerge.models.convert.stored_keys

    def swapped(name: str) -> Any:
        other = {"ln_1": "ln_2", "ln_2": "ln_1"}
        parts = [other.get(part, part) for part in name.split(".")]
        return own(".".join(parts))

    monkeypatch.setattr(raymerge.models.convert, "stored_keys", swapped)
    with pytest.raises(RunError, match=r"cosines of open_clip and transformers differ by"):
        convert(str(ours), tmp_path / "hf", "hf")
    assert list(tmp_path.iterdir()) == []
    assert convert(str(ours), tmp_path / "hf", "hf", verify=False) is None


# --- merge --also --------------------------------------------------------------------------------


def test_a_merge_is_also_written_in_other_formats(run, tmp_path, world: World) -> None:
    data = config_data(world, method={"name": "average"}, output=str(tmp_path / "out"))
    config = write_config(tmp_path / "x.yaml", data)
    run.ok("merge", config, "--also", "hf", "--also", "state_dict")
    merged = load_file(tmp_path / "out" / WEIGHTS)
    assert_same_logits(tmp_path / "out", tmp_path / "out" / "hf")
    state = torch.load(tmp_path / "out" / "state_dict.pt", weights_only=True)
    assert sorted(state) == sorted(merged)
    assert all(torch.equal(state[name], merged[name]) for name in merged)
    run.ok("merge", config, "--overwrite")
    assert not (tmp_path / "out" / "state_dict.pt").exists()
    assert not list((tmp_path / "out").glob("hf/*"))


def test_a_format_that_cannot_express_the_model_is_refused_before_the_merge(
    run, tmp_path, world: World
) -> None:
    from world import make_world

    vision = {**MODEL_CFG["vision_cfg"], "ls_init_value": 0.1}
    scaled = make_world(tmp_path / "world", 1, 2, 2, {**MODEL_CFG, "vision_cfg": vision})
    data = config_data(scaled, method={"name": "average"}, output=str(tmp_path / "out"))
    ran = run("merge", write_config(tmp_path / "x.yaml", data), "--also", "hf")
    refused(ran, "vision_cfg.ls_init_value is 0.1")
    data = config_data(world, method={"name": "individual"}, output=str(tmp_path / "out"))
    ran = run("merge", write_config(tmp_path / "x.yaml", data), "--also", "hf")
    refused(ran, "individual", "writes no model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["net", "net_ema"])
def test_the_named_part_of_a_file_is_converted(tmp_path, ours, part, caplog) -> None:
    state = load_file(ours / WEIGHTS)
    scales = {"net": 1.0, "net_ema": 2.0}
    states = {name: {**state, "logit_scale": torch.tensor(scale)} for name, scale in scales.items()}
    torch.save(states, tmp_path / "x.pt")
    arch = f"local-dir:{ours}"
    convert(f"{tmp_path}/x.pt#{part}", tmp_path / "out", "open_clip", arch=arch)
    assert float(load_file(tmp_path / "out" / WEIGHTS)["logit_scale"]) == scales[part]
    assert caplog.text == ""
    convert(f"{tmp_path}/x.pt", tmp_path / "first", "open_clip", arch=arch)
    assert "of x.pt the model under net.* is taken; it also holds net_ema.*" in caplog.text
