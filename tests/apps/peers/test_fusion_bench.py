"""fusion_bench's pools: its formulas by hand, how its files are read, AdaMerging as a config."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from commands import Commands, refused
from foreign import merged, random_models, save, three, write
from huggingface_world import clip_model
from huggingface_world import save as save_model
from safetensors.torch import load_file

from raymerge.apps.peers import open_foreign
from raymerge.apps.peers.job import Job
from raymerge.config import Config
from raymerge.config.methods import AdaMerging
from raymerge.errors import ConfigError

POOL = {"_pretrained_": "base.safetensors", "one": "one.safetensors", "two": "two.safetensors"}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


def _merge(run: Commands, root: Path, data: dict[str, Any], *more: str) -> dict[str, torch.Tensor]:
    shutil.rmtree(root / "out", ignore_errors=True)
    run.ok("merge", write(root / "pool.yaml", data), "--output", root / "out", *more)
    return merged(root / "out")


def _method(name: str, **options: Any) -> dict[str, Any]:
    return {"_target_": f"fusion_bench.method.{name}", **options}


def _is(tensor: torch.Tensor, *values: float) -> None:
    torch.testing.assert_close(tensor.flatten(), torch.tensor(values), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "a"),
    [
        ("simple_average", (1.25, 0.95, 1.0, 0.8)),
        (_method("SimpleAverageAlgorithm", show_pbar=True), (1.25, 0.95, 1.0, 0.8)),
        (_method("TaskArithmeticAlgorithm", scaling_factor=0.5), (1.25, 0.95, 1.0, 0.8)),
        (_method("WeightedAverageAlgorithm", weights=[1, 3]), (1.325, 1.025, 0.85, 0.9)),
        (
            _method("WeightedAverageAlgorithm", weights=[1, 3], normalize=False),
            (5.3, 4.1, 3.4, 3.6),
        ),
        ({"name": "linear_interpolation", "t": 0.75}, (1.325, 1.025, 0.85, 0.9)),
    ],
)
def test_averages_and_task_arithmetic(
    tmp_path: Path, run: Commands, method: Any, a: tuple[float, ...]
) -> None:
    three(tmp_path)
    _is(_merge(run, tmp_path, {"models": POOL, "method": method})["a"], *a)


@pytest.mark.parametrize("merge", ["sum", "mean", "max"])
@pytest.mark.parametrize("threshold", [20, 0.35])
def test_ties_trims_a_whole_model_at_once(
    tmp_path: Path, run: Commands, merge: str, threshold: float
) -> None:
    """Against the formula on the concatenated vectors."""
    base, models = random_models(tmp_path, 3, {"b": (40, 25), "a": (777,), "s": ()})
    pool = {"_pretrained_": "base.safetensors"} | {f"m{k}": f"m{k}.safetensors" for k in range(3)}
    method = _method("TiesMergingAlgorithm", scaling_factor=0.3, threshold=threshold)
    data = {"modelpool": {"models": pool}, "method": {**method, "merge_func": merge}}
    out = _merge(run, tmp_path, data)
    names = sorted(base)
    flat = [torch.cat([m[n].flatten() - base[n].flatten() for n in names]) for m in models]
    vectors = torch.stack(flat)
    count = vectors.shape[1]
    density = threshold / 100 if threshold > 1 else threshold
    kth = vectors.abs().kthvalue(count - int(density * count), dim=1, keepdim=True).values
    vectors = vectors * (vectors.abs() >= kth)
    sign = vectors.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    agreeing = vectors * torch.where(sign > 0, vectors > 0, vectors < 0)
    total = agreeing.sum(0)
    if merge == "mean":
        total = total / (agreeing != 0).sum(0).clamp(min=1)
    if merge == "max":
        total = agreeing.abs().amax(0) * sign
    wanted = torch.cat([base[n].flatten() for n in names]) + 0.3 * total
    torch.testing.assert_close(torch.cat([out[n].flatten() for n in names]), wanted)


def test_a_plain_pool_gets_its_method_on_the_command_line(tmp_path: Path, run: Commands) -> None:
    three(tmp_path)
    config = write(tmp_path / "pool.yaml", {"models": POOL})
    refused(run("plan", config), "method: missing", "-o method=simple_average")
    ran = run.ok("plan", config, "-o", "method.name=ties_merging", "-o", "method.threshold=50")
    assert "ties_merging of 2 models onto base.safetensors: scaling_factor 0.3" in ran.out
    assert "threshold 50" in ran.out


def test_the_result_has_the_dtype_of_the_pretrained_model(tmp_path: Path, run: Commands) -> None:
    save(tmp_path / "base.safetensors", {"a": [1.0]}, torch.float16)
    save(tmp_path / "one.safetensors", {"a": [2.0]})
    pool = {"_pretrained_": "base.safetensors", "one": "one.safetensors"}
    out = _merge(run, tmp_path, {"models": pool, "method": "task_arithmetic"})
    assert out["a"].dtype == torch.float16
    _is(out["a"].float(), torch.tensor(1.3).half().item())


def test_models_named_in_every_way(tmp_path: Path, run: Commands) -> None:
    three(tmp_path)
    method = {"name": "task_arithmetic", "scaling_factor": "${strength}"}
    mapping = {
        "_pretrained_": {
            "_target_": "transformers.AutoModel.from_pretrained",
            "pretrained_model_name_or_path": "${...folder}/base.safetensors",
        },
        "one": {"model_name": "ViT-B-32", "pickle_path": "${folder}/one.safetensors"},
        "two": "two.safetensors",
    }
    data = {"folder": ".", "strength": 0.5, "models": mapping, "method": method}
    wanted = _merge(run, tmp_path, data)
    _is(wanted["a"], 1.25, 0.95, 1.0, 0.8)
    listed = [{"name": name, "path": path} for name, path in POOL.items()]
    method = {"name": "task_arithmetic", "scaling_factor": 0.5}
    again = _merge(run, tmp_path, {"modelpool": {"models": listed}, "method": method})
    assert all(torch.equal(wanted[key], again[key]) for key in wanted)


def test_a_pool_of_clip_vision_models_merges_vision_alone(tmp_path: Path, run: Commands) -> None:
    state = {"vision_model.w": [1.0, 1.0], "text_model.w": [1.0]}
    save(tmp_path / "base.safetensors", state)
    save(tmp_path / "one.safetensors", {"vision_model.w": [2.0, 1.0], "text_model.w": [3.0]})
    pool = {
        "_target_": "fusion_bench.modelpool.CLIPVisionModelPool",
        "models": {"_pretrained_": "base.safetensors", "one": "one.safetensors"},
    }
    out = _merge(run, tmp_path, {"modelpool": pool, "method": "task_arithmetic"})
    assert list(out) == ["vision_model.w"]


@pytest.mark.parametrize(
    ("data", "mentions"),
    [
        ({"method": "tie_merging"}, ["'tie_merging'", "did you mean ties_merging"]),
        ({"method": {"name": "ties_merging", "treshold": 1}}, ["treshold", "mean threshold"]),
        (
            {"method": {"name": "ties_merging", "threshold": 0}},
            ["must be above 0", "got 0"],
        ),
        (
            {"method": {"name": "ties_merging", "merge_func": "min"}},
            ["merge_func: must", "got 'min'"],
        ),
        ({"method": {"name": "ties_merging", "remove_keys": ["a"]}}, ["remove_keys"]),
        ({"method": {"name": "weighted_average", "weights": [1]}}, ["expected 2 numbers"]),
        ({"method": {"name": "task_arithmetic", "scaling_factor": "x"}}, ["'x' is not a number"]),
        ({"method": {"name": "task_arithmetic", "scaling_factor": 10**400}}, ["is not a number"]),
        ({"method": {"name": "task_arithmetic", "scaling_factor": "nan"}}, ["is not a number"]),
        ({"models": {"one": "one.safetensors"}, "method": "ties_merging"}, ["models._pretrained_"]),
        ({"models": {"_pretrained_": "base.safetensors"}}, ["nothing to merge"]),
        ({"models": {"one": 3}}, ["models.one: expected a path"]),
        ({"models": {"one": {"peft_name": "x"}}}, ["peft_name", "adapters"]),
        ({"models": {"one": "${gone}/one"}}, ["models.one: ${gone} is not in this file"]),
        ({"models": {"one": "${models.one}"}}, ["refers to itself"]),
        ({"models": {"one": "nowhere.safetensors"}}, ["nowhere.safetensors: no such file"]),
        ({"modelpool": {"defaults": ["x"]}}, ["Hydra", "--resolve"]),
        ({"models": {"a": "org/name", "b": "one.safetensors"}}, ["org/name", "hub"]),
    ],
)
def test_settings_that_cannot_be_expressed_are_one_line(
    tmp_path: Path, run: Commands, data: dict[str, Any], mentions: list[str]
) -> None:
    three(tmp_path)
    config = write(tmp_path / "pool.yaml", {"models": POOL, "method": "simple_average", **data})
    refused(run("plan", config), *mentions)


# --- AdaMerging ----------------------------------------------------------------------------------

ADAMERGING = {
    "name": "clip_layer_wise_adamerging", "weights": None, "optimizer": "adam", "lr": 1e-4,
    "init_values": 0.2, "clamp_weights": True, "tie_weights": True, "strict": False, "devices": 1,
    "batch_size": 8, "num_workers": 8, "max_steps": 30, "fast_dev_run": "${fast_dev_run}",
    "save_merging_weights": "merging_weights.pt", "cache_dir": "outputs",
}  # fmt: skip
CLIP = {
    "_target_": "fusion_bench.modelpool.CLIPVisionModelPool",
    "models": {
        "_pretrained_": "openai/clip-vit-base-patch32",
        "sun397": "tanganke/clip-vit-base-patch32_sun397",
        "stanford-cars": "cars.safetensors",
    },
}


def test_adamerging_becomes_a_config_of_raymerges_own(tmp_path: Path) -> None:
    save(tmp_path / "cars.safetensors", {"a": [1.0]})
    tasks = [{"name": "sun397", "adapt": "data/sun"}, {"name": "stanford-cars", "adapt": "cars"}]
    path = write(tmp_path / "pool.yaml", {"modelpool": CLIP, "method": ADAMERGING, "tasks": tasks})
    config = open_foreign(path, ["optimizer.schedule=cosine"])
    assert isinstance(config, Config)
    assert isinstance(config.method, AdaMerging)
    assert (config.method.granularity, config.method.init) == ("tensor", 0.2)
    assert config.method.clamp == "forward"
    given = config.optimizer
    assert (given.lr, given.steps, given.batch_size, given.schedule) == (1e-4, 30, 8, "cosine")
    assert (config.model.arch, config.model.pretrained) == ("ViT-B-32-quickgelu", "openai")
    sun, cars = config.tasks
    assert sun.checkpoint == "hf-hub:tanganke/clip-vit-base-patch32_sun397"
    assert cars.checkpoint == str(tmp_path / "cars.safetensors")
    assert (len(sun.classnames), len(cars.classnames)) == (397, 196)


def test_adamerging_without_images_says_what_to_add(tmp_path: Path, run: Commands) -> None:
    path = write(tmp_path / "pool.yaml", {"modelpool": CLIP, "method": ADAMERGING})
    refused(run("plan", path), "learns from images", "tasks", "sun397, stanford-cars")


def test_raymerges_own_files_are_not_read_as_other_tools_files(tmp_path: Path) -> None:
    three(tmp_path)
    own = {"model": "local-dir:x", "tasks": [], "method": "average"}
    assert open_foreign(write(tmp_path / "own.yaml", own)) is None
    pool = write(tmp_path / "pool.yaml", {"models": POOL, "method": "simple_average"})
    job = open_foreign(pool)
    assert isinstance(job, Job)
    assert yaml.safe_load(job.text) == yaml.safe_load(pool.read_text())


LORA = "fusion_bench.models.linearized.vision_model.load_lora_vision_model_hf"


def _lora_pool(root: Path) -> dict[str, Any]:
    """Write a base and two adapters; the pool is laid out as fusion_bench's own."""
    model, generator = clip_model(), torch.Generator().manual_seed(1)
    save_model(model, root / "base")
    pool: dict[str, Any] = {"_pretrained_": {"_target_": "x.load_fft_vision_model_hf"}}
    pool["_pretrained_"]["model_name"] = "base"
    for name, targets in (("one", ["q_proj", "v_proj"]), ("two", ["k_proj", "out_proj", "fc1"])):
        towers = [f"vision_model.*{target}" for target in targets]
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=f".*({'|'.join(towers)})")
        adapted = peft.get_peft_model(deepcopy(model), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(root / name)
        save_model(adapted.merge_and_unload(), root / f"whole-{name}")
        pool[name] = {"_target_": LORA, "base_model_name": "base", "peft_name": name}
        pool[name]["merge_and_unload"] = True
    return pool


@pytest.mark.parametrize("method", ["simple_average", "task_arithmetic", "ties_merging"])
def test_its_own_lora_pool_equals_the_pool_of_merged_models(
    tmp_path: Path, run: Commands, method: str
) -> None:
    models = _lora_pool(tmp_path)
    data = {"_target_": "fusion_bench.modelpool.CLIPVisionModelPool", "models": models}
    ours = _merge(run, tmp_path, {**data, "method": method})
    assert (tmp_path / "out" / "config.json").is_file()
    whole = {name: f"whole-{name}" for name in ("one", "two")}
    theirs = _merge(run, tmp_path, {**data, "models": {**models, **whole}, "method": method})
    assert ours.keys() == theirs.keys()
    assert all(key.startswith("vision_model.") for key in ours)
    for key, each in theirs.items():
        torch.testing.assert_close(ours[key], each, rtol=1e-5, atol=1e-6)


def test_adamerging_takes_the_adapters_as_checkpoints(tmp_path: Path) -> None:
    models = _lora_pool(tmp_path)
    tasks = [{"name": n, "adapt": "images", "classnames": ["a", "b"]} for n in ("one", "two")]
    data = {"models": models, "method": "clip_layer_wise_adamerging", "tasks": tasks}
    data["model"] = "local-dir:base"
    config = open_foreign(write(tmp_path / "pool.yaml", data))
    assert isinstance(config, Config)
    assert [task.checkpoint for task in config.tasks] == [str(tmp_path / n) for n in ("one", "two")]
    models["two"]["base_model_name"] = "other"
    with pytest.raises(ConfigError, match=r"base_model_name: 'other' is not the _pretrained_"):
        open_foreign(write(tmp_path / "pool.yaml", data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"merge_and_unload": False},
            "merge_and_unload: False would average the adapters' factors",
        ),
        ({"merge_and_unload": None}, "write true"),
        ({"peft_name": None}, "one.peft_name: expected a path"),
        ({"peft_name": "base"}, "a LoRA adapter over a Hugging Face CLIP is expected"),
        ({"_target_": "x.load_l_lora_vision_model_hf"}, "those of load_lora_vision_model_hf are"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_with_the_remedy(
    tmp_path: Path, run: Commands, change: dict[str, Any], message: str
) -> None:
    models = _lora_pool(tmp_path)
    models["one"].update(change)
    config = write(tmp_path / "pool.yaml", {"models": models, "method": "simple_average"})
    refused(run("plan", config), message)


def test_models_as_training_code_saves_them_are_the_plain_ones(
    tmp_path: Path, run: Commands
) -> None:
    three(tmp_path)
    plain = _merge(run, tmp_path, {"models": POOL, "method": "task_arithmetic"})
    for name, prefix in (("one", "_orig_mod."), ("two", "net.model.")):
        state = load_file(tmp_path / f"{name}.safetensors")
        wrapped = {f"{prefix}{key}": each for key, each in state.items()}
        other = {key: each + 1 for key, each in state.items()}
        moments = {"state": {0: {"exp_avg": torch.ones(2)}}}
        torch.save({"model": wrapped, "ema": other, "optimizer": moments}, tmp_path / f"{name}.pt")
    pool = {"_pretrained_": "base.safetensors", "one": "one.pt", "two": "two.pt"}
    ours = _merge(run, tmp_path, {"models": pool, "method": "task_arithmetic"})
    assert all(torch.equal(ours[key], each) for key, each in plain.items())
    pool["two"] = "two.pt#ema"
    other = _merge(run, tmp_path, {"models": pool, "method": "task_arithmetic"})
    torch.testing.assert_close(other["a"], plain["a"] + 0.3)
