"""LoRA adapters over the pretrained model equal PEFT's own merge."""

from __future__ import annotations

import json
import re
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from commands import Commands, refused
from huggingface_world import clip_model, open_clip_state, save, vision_model
from safetensors.torch import load_file, save_file
from world import make_world

from raymerge.config import ModelConfig
from raymerge.errors import CheckpointError
from raymerge.merging.layout import Piece
from raymerge.models.checkpoints.inspect import inspect_checkpoint, inspection_text
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint, open_visual
from raymerge.models.pretrained import open_pretrained
from raymerge.models.resolve import resolve_model
from raymerge.runs.merge import merge

TOWER = r".*vision_model\.encoder\.layers.*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> VisualCheckpoint:
    folder = save(clip_model(), tmp_path_factory.mktemp("lora") / "clip")
    return open_pretrained(resolve_model(ModelConfig(arch=f"local-dir:{folder}")))[0]


def adapt(model: torch.nn.Module, **config: Any) -> Any:
    """Return PEFT's model with an adapter whose factors are not zero."""
    adapted = peft.get_peft_model(
        deepcopy(model), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **config})
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def merged_by_peft(adapted: Any) -> dict[str, torch.Tensor]:
    return open_clip_state(deepcopy(adapted).merge_and_unload())


def visual_tensors(opened: VisualCheckpoint) -> dict[str, torch.Tensor]:
    return {f"visual.{k}": t.clone() for k, t in opened.layout.views(opened.flat()).items()}


def assert_merged(base: VisualCheckpoint, folder: Path, adapted: Any) -> None:
    actual = visual_tensors(open_visual(str(folder), base.layout, base))
    expected = merged_by_peft(adapted)
    plain = visual_tensors(base)
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-7, rtol=1e-6, msg=name)
        assert torch.equal(expected[name], plain[name]) == torch.equal(actual[name], plain[name])
    assert any(not torch.equal(actual[name], plain[name]) for name in actual)


CASES: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": TOWER},
    "projection": {"target_modules": r".*(visual_projection|vision_model.*q_proj)"},
    "rslora": {"target_modules": TOWER, "use_rslora": True},
    "patterns": {
        "target_modules": TOWER,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.fc1": 8},
        "alpha_pattern": {"fc1": 16, "vision_model.encoder.layers.0.self_attn.v_proj": 3},
    },
    "bias": {"target_modules": TOWER, "bias": "lora_only"},
    "saved whole": {
        "target_modules": r".*vision_model.*(v_proj|fc2)",
        "modules_to_save": ["visual_projection", "vision_model.post_layernorm"],
    },
    "orthogonal": {"target_modules": TOWER, "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("name", list(CASES))
def test_the_merge_is_pefts_own(tmp_path, base, name, safe) -> None:
    adapted = adapt(clip_model(), **CASES[name])
    adapted.save_pretrained(tmp_path, safe_serialization=safe)
    assert (tmp_path / f"adapter_model.{'safetensors' if safe else 'bin'}").exists()
    assert_merged(base, tmp_path, adapted)


def test_an_adapter_of_a_vision_model(tmp_path, base) -> None:
    """Its keys have no ``vision_model.`` in transformers 5; its base is the same tower."""
    tower = vision_model()
    state = clip_model().state_dict()
    bare = "vision_model." not in next(iter(tower.state_dict()))
    tower.load_state_dict(
        {
            key.removeprefix("vision_model.") if bare else key: tensor
            for key, tensor in state.items()
            if key.startswith("vision_model.")
        }
    )
    adapted = adapt(tower, target_modules=["q_proj", "v_proj", "fc1"])
    adapted.save_pretrained(tmp_path)
    actual = visual_tensors(open_visual(str(tmp_path), base.layout, base))
    expected = {**merged_by_peft(adapted), "visual.proj": visual_tensors(base)["visual.proj"]}
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-7, rtol=1e-6)


