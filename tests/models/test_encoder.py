"""open_clip's model over flat vectors, its preprocessing in uint8, and the sources of θ₀."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from world import MODEL_CFG, RESNET, write_model

from raymerge.config import ModelConfig
from raymerge.data.preprocess import make_preprocess
from raymerge.errors import CheckpointError, ConfigError
from raymerge.merging.layout import ParameterLayout
from raymerge.models.encoder import FlatEncoder, build_model
from raymerge.models.pretrained import open_pretrained
from raymerge.models.resolve import ResolvedModel, resolve_model
from raymerge.models.skeleton import activation_bytes, build_skeleton


def _builtin(arch: str) -> ResolvedModel:
    return ResolvedModel(arch, open_clip.get_model_config(arch), {}, Path("unused"), arch)


@pytest.fixture(scope="module")
def folder(world) -> Path:
    return world.root / "pretrained"


@pytest.fixture(scope="module")
def resolved(folder) -> ResolvedModel:
    return resolve_model(ModelConfig(arch=f"local-dir:{folder}"))


@pytest.fixture(scope="module")
def reference(folder) -> torch.nn.Module:
    """Return the same model, built and loaded by open_clip alone."""
    return open_clip.create_model(f"local-dir:{folder}").eval()


# --- the layers of the paper -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "tensors", "blocks"),
    [("ViT-B-32", 152, 14), ("ViT-B-32-quickgelu", 152, 14), ("ViT-L-14", 296, 26)],
)
def test_the_papers_numbers_of_layers(arch, tensors, blocks):
    """Blocks: the stem, each transformer block, the head."""
    layout = ParameterLayout.of(build_skeleton(_builtin(arch), "meta").visual.state_dict())
    assert len(layout.layers("tensor").names) == tensors
    assert len(layout.layers("task").names) == 1
    names = layout.layers("block").names
    assert names[0] == "stem"
    assert names[-1] == "head"
    assert names[1:-1] == tuple(f"transformer.resblocks.{i}" for i in range(blocks - 2))


def test_layers_are_the_state_dict_keys_without_the_prefix(resolved, folder):
    layout = ParameterLayout.of(build_skeleton(resolved, "meta").visual.state_dict())
    stored = load_file(folder / "open_clip_model.safetensors")
    assert set(layout.names) == {
        key.removeprefix("visual.") for key in stored if key.startswith("visual.")
    }
    assert all(
        tuple(stored[f"visual.{name}"].shape) == shape
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    )


# --- preprocessing -----------------------------------------------------------------------------


def _noise(mode: str, size: tuple[int, int] = (61, 47)) -> Image.Image:
    width, height = size
    rng = np.random.default_rng(0)
    bands = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}
    if mode == "P":
        return _noise("RGB", size).quantize(17)
    if mode == "1":
        return _noise("L", size).convert("1")
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    shape = (height, width) if bands[mode] == 1 else (height, width, bands[mode])
    return Image.frombytes(mode, size, rng.integers(0, 256, shape, dtype=np.uint8).tobytes())


IMAGES = [
    ("png", "RGB", (61, 47)),
    ("png", "RGB", (47, 61)),
    ("png", "RGB", (32, 32)),  # the model's own size
    ("png", "RGB", (5, 9)),  # enlarged
    ("png", "RGB", (200, 33)),
    ("jpg", "RGB", (61, 47)),
    ("jpg", "L", (61, 47)),
    ("jpg", "CMYK", (61, 47)),
    ("png", "L", (61, 47)),
    ("png", "LA", (61, 47)),
    ("png", "RGBA", (61, 47)),
    ("png", "P", (61, 47)),
    ("png", "1", (61, 47)),
    ("png", "I;16", (61, 47)),
    ("gif", "P", (61, 47)),
    ("webp", "RGBA", (61, 47)),
]
CFGS = {
    "clip": PreprocessCfg(size=32),
    "siglip": PreprocessCfg(
        size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize_mode="squash"
    ),
    "bilinear": PreprocessCfg(size=32, interpolation="bilinear"),
    "longest": PreprocessCfg(size=32, resize_mode="longest", fill_color=7),
}


class _Tower:
    def __init__(self, cfg: PreprocessCfg) -> None:
        self.preprocess_cfg = cfg.__dict__


@pytest.mark.parametrize("cfg", CFGS)
@pytest.mark.parametrize(("suffix", "mode", "size"), IMAGES)
def test_pixels_then_normalise_is_open_clips_validation_transform(
    tmp_path, suffix, mode, size, cfg
):
    path = tmp_path / f"x.{suffix}"
    _noise(mode, size).save(path)
    preprocess = make_preprocess(_Tower(CFGS[cfg]))
    with Image.open(path) as image:
        expected_3HW = image_transform_v2(CFGS[cfg], is_train=False)(image)
    with Image.open(path) as image:
        pixels_3HW = preprocess.to_pixels(image)
    assert pixels_3HW.dtype == torch.uint8
    assert preprocess.size == (32, 32)
    ours_3HW = preprocess.normalise(pixels_3HW[None])[0]
    torch.testing.assert_close(ours_3HW, expected_3HW, rtol=0, atol=1e-6)


def test_a_batch_is_normalised_image_by_image_and_left_unchanged():
    preprocess = make_preprocess(_Tower(CFGS["clip"]))
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    before = pixels.clone()
    whole = preprocess.normalise(pixels)
    assert torch.equal(whole[1], preprocess.normalise(pixels[1:2])[0])
    assert torch.equal(pixels, before)


def test_the_models_own_mean_and_std_are_used(resolved, folder):
    cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    changed = ResolvedModel("x", MODEL_CFG, cfg, resolved.weights, "")
    preprocess = make_preprocess(build_skeleton(changed, "meta").visual)
    assert (preprocess.mean, preprocess.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    ours = make_preprocess(build_skeleton(resolved, "meta").visual)
    _, _, val = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    image = _noise("RGB")
    torch.testing.assert_close(ours.normalise(ours.to_pixels(image)[None])[0], val(image))


# --- the flat encoder --------------------------------------------------------------------------


def _encoder(resolved: ResolvedModel, padding: int = 0) -> tuple[FlatEncoder, ParameterLayout]:
    pretrained, _ = open_pretrained(resolved)
    layout, model = pretrained.layout, build_model(resolved, pretrained)
    return FlatEncoder(model, layout, torch.device("cpu"), layout.columns + padding), layout


def _fill(encoder: FlatEncoder, layout: ParameterLayout, model: torch.nn.Module) -> None:
    _set(encoder.theta_P, layout, model.visual.state_dict())


def _set(flat_P: torch.Tensor, layout: ParameterLayout, state: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, view in layout.views(flat_P).items():
            view.copy_(state[name])


@pytest.fixture
def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("padding", [0, 1000])
def test_features_are_open_clips_normalised_image_features(resolved, reference, pixels, padding):
    encoder, layout = _encoder(resolved, padding)
    _fill(encoder, layout, reference)
    images = encoder.preprocess.normalise(pixels)
    expected_BD = reference.encode_image(images, normalize=True)
    torch.testing.assert_close(encoder.features(pixels), expected_BD, rtol=1e-5, atol=1e-6)


def test_the_encoder_computes_with_theta_alone(resolved, reference, pixels):
    """With zeros in θ, no weight of the pretrained model has an effect."""
    encoder, layout = _encoder(resolved)
    _fill(encoder, layout, reference)
    before_BD = encoder.features(pixels)
    with torch.no_grad():
        encoder.theta_P.zero_()
    assert encoder.features(pixels).count_nonzero() == 0
    _fill(encoder, layout, reference)
    assert torch.equal(encoder.features(pixels), before_BD)


def test_the_flat_gradient_is_autograds_and_accumulates(resolved, reference, pixels):
    encoder, layout = _encoder(resolved, padding=10)
    _fill(encoder, layout, reference)
    weights_BD = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))

    (encoder.features(pixels) * weights_BD).sum().backward()
    once_P = encoder.gradient_P.clone()
    (encoder.features(pixels) * weights_BD).sum().backward()

    reference.zero_grad()
    features_BD = reference.encode_image(encoder.preprocess.normalise(pixels), normalize=True)
    (features_BD * weights_BD).sum().backward()
    expected_P = torch.zeros_like(once_P)  # the padding stays zero
    gradients = {name: p.grad for name, p in reference.visual.named_parameters()}
    _set(expected_P, layout, gradients)
    torch.testing.assert_close(once_P, expected_P, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(encoder.gradient_P, 2 * once_P)


def test_batchnorm_statistics_are_merged_but_have_no_gradient(pixels):
    """A ResNet tower: its running means and variances are part of θ, its counters are not."""
    resolved = ResolvedModel("resnet", RESNET, {}, Path("unused"), "")
    torch.manual_seed(0)
    model = build_skeleton(resolved)
    layout = ParameterLayout.of(model.visual.state_dict())
    assert "bn1.running_var" in layout.names
    assert not any(name.endswith("num_batches_tracked") for name in layout.names)
    state = {k: v.clone() for k, v in model.visual.state_dict().items()}
    state["bn1.running_var"] += 3.0
    encoder = FlatEncoder(model, layout, torch.device("cpu"))
    _set(encoder.theta_P, layout, state)
    encoder.features(pixels).sum().backward()
    views = layout.views(encoder.gradient_P)
    assert views["bn1.running_var"].count_nonzero() == 0
    assert views["bn1.weight"].count_nonzero() > 0

    torch.manual_seed(0)
    expected = build_skeleton(resolved).eval()
    expected.visual.load_state_dict(state)
    images = encoder.preprocess.normalise(pixels)
    torch.testing.assert_close(
        encoder.features(pixels), expected.encode_image(images, normalize=True)
    )


def test_dropping_the_text_tower_leaves_the_image_encoder(resolved, reference, pixels):
    encoder, layout = _encoder(resolved)
    _fill(encoder, layout, reference)
    before_BD = encoder.features(pixels)
    encoder.drop_text()
    assert torch.equal(encoder.features(pixels), before_BD)
    assert {name.split(".")[0] for name, _ in encoder._model.named_parameters()} <= {
        "visual",
        "positional_embedding",
        "text_projection",
        "logit_scale",
    }


def test_bfloat16_autocast_gives_float32_features_of_norm_one(resolved, reference, pixels):
    encoder, layout = _encoder(resolved)
    _fill(encoder, layout, reference)
    half_BD, full_BD = encoder.features(pixels, autocast=True), encoder.features(pixels)
    assert half_BD.dtype == torch.float32
    torch.testing.assert_close(half_BD.norm(dim=1), torch.ones(5), rtol=0, atol=1e-5)
    assert not torch.equal(half_BD, full_BD)  # it computes in bfloat16
    torch.testing.assert_close(half_BD, full_BD, rtol=0, atol=0.03)


# --- what a pass keeps for its backward pass ---------------------------------------------------


def _tower(device: str = "meta", **changes: int) -> torch.nn.Module:
    cfg = {**MODEL_CFG, "vision_cfg": {**MODEL_CFG["vision_cfg"], **changes}}
    return build_skeleton(ResolvedModel("x", cfg, {}, Path("unused"), ""), device).visual


@pytest.mark.parametrize("image_size", [32, 64])
def test_activation_bytes_are_what_autograd_saves_on_the_cpu(image_size):
    tower = _tower("cpu", image_size=image_size).train(False)
    weights = {p.data_ptr() for p in tower.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = tower(torch.randn(8, 3, image_size, image_size))
    saved = sum(size for pointer, size in kept.items() if pointer not in weights) / 8
    assert output.shape == (8, 24)
    assert activation_bytes(_tower(image_size=image_size)) == pytest.approx(saved, rel=0.25)


def test_activation_bytes_are_linear_in_the_layers():
    one, two, five = (activation_bytes(_tower(layers=n)) for n in (1, 2, 5))
    assert 0 < two - one < one + two
    assert five - two == 3 * (two - one)


@pytest.mark.parametrize("arch", ["RN50", "convnext_base", "ViT-B-16-SigLIP", "EVA02-B-16"])
def test_activation_bytes_of_other_kinds_of_towers(arch):
    """The bound is an output and an image below, and a few hundred megabytes above."""
    assert 10**6 < activation_bytes(build_skeleton(_builtin(arch), "meta").visual) < 10**9


# --- where the model comes from ----------------------------------------------------------------


TEXTS = torch.arange(48).view(3, 16) * 1013 % 49408


def _build(resolved: ResolvedModel) -> torch.nn.Module:
    return build_model(resolved, open_pretrained(resolved)[0])


def _same_but_for_the_merged(built: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Assert that all tensors but the merged ones are open_clip's own."""
    merged = {f"visual.{name}" for name in ParameterLayout.of(reference.visual.state_dict()).names}
    ours, expected = built.state_dict(), reference.state_dict()
    assert ours.keys() == expected.keys()
    for key in expected.keys() - merged:
        assert ours[key].dtype == expected[key].dtype, key
        assert torch.equal(ours[key], expected[key]), key
    # Not bit-equal: the last place of a product depends on the alignment of the weights.
    torch.testing.assert_close(built.encode_text(TEXTS), reference.encode_text(TEXTS))