def test_an_adapter_of_an_open_clip_model(tmp_path) -> None:
    """PEFT trains its linear layers; the packed attention is refused (see below)."""
    world = make_world(tmp_path / "world", tasks=1, adapt=1, test=1)
    import open_clip

    model = open_clip.create_model(world.config["model"])
    adapted = adapt(model, target_modules=r"visual\..*(out_proj|c_fc|c_proj)")
    adapted.save_pretrained(tmp_path / "adapter")
    base = open_pretrained(resolve_model(ModelConfig(arch=world.config["model"])))[0]
    opened = open_visual(str(tmp_path / "adapter"), base.layout, base)
    expected = deepcopy(adapted).merge_and_unload().visual.state_dict()
    changed = 0
    for name, view in base.layout.views(opened.flat()).items():
        torch.testing.assert_close(view, expected[name], atol=1e-7, rtol=1e-6)
        changed += not torch.equal(expected[name], model.visual.state_dict()[name])
    assert changed == 2 * 3


def test_columns_do_not_depend_on_how_they_are_cut(tmp_path, base) -> None:
    adapt(clip_model(), target_modules=TOWER).save_pretrained(tmp_path)
    opened = open_visual(str(tmp_path), base.layout, base)
    whole_P = opened.flat()
    for piece in base.layout.shard(0, 1).pieces():
        for start in range(piece.start, piece.stop, 1000):
            stop = min(start + 1000, piece.stop)
            part_n = torch.empty(stop - start)
            opened.read(Piece(piece.tensor, start, stop), part_n)
            assert torch.equal(part_n, whole_P[start:stop])


def test_fan_in_fan_out_is_the_transpose(tmp_path, base) -> None:
    adapted = adapt(clip_model(), target_modules=r".*vision_model.*fc1")
    adapted.save_pretrained(tmp_path / "a")
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    swapped = {
        key: state[
            key.replace("lora_A", "x").replace("lora_B", "lora_A").replace("x", "lora_B")
        ].t()
        for key in state
    }
    write_adapter(tmp_path / "b", swapped, read_config(tmp_path / "a", fan_in_fan_out=True))
    ours, theirs = (
        open_visual(str(tmp_path / name), base.layout, base).flat() for name in ("a", "b")
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


# --- refusals ------------------------------------------------------------------------------------

PATCHES = "base_model.model.vision_model.embeddings.patch_embedding"
LAYER = "base_model.model.vision_model.encoder.layers.0"


def write_adapter(folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: t.contiguous() for k, t in state.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def read_config(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**json.loads((folder / "adapter_config.json").read_text()), **changes}


def factors(module: str, rank: int = 4, rows: int = 64, columns: int = 64) -> dict[str, Any]:
    return {
        f"{module}.lora_A.weight": torch.ones(rank, columns),
        f"{module}.lora_B.weight": torch.ones(rows, rank),
    }


QUERY = factors(f"{LAYER}.self_attn.q_proj")
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    ("state", "config", "message"),
    [
        (QUERY, {"use_dora": True}, "adapter_config.json has use_dora, which is more than B·A"),
        (QUERY, {"lora_bias": True}, "has lora_bias"),
        (QUERY, {"layer_replication": [[0, 4]]}, "has layer_replication"),
        (QUERY, {"peft_type": "IA3"}, "says IA3, and only LORA"),
        (QUERY, {"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which changes the base"),
        (QUERY, {"r": 0}, "has r 0, not a positive number"),
        (QUERY, {"lora_alpha": "big"}, "has lora_alpha 'big'"),
        (QUERY, {"r": 8}, r"says rank 8, but lora_A is [4, 64] and lora_B [64, 4]"),
        (QUERY, {"rank_pattern": {"q_(": 2}}, "rank_pattern: 'q_('"),
        (QUERY, {"rank_pattern": {"q_proj": 0}}, "rank_pattern: 'q_proj' is 0"),
        (
            factors("base_model.model.text_model.encoder.layers.0.self_attn.q_proj"),
            {},
            "changes the text tower (text_model.encoder.layers.0.self_attn.q_proj)",
        ),
        (
            factors("base_model.model.text_projection"),
            {},
            "changes the text tower (text_projection)",
        ),
        (
            {**QUERY, "base_model.model.classifier.weight": torch.ones(5, 64)},
            {},
            "changes 'classifier', which is no linear layer of the visual tower",
        ),
        (
            {f"{LAYER}.mlp.fc1.lora_A.weight": torch.ones(4, 64)},
            {},
            "fc1.lora_A.weight has no lora_B",
        ),
        (
            {f"{LAYER}.mlp.fc1.lora_B.weight": torch.ones(256, 4)},
            {},
            "fc1.lora_B.weight has no lora_A",
        ),
        (
            {
                f"{PATCHES}.lora_A.weight": torch.ones(4, 3, 8, 8),
                f"{PATCHES}.lora_B.weight": torch.ones(64, 4, 1, 1),
            },
            {},
            "vision_model.embeddings.patch_embedding is no linear layer (a convolution?)",
        ),
        (
            factors("base_model.model.visual.transformer.resblocks.0.attn", rows=192),
            {},
            "visual.transformer.resblocks.0.attn, an nn.MultiheadAttention",
        ),
        (
            factors("base_model.model.visual.transformer.resblocks.0.attn.base_layer.out_proj"),
            {},
            "visual.transformer.resblocks.0.attn, an nn.MultiheadAttention",
        ),
        (
            {**QUERY, f"{LAYER}.self_attn.q_proj.lora_magnitude_vector": torch.ones(64)},
            {},
            "q_proj.lora_magnitude_vector is more than lora_A and lora_B",
        ),
    ],
)
def test_other_changes_than_products_in_the_visual_tower_are_refused(
    tmp_path, base, state, config, message
) -> None:
    folder = write_adapter(tmp_path / "x", state, {**PLAIN, **config})
    with pytest.raises(CheckpointError, match=re.escape(message)) as raised:
        open_visual(str(folder), base.layout, base)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            factors(f"{LAYER}.self_attn.q_proj", columns=32),
            "q_proj changes a tensor of shape [64, 32], the pretrained model's is [64, 64]",
        ),
        (
            factors(f"{LAYER}.mlp.fc1", rows=64),
            "changes a tensor of shape [64, 64], the pretrained model's is [256, 64]",
        ),
        (
            factors("base_model.model.visual_projection", rows=64, columns=24),
            "visual_projection changes a tensor of shape [64, 24], the pretrained model's is [24",
        ),
        (
            factors(LAYER.replace(".0", ".7") + ".mlp.fc1", rows=256),
            "the pretrained model has no transformer.resblocks.7.mlp.c_fc.weight",
        ),
    ],
)
def test_sizes_are_checked_from_the_headers(tmp_path, base, monkeypatch, state, message) -> None:
    folder = write_adapter(tmp_path / "x", state, PLAIN)
    monkeypatch.setattr("raymerge.models.checkpoints.lora.read_tensor", None)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_visual(str(folder), base.layout, base)


def test_an_adapter_needs_its_config_and_a_model(tmp_path, base) -> None:
    folder = write_adapter(tmp_path / "x", QUERY, PLAIN)
    with pytest.raises(CheckpointError, match="is a LoRA adapter, which changes a pretrained"):
        open_visual(str(folder), base.layout)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"without adapter_config\.json beside it"):
        open_visual(str(folder), base.layout, base)


def test_inspect_shows_the_adapted_modules(tmp_path) -> None:
    folder = write_adapter(tmp_path / "x", {**QUERY, **factors(f"{LAYER}.mlp.fc1", 4, 256)}, PLAIN)
    inspection = inspect_checkpoint(str(folder))
    assert inspection["format"] == "lora"
    assert inspection["layout"] == "PEFT, r 4, alpha 8, 2 × (fc1, q_proj)"
    assert inspection["tensors"] == 4
    assert inspection["activation"] == "the pretrained model's"
    assert "lora: PEFT, r 4, alpha 8" in inspection_text(inspection)
    json.dumps(inspection)


# --- end to end ----------------------------------------------------------------------------------


def test_a_merge_of_adapters_equals_one_of_the_merged_models(tmp_path) -> None:
    clip = save(clip_model(), tmp_path / "clip")
    reference = f"local-dir:{clip}"
    model = resolve_model(ModelConfig(arch=reference))
    world = make_world(tmp_path / "world", 2, 4, 2, model_cfg=dict(model.model_cfg))
    base = open_pretrained(model)[0]
    adapters, merged = [], []
    for k, task in enumerate(world.config["tasks"]):
        torch.manual_seed(k)
        folder = tmp_path / f"adapter{k}"
        adapt(clip_model(), target_modules=TOWER, r=2 + k).save_pretrained(folder)
        state = visual_tensors(open_visual(str(folder), base.layout, base))
        save_file(state, tmp_path / f"merged{k}.safetensors")
        adapters.append({**task, "checkpoint": str(folder)})
        merged.append({**task, "checkpoint": str(tmp_path / f"merged{k}.safetensors")})
    for method in ("ties", "adamerging"):
        options = {"model": reference, "method": {"name": method}, "optimizer": {"steps": 2}}
        files = []
        for name, tasks in (("a", adapters), ("b", merged)):
            out = tmp_path / f"{method}-{name}"
            merge(world.parse(out, **options, tasks=tasks))
            files.append((out / "open_clip_model.safetensors").read_bytes())
        assert files[0] == files[1]