def test_the_built_model_is_open_clips_but_for_the_merged_weights(resolved, reference):
    built = _build(resolved)
    _same_but_for_the_merged(built, reference)
    assert not built.training
    assert not any(p.requires_grad for p in built.parameters())


CUSTOM_TEXT = {**MODEL_CFG, "custom_text": True, "quick_gelu": True}


@pytest.mark.parametrize("cfg", [RESNET, CUSTOM_TEXT], ids=["resnet", "custom text"])
def test_models_of_other_kinds_are_open_clips_too(tmp_path, cfg, pixels):
    """Skipping random weights leaves no buffer unset."""
    torch.manual_seed(1)
    write_model(tmp_path / "m", cfg)
    reference = open_clip.create_model(f"local-dir:{tmp_path / 'm'}").eval()
    resolved = resolve_model(ModelConfig(arch=f"local-dir:{tmp_path / 'm'}"))
    _same_but_for_the_merged(_build(resolved), reference)
    encoder, layout = _encoder(resolved)
    _fill(encoder, layout, reference)
    images = encoder.preprocess.normalise(pixels)
    expected_BD = reference.encode_image(images, normalize=True)
    torch.testing.assert_close(encoder.features(pixels), expected_BD, rtol=1e-5, atol=1e-6)


def test_text_weights_stored_in_half_precision_become_float32(folder, tmp_path, reference):
    state = load_file(folder / "open_clip_model.safetensors")
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "half.safetensors")
    (tmp_path / "m.json").write_text(json.dumps(MODEL_CFG))
    config = ModelConfig(
        arch=str(tmp_path / "m.json"), pretrained=str(tmp_path / "half.safetensors")
    )
    built = _build(resolve_model(config))
    assert {t.dtype for t in built.state_dict().values()} == {torch.float32}
    key = "token_embedding.weight"
    assert torch.equal(built.state_dict()[key], state[key].half().float())
    exact = reference.encode_text(TEXTS)
    torch.testing.assert_close(built.encode_text(TEXTS), exact, rtol=0, atol=0.01)