def test_a_text_adapter_is_one_line(tmp_path, capsys) -> None:
    world = make_world(tmp_path / "world", tasks=1, adapt=1, test=1)
    module = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    folder = write_adapter(tmp_path / "x", factors(module, rows=256), PLAIN)
    task = {**world.config["tasks"][0], "checkpoint": str(folder)}
    ran = Commands(capsys)("plan", world.write(tmp_path / "x.yaml", tasks=[task]))
    refused(ran, "tasks[0]", "changes the text tower", "target_modules")


# --- what an adapter's config may say -------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": float("nan")}, "not a positive number"),
        ({"lora_alpha": float("inf")}, "not a positive number"),
        ({"lora_alpha": 10**400}, "not a positive number"),
        ({"r": True}, "not a positive number"),
        ({"rank_pattern": [3]}, "rank_pattern [3], not a mapping"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "not a positive number"),
        ({"alpha_pattern": {"q_proj": "8"}}, "not a positive number"),
        ({"alpha_pattern": {"(a+)+x": 8}}, "is no plain pattern; write the modules' names"),
        ({"alpha_pattern": {"(?=x)": 8}}, "is no plain pattern"),
        ({"alpha_pattern": {".*.*.*.*x": 8}}, "is no plain pattern"),
        ({"alpha_pattern": {"a" * 300: 8}}, "is no plain pattern"),
        ({"alpha_pattern": {"[": 8}}, "alpha_pattern"),
        ({"rank_pattern": {"(a|ab)" * 40: 8}}, "takes too long to match"),
        ({"rank_pattern": {f"x{i}": 8 for i in range(5000)}}, "has 5,000 patterns"),
    ],
)
def test_malformed_configs_are_refused(tmp_path, change, message) -> None:
    folder = write_adapter(tmp_path / "x", QUERY, {**PLAIN, **change})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        inspect_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["a." * 2000, "a" * 16_000, "layers.0.a" * 1000])
def test_long_names_of_modules_do_not_make_patterns_slow(tmp_path, name) -> None:
    state = {key.replace("q_proj", f"{name}.q_proj"): each for key, each in QUERY.items()}
    config = {**PLAIN, "rank_pattern": {".*.*.*b": 8}}
    began = time.process_time()
    with pytest.raises(CheckpointError, match="takes too long to match; write the modules' names"):
        inspect_checkpoint(str(write_adapter(tmp_path / "x", state, config)))
    assert time.process_time() - began < 10


def test_common_patterns_are_accepted(tmp_path) -> None:
    plain = ("q_proj", r".*\.q_proj", r"vision_model\..*(q|k)_proj", r"encoder\.layers\.\d+\..*")
    for pattern in plain:
        change = {"alpha_pattern": {pattern: 2}}
        inspect_checkpoint(str(write_adapter(tmp_path / "x", QUERY, {**PLAIN, **change})))


@pytest.mark.parametrize("prefix", ["module.", "net._orig_mod.", "state_dict.model."])
def test_an_adapter_in_training_code_is_the_plain_one(
    base: VisualCheckpoint, tmp_path: Path, prefix: str
) -> None:
    adapted = adapt(clip_model(), target_modules=TOWER)
    adapted.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}}
    wrapped = {prefix + key: each for key, each in state.items()}
    torch.save({"model": wrapped, "optimizer": moments}, tmp_path / "adapter_model.bin")
    assert_merged(base, tmp_path, adapted)


@pytest.mark.parametrize("case", ["all linear", "saved whole", "bias"])
def test_a_whole_wrapped_state_dict_is_the_merged_model(
    base: VisualCheckpoint, tmp_path: Path, case: str
) -> None:
    adapted = adapt(clip_model(), **CASES[case])
    adapted.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    state = {"state_dict": {f"net.{key}": each for key, each in adapted.state_dict().items()}}
    torch.save({**state, "epoch": 3}, tmp_path / "adapter_model.bin")
    assert_merged(base, tmp_path, adapted)