def _sources(folder: Path, tmp_path: Path) -> dict[str, ModelConfig]:
    weights = str(folder / "open_clip_model.safetensors")
    (tmp_path / "bare.json").write_text(json.dumps(MODEL_CFG))
    (tmp_path / "full.json").write_text(json.dumps({"model_cfg": MODEL_CFG}))
    return {
        "local-dir": ModelConfig(arch=f"local-dir:{folder}"),
        "bare model_cfg": ModelConfig(arch=str(tmp_path / "bare.json"), pretrained=weights),
        "open_clip_config": ModelConfig(arch=str(tmp_path / "full.json"), pretrained=weights),
        "folder as weights": ModelConfig(arch=str(tmp_path / "bare.json"), pretrained=str(folder)),
    }


@pytest.mark.parametrize(
    "kind", ["local-dir", "bare model_cfg", "open_clip_config", "folder as weights"]
)
def test_every_way_to_name_the_model_gives_the_same_one(folder, tmp_path, reference, kind):
    _same_but_for_the_merged(_build(resolve_model(_sources(folder, tmp_path)[kind])), reference)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"module." + k: v for k, v in s.items()}])
def test_a_torch_checkpoint_of_the_whole_model_is_accepted(folder, tmp_path, reference, wrap):
    state = load_file(folder / "open_clip_model.safetensors")
    torch.save({"state_dict": wrap(state), "epoch": 32}, tmp_path / "epoch_32.pt")
    (tmp_path / "m.json").write_text(json.dumps(MODEL_CFG))
    config = ModelConfig(arch=str(tmp_path / "m.json"), pretrained=str(tmp_path / "epoch_32.pt"))
    resolved = resolve_model(config)
    _same_but_for_the_merged(_build(resolved), reference)
    pretrained, _ = open_pretrained(resolved)
    for piece in pretrained.layout.shard(0, 1).pieces():
        read_n = torch.empty(piece.stop - piece.start)
        pretrained.read(piece, read_n)
        stored = reference.visual.state_dict()[pretrained.layout.names[piece.tensor]]
        assert torch.equal(read_n, stored.flatten())


def test_an_unknown_architecture_suggests_the_nearest_one():
    with pytest.raises(ConfigError, match=r"model\.arch: 'ViT-B32' .*did you mean .*ViT-B-32"):
        resolve_model(ModelConfig(arch="ViT-B32", pretrained="openai"))


def test_an_unknown_tag_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"model\.pretrained: 'opnai' .*openai"):
        resolve_model(ModelConfig(arch="ViT-B-32", pretrained="opnai"))


def test_openai_weights_in_a_gelu_architecture_name_the_right_one():
    """It would run with silently lower accuracy (open_clip issue #771)."""
    with pytest.raises(ConfigError, match="use arch: ViT-B-32-quickgelu"):
        resolve_model(ModelConfig(arch="ViT-B-32", pretrained="openai"))


def _pretrained_refusal(tmp_path: Path, state: dict[str, torch.Tensor], cfg=MODEL_CFG) -> str:
    (tmp_path / "m.json").write_text(json.dumps(cfg))
    save_file(state, tmp_path / "w.safetensors")
    config = ModelConfig(arch=str(tmp_path / "m.json"), pretrained=str(tmp_path / "w.safetensors"))
    with pytest.raises(CheckpointError) as raised:
        open_pretrained(resolve_model(config))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_pretrained_file_without_its_text_tower_is_refused(folder, tmp_path):
    state = load_file(folder / "open_clip_model.safetensors")
    visual = {k: v for k, v in state.items() if k.startswith("visual.")}
    message = _pretrained_refusal(tmp_path, visual)
    assert "without its text tower" in message
    assert "pretrained: openai" in message


def test_a_pretrained_file_of_another_width_is_refused(folder, tmp_path):
    state = load_file(folder / "open_clip_model.safetensors")
    message = _pretrained_refusal(tmp_path, state, {**MODEL_CFG, "embed_dim": 25})
    assert "[24]" in message or "24]" in message
    assert "25]" in message


def test_a_model_cfg_that_open_clip_cannot_build_is_refused(folder, tmp_path):
    state = load_file(folder / "open_clip_model.safetensors")
    message = _pretrained_refusal(tmp_path, state, {**MODEL_CFG, "vision_cfg": {"layer": 2}})
    assert "open_clip cannot build it" in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_cfg": 3}'])
def test_a_json_without_a_model_is_refused(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"m\.json"):
        resolve_model(ModelConfig(arch=str(tmp_path / "m.json"), pretrained="w.pt"))


def test_the_leftovers_are_the_text_parameters_of_the_official_encoders(resolved, folder):
    state = load_file(folder / "open_clip_model.safetensors")
    kept = ("positional_embedding", "text_projection", "logit_scale")
    beside = sum(
        t.numel()
        for key, t in state.items()
        if key in kept or key.startswith(("token_embedding.", "ln_final."))
    )
    assert open_pretrained(resolved)[1] == beside > 0
