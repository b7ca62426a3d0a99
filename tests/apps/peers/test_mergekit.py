"""mergekit's YAML: each method and option against numbers worked out by hand; error messages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands, refused
from foreign import BASE, ONE, TWO, merged, mergekit, random_models, save, three, write

from raymerge.models.checkpoints.opening import open_checkpoint


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


def _merge(run: Commands, config: Path, *more: str) -> dict[str, torch.Tensor]:
    out = config.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    run.ok("merge", config, "--output", out, *more)
    return merged(out)


def _is(tensor: torch.Tensor, *values: float) -> None:
    torch.testing.assert_close(tensor.flatten(), torch.tensor(values).float(), rtol=0, atol=1e-6)


# --- methods -------------------------------------------------------------------------------------


def test_task_arithmetic_adds_weighted_task_vectors(tmp_path: Path, run: Commands) -> None:
    three(tmp_path)
    config = mergekit(tmp_path, "task_arithmetic", {"weight": 0.5}, {"weight": 1.0})
    out = _merge(run, config)
    _is(out["a"], 1 + 0.05 + 0.4, 1 - 0.1 + 0.1, 1 + 0.15 - 0.3, 1 - 0.2)
    _is(out["layers.0.w"], 1.5, 0.0)


def test_task_arithmetic_normalises_by_the_weights_and_scales(
    tmp_path: Path, run: Commands
) -> None:
    three(tmp_path)
    config = mergekit(
        tmp_path, "task_arithmetic", {"weight": 1}, {"weight": 3},
        parameters={"normalize": True, "lambda": 2},
    )  # fmt: skip
    out = _merge(run, config)
    _is(out["a"][:2], 1 + 2 * (0.1 + 1.2) / 4, 1 + 2 * (-0.2 + 0.3) / 4)


def test_weights_that_cancel_are_not_divided_by(tmp_path: Path, run: Commands) -> None:
    three(tmp_path)
    config = mergekit(
        tmp_path, "task_arithmetic", {"weight": 1}, {"weight": -1}, parameters={"normalize": True}
    )
    _is(_merge(run, config)["a"], 1 - 0.3, 1 - 0.3, 1 + 0.6, 1 - 0.4)


def test_linear_is_the_weighted_mean_and_needs_no_base(tmp_path: Path, run: Commands) -> None:
    three(tmp_path)
    config = mergekit(tmp_path, "linear", {"weight": 1}, {"weight": 3}, base_model=None)
    _is(_merge(run, config)["a"], 1.325, 1.025, 0.85, 0.9)
    plain = mergekit(
        tmp_path, "linear", {"weight": 1}, {"weight": 3}, base_model=None,
        parameters={"normalize": False},
    )  # fmt: skip
    _is(_merge(run, plain)["a"], 5.3, 4.1, 3.4, 3.6)


def test_linear_counts_the_base_as_a_model(tmp_path: Path, run: Commands) -> None:
    three(tmp_path)
    config = mergekit(tmp_path, "linear", {"weight": 1}, {"weight": 1}, parameters={"weight": 2})
    _is(_merge(run, config)["a"][:1], (1.1 + 1.4 + 2 * 1.0) / 4)


def test_ties_trims_each_tensor_elects_by_weighted_sum_and_divides_by_what_agrees(
    tmp_path: Path, run: Commands
) -> None:
    three(tmp_path)
    config = mergekit(
        tmp_path, "ties", {"weight": 1, "density": 0.5}, {"weight": 2, "density": 0.5}
    )
    # Kept: (·, ·, 0.3, −0.4) and (0.4, ·, −0.3, ·); weighted (·, ·, 0.3, −0.4), (0.8, ·, −0.6, ·).
    _is(_merge(run, config)["a"], 1 + 0.8 / 2, 1.0, 1 - 0.6 / 2, 1 - 0.4 / 1)


def test_ties_without_normalize_sums(tmp_path: Path, run: Commands) -> None:
    three(tmp_path)
    config = mergekit(
        tmp_path, "ties", {"weight": 1, "density": 1}, {"weight": 1, "density": 1},
        parameters={"normalize": False, "lambda": 0.5, "int8_mask": True},
    )  # fmt: skip
    # The third column sums to zero (up to rounding of the files): its positive entry may stay.
    _is(_merge(run, config)["a"][[0, 1, 3]], 1 + 0.25, 1 - 0.1, 1 - 0.2)


def test_a_column_that_sums_to_zero_keeps_its_positive_entries(
    tmp_path: Path, run: Commands
) -> None:
    save(tmp_path / "base.safetensors", {"a": [0.0, 0.0]})
    save(tmp_path / "one.safetensors", {"a": [0.5, -0.5]})
    save(tmp_path / "two.safetensors", {"a": [-0.5, 0.5]})
    config = mergekit(tmp_path, "ties", {"weight": 1, "density": 1}, {"weight": 1, "density": 1})
    _is(_merge(run, config)["a"], 0.5, 0.5)


def test_rescale_restores_the_sum_of_magnitudes(tmp_path: Path, run: Commands) -> None:
    save(tmp_path / "base.safetensors", {"a": [0.0, 0.0, 0.0, 0.0]})
    save(tmp_path / "one.safetensors", {"a": [1.0, -2.0, 3.0, -4.0]})
    config = mergekit(tmp_path, "ties", {"weight": 1, "density": 0.5}, parameters={"rescale": True})
    _is(_merge(run, config)["a"], 0.0, 0.0, 3 * 10 / 7, -4 * 10 / 7)


@pytest.mark.parametrize(("density", "kept"), [(0, 0), (0.3, 1), (0.5, 2), (0.99, 3), (1, 4)])
def test_a_tensor_keeps_the_share_that_is_asked_for_however_many_are_equal(
    tmp_path: Path, run: Commands, density: float, kept: int
) -> None:
    save(tmp_path / "base.safetensors", {"a": [0.0] * 4})
    save(tmp_path / "one.safetensors", {"a": [1.0] * 4})
    config = mergekit(tmp_path, "ties", {"weight": 1, "density": density})
    _is(_merge(run, config)["a"], *([1.0] * kept + [0.0] * (4 - kept)))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_share_and_the_sum_of_magnitudes(
    tmp_path: Path, run: Commands, method: str
) -> None:
    (base, (one, *_)) = random_models(tmp_path, 1, {"w": (100, 1000)})
    models = [{"model": "m0.safetensors", "parameters": {"weight": 1, "density": 0.25}}]
    config = write(
        tmp_path / "m.yaml",
        {"merge_method": method, "base_model": "base.safetensors", "models": models},
    )
    first, again = _merge(run, config), _merge(run, config)
    other = _merge(run, config, "-o", "seed=1")
    vector, wanted = first["w"] - base["w"], one["w"] - base["w"]
    kept = vector.abs() > 1e-6
    assert float(kept.sum() / (wanted != 0).sum()) == pytest.approx(0.25, abs=0.01)
    assert float(vector.abs().sum()) == pytest.approx(float(wanted.abs().sum()), rel=1e-4)
    assert torch.equal(first["w"], again["w"])
    assert not torch.equal(first["w"], other["w"])


def test_dare_without_rescale_leaves_what_it_keeps_as_it_is(tmp_path: Path, run: Commands) -> None:
    base, (one,) = random_models(tmp_path, 1, {"w": (5000,)})
    models = [{"model": "m0.safetensors", "parameters": {"weight": 1, "density": 0.5}}]
    data = {"merge_method": "dare_linear", "base_model": "base.safetensors", "models": models}
    config = write(tmp_path / "m.yaml", {**data, "parameters": {"rescale": False}})
    out = _merge(run, config)["w"]
    kept = (out - base["w"]).abs() > 1e-6
    torch.testing.assert_close(out[kept], one["w"][kept])
    torch.testing.assert_close(out[~kept], base["w"][~kept], rtol=0, atol=1e-6)


def test_a_merge_does_not_depend_on_how_tensors_are_cut(
    tmp_path: Path, run: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a plain whole-tensor TIES; with parts of one cell, and thresholds from samples."""
    base, models = random_models(tmp_path, 3, {"w": (70, 1000), "v": (9,), "s": ()})
    own = {"weight": 0.4, "density": 0.3}
    entries = [{"model": f"m{k}.safetensors", "parameters": own} for k in range(3)]
    data = {"merge_method": "ties", "base_model": "base.safetensors", "models": entries}
    config = write(tmp_path / "m.yaml", data)
    whole = _merge(run, config)
    monkeypatch.setattr("raymerge.apps.peers.state_dicts._MOST_HELD", 1)
    monkeypatch.setattr("raymerge.apps.peers.state_dicts._BLOCK_BYTES", 4 * 2048)
    monkeypatch.setattr("raymerge.apps.peers.state_dicts._LEAST_COLUMNS", 2048)
    cut = _merge(run, config)
    for name, tensor in base.items():
        vectors = torch.stack([(model[name] - tensor).flatten() for model in models])
        keep = max(1, int(0.3 * tensor.numel()))
        for vector in vectors:
            vector[vector.abs().argsort(descending=True, stable=True)[keep:]] = 0
        sign = torch.where(vectors.sum(0) >= 0, 1.0, -1.0)
        agree = vectors.sign() == sign
        mean = (vectors * agree).sum(0) / agree.sum(0).clamp(min=1)
        torch.testing.assert_close(whole[name].flatten(), tensor.flatten() + mean)
        assert torch.equal(whole[name], cut[name])


# --- parameters of tensors -----------------------------------------------------------------------


def test_the_first_filter_in_a_tensors_name_decides(tmp_path: Path, run: Commands) -> None:
    three(tmp_path)
    weight = [
        {"filter": "layers.0", "value": 0.5},
        {"filter": "layers", "value": "1e-1"},
        {"value": 0},
    ]
    config = mergekit(tmp_path, "task_arithmetic", {"weight": weight}, {"weight": 0})
    out = _merge(run, config)
    _is(out["a"], 1, 1, 1, 1)
    _is(out["layers.0.w"], 0.5, 2.0)
    _is(out["layers.2.w"], 4.0, 4.1)


def test_without_a_matching_filter_the_general_parameter_applies(
    tmp_path: Path, run: Commands
) -> None:
    three(tmp_path)
    config = mergekit(
        tmp_path, "task_arithmetic", {"weight": {"filter": "layers", "value": 0}}, {"weight": 0},
        parameters={"weight": 1, "lambda": [{"filter": "a", "value": 0.5}]},
    )  # fmt: skip
    out = _merge(run, config)
    _is(out["a"][:1], 1.05)
    _is(out["layers.0.w"], 0.0, 2.0)


def test_a_list_is_spread_over_the_layers(tmp_path: Path, run: Commands) -> None:
    states = [
        {"a": [0.0], "h.0.w": [0.0], "h.1.w": [0.0], "h.2.w": [0.0]},
        {"a": [1.0], "h.0.w": [1.0], "h.1.w": [1.0], "h.2.w": [1.0]},
    ]
    for name, state in zip(("base", "one"), states, strict=True):
        save(tmp_path / f"{name}.safetensors", state)
    config = mergekit(tmp_path, "task_arithmetic", {"weight": [0.2, 0.6]})
    out = _merge(run, config)
    _is(torch.cat([out[k] for k in ("a", "h.0.w", "h.1.w", "h.2.w")]), 0.2, 0.2, 0.4, 0.6)


# --- files and dtypes ----------------------------------------------------------------------------


def test_dtypes(tmp_path: Path, run: Commands) -> None:
    three(tmp_path)
    own = ({"weight": 0.5}, {"weight": 1.0})
    whole = _merge(run, mergekit(tmp_path, "task_arithmetic", *own))
    narrow = _merge(run, mergekit(tmp_path, "task_arithmetic", *own, out_dtype="float16"))
    assert narrow["a"].dtype == torch.float16
    torch.testing.assert_close(narrow["a"], whole["a"].half())
    computed = _merge(run, mergekit(tmp_path, "task_arithmetic", *own, dtype="bfloat16"))
    one, two, base = (torch.tensor(s["a"]).bfloat16() for s in (ONE, TWO, BASE))
    vectors = torch.stack([one - base, two - base]) * torch.tensor([[0.5], [1.0]]).bfloat16()
    assert torch.equal(computed["a"], base + vectors.sum(0))


def test_mixed_dtypes_are_merged_in_the_widest(tmp_path: Path, run: Commands) -> None:
    save(tmp_path / "base.safetensors", {"a": [1.0]}, torch.bfloat16)
    save(tmp_path / "one.safetensors", {"a": [1.001]})
    out = _merge(run, mergekit(tmp_path, "task_arithmetic", {"weight": 1}))
    assert out["a"].dtype == torch.float32
    _is(out["a"], 1.001)


def test_buffers_are_copied_and_the_bases_own_tensors_are_left_out(
    tmp_path: Path, run: Commands
) -> None:
    ids = torch.arange(3)
    save(tmp_path / "base.safetensors", {"a": [1.0], "ids": ids, "text": [1.0]})
    save(tmp_path / "one.safetensors", {"a": [2.0], "ids": ids})
    config = mergekit(tmp_path, "task_arithmetic", {"weight": 0.5})
    ran = run.ok("merge", config, "--output", tmp_path / "out")
    out = merged(tmp_path / "out")
    assert sorted(out) == ["a", "ids"]
    assert torch.equal(out["ids"], ids)
    assert "1 of the base's tensors are in no model and are left out (text)" in ran.err


def test_a_base_among_the_models_is_not_weighted(tmp_path: Path, run: Commands) -> None:
    three(tmp_path)
    config = mergekit(
        tmp_path, "task_arithmetic", {"weight": 9}, {"weight": 1}, base_model="one.safetensors"
    )
    _is(_merge(run, config)["a"], *TWO["a"])


def test_folders_of_transformers_are_read_and_their_config_is_copied(
    tmp_path: Path, run: Commands
) -> None:
    for name, state in (("base", BASE), ("one", ONE)):
        folder = tmp_path / name
        save(folder / "model-1.safetensors", {"a": state["a"]})
        save(folder / "model-2.safetensors", {k: v for k, v in state.items() if k != "a"})
        weight_map = {k: f"model-{1 if k == 'a' else 2}.safetensors" for k in state}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps({"x": name, "torch_dtype": "float32"}))
        (folder / "tokenizer.json").write_text("{}")
    models = [{"model": "one", "parameters": {"weight": 1}}]
    data = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    out = _merge(run, write(tmp_path / "m.yaml", {**data, "out_dtype": "bfloat16"}))
    torch.testing.assert_close(out["a"], torch.tensor(ONE["a"]).bfloat16())
    copied = json.loads((tmp_path / "out" / "config.json").read_text())
    assert copied == {"x": "base", "torch_dtype": "bfloat16"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_names_stay_as_the_files_have_them(tmp_path: Path, run: Commands) -> None:
    """Hugging Face's CLIP is shown under open_clip's names elsewhere, not here."""
    keys = ("embeddings.class_embedding", "pre_layrnorm.weight")
    for name, value in (("base", 0.0), ("one", 1.0)):
        state = {f"vision_model.{key}": [value] * 4 for key in keys}
        save(
            tmp_path / f"{name}.safetensors",
            {**state, "vision_model.embeddings.patch_embedding.weight": torch.zeros(4, 3, 2, 2)},
        )
    out = _merge(run, mergekit(tmp_path, "task_arithmetic", {"weight": 0.5}))
    _is(out[f"vision_model.{keys[0]}"], 0.5, 0.5, 0.5, 0.5)


def test_the_output_folder_has_a_model_card_and_the_file(tmp_path: Path, run: Commands) -> None:
    three(tmp_path)
    config = mergekit(
        tmp_path, "ties", *[{"weight": 0.3, "density": 0.2}] * 2, parameters={"normalize": True}
    )
    ran = run.ok("merge", config, "--output", tmp_path / "out")
    assert ran.out == f"written to {tmp_path / 'out'}\n"
    said = "ties of 2 models onto base base.safetensors: normalize true, lambda 1"
    assert said in ran.err
    assert "each weight 0.3, density 0.2" in ran.err
    out = tmp_path / "out"
    assert (out / "mergekit_config.yml").read_text() == config.read_text()
    card = (out / "README.md").read_text()
    assert card.startswith("---\ntags:\n- merge\n")
    assert "one.safetensors" in card
    assert open_checkpoint(out / "model.safetensors").specs.keys() == BASE.keys()
    refused(run("merge", config, "--output", out), "is in use")
    run.ok("merge", config, "--output", out, "--overwrite", "-o", "parameters.lambda=0.5")
    assert "lambda: 0.5" in (out / "mergekit_config.yml").read_text()


def test_a_replaced_merge_is_kept_until_the_new_one_is_whole(
    tmp_path: Path, run: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(tmp_path)
    config, out = mergekit(tmp_path, "task_arithmetic", {"weight": 0.5}), tmp_path / "out"
    run.ok("merge", config, "--output", out)
    names = ("model.safetensors", "mergekit_config.yml", "README.md")
    old = {name: (out / name).read_bytes() for name in names}

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    again = ("merge", config, "--output", out, "--overwrite", "-o", "parameters.lambda=0.5")
    with monkeypatch.context() as patch:
        patch.setattr("raymerge.apps.peers.job.Job._model_card", killed)
        run(*again)
    assert {name: (out / ".previous" / name).read_bytes() for name in names} == old
    run.ok(*again)
    assert not (out / ".previous").exists()
    assert (out / "model.safetensors").read_bytes() != old["model.safetensors"]


def test_the_card_shows_names_literally(tmp_path: Path, run: Commands) -> None:
    three(tmp_path)
    (tmp_path / "one.safetensors").rename(tmp_path / "<img src=x>`|.safetensors")
    config = mergekit(tmp_path, "task_arithmetic", {"weight": 0.5})
    config.write_text(config.read_text().replace("one.safetensors", "<img src=x>`|.safetensors"))
    run.ok("merge", config, "--output", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<img" not in card
    assert "&#60;img src=x&#62;&#96;&#124;.safetensors" in card


@pytest.mark.parametrize(
    "content",
    [b"junk", b"[1]", b"3", b"NaN", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 100_000, b"", b"\xff"],
)
def test_a_damaged_config_of_a_model_is_named_before_anything_is_written(
    tmp_path: Path, run: Commands, content: bytes
) -> None:
    three(tmp_path)
    config = mergekit(tmp_path, "task_arithmetic", {"weight": 0.5})
    text = config.read_text()
    for name in ("base", "one"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.safetensors").rename(tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_bytes(content)
        text = text.replace(f"{name}.safetensors", name)
    config.write_text(text)
    refused(run("merge", config, "--output", tmp_path / "out"), "base/config.json: ")
    assert not (tmp_path / "out").exists()


def test_plan_prints_the_merge_and_writes_nothing(tmp_path: Path, run: Commands) -> None:
    three(tmp_path)
    config = mergekit(tmp_path, "task_arithmetic", {"weight": 0.5}, {"weight": 1.0})
    before = sorted(tmp_path.iterdir())
    ran = run.ok("plan", config)
    assert "task_arithmetic of 2 models onto base base.safetensors" in ran.out
    assert "two.safetensors: weight 1" in ran.out
    assert "3 tensors, 8 numbers" in ran.out
    plan = json.loads(run.ok("plan", config, "--json").out)
    assert (plan["tool"], plan["numbers"], plan["written_bytes"]) == ("mergekit", 8, 32)
    assert sorted(tmp_path.iterdir()) == before


# --- wrong input ---------------------------------------------------------------------------------

_W = {"weight": 1}


@pytest.mark.parametrize(
    ("method", "own", "keys", "mentions"),
    [
        ("tie", [_W], {}, ["merge_method", "did you mean ties"]),
        ("slerp", [_W], {}, ["merge_method: 'slerp'", "known: linear"]),
        ("ties", [{"weight": 1, "densty": 1}], {}, ["models[0].parameters: densty", "density"]),
        ("ties", [{"weight": 1, "lambda": 1}], {}, ["models[0].parameters.lambda", "move it"]),
        ("linear", [{"weight": 1, "density": 1}], {}, ["density: unknown key"]),
        ("ties", [{"weight": 1, "density": 1.5}], {}, ["density: must be in [0, 1], got 1.5"]),
        ("ties", [{"density": 1}], {}, ["weight: missing for one.safetensors"]),
        ("linear", [_W], {}, ["weight: missing for the base base.safetensors"]),
        ("ties", [{"weight": "much"}], {}, ["weight: must be a number, got 'much'"]),
        ("ties", [{"weight": 10**400}], {}, ["weight: must be a number, got 1000"]),
        ("ties", [{"weight": [{"filter": "a"}]}], {}, ["weight[0]: expected value and filter"]),
        (
            "ties",
            [_W],
            {"parameters": {"normalize": 3}},
            ["must be true or false, got 3"],
        ),
        ("ties", [_W], {"base_model": None}, ["base_model: missing; ties needs it"]),
        ("ties", [_W], {"slices": [{}]}, ["slices: cannot be expressed"]),
        ("ties", [_W], {"tokenizer_source": "union"}, ["tokenizer_source: cannot be"]),
        ("ties", [_W], {"chat_template": "auto"}, ["chat_template: cannot be"]),
        (
            "ties",
            [_W],
            {"normalize": True},
            ["normalize: is a parameter; move it under parameters"],
        ),
        ("ties", [_W], {"dtyp": "float32"}, ["dtyp: unknown key; did you mean dtype"]),
        ("ties", [_W], {"dtype": "int8"}, ["dtype: 'int8' is unknown"]),
        ("ties", [_W], {"base_model": "no.safetensors"}, ["no.safetensors: no such file"]),
        ("ties", [_W], {"models": []}, ["models: expected a list"]),
        ("ties", [_W], {"models": [{"model": 3}]}, ["models[0].model: must be a path, got 3"]),
        ("linear", [_W, {"weight": -1}], {"base_model": None}, ["sum to 0"]),
        ("dare_ties", [_W], {"seed": "x"}, ["seed: must be an integer, got 'x'"]),
    ],
)
def test_settings_that_cannot_be_expressed_are_one_line(
    tmp_path: Path,
    run: Commands,
    method: str,
    own: list[dict[str, Any]],
    keys: dict[str, Any],
    mentions: list[str],
) -> None:
    three(tmp_path)
    config = mergekit(tmp_path, method, *own, **keys)
    for command in (["plan"], ["merge", "--output", str(tmp_path / "out")]):
        refused(run(*command, config), *mentions)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "mention"),
    [
        ({"a": None}, "two.safetensors: a missing, though in"),
        ({"a": [1.0, 2.0]}, "a has shape [2], but [4] in"),
        ({"new": [1.0]}, "new missing, though in"),
        ({"a": [float("nan")] * 4}, "a holds 4 NaN or Inf values"),
        ({"ids": torch.arange(2)}, "ids"),
    ],
)
def test_models_that_do_not_fit_are_one_line(
    tmp_path: Path, run: Commands, change: dict[str, Any], mention: str
) -> None:
    three(tmp_path)
    state = {k: v for k, v in {**TWO, **change}.items() if v is not None}
    save(tmp_path / "two.safetensors", state)
    config = mergekit(tmp_path, "task_arithmetic", _W, _W)
    ran = run("merge", config, "--output", tmp_path / "out")
    assert ran.code == 2
    assert mention in ran.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_buffers_that_differ_are_refused(tmp_path: Path, run: Commands) -> None:
    for name, ids in (("base", [0, 1]), ("one", [0, 2])):
        save(tmp_path / f"{name}.safetensors", {"a": [1.0], "ids": torch.tensor(ids)})
    config = mergekit(tmp_path, "task_arithmetic", _W)
    refused(run("plan", config), "ids is not floating point and differs")


def test_overflow_in_a_narrow_dtype_is_refused(tmp_path: Path, run: Commands) -> None:
    save(tmp_path / "base.safetensors", {"a": [1e5]})
    save(tmp_path / "one.safetensors", {"a": [2e5]})
    read = mergekit(tmp_path, "task_arithmetic", _W, dtype="float16")
    ran = run("merge", read, "--output", tmp_path / "out")
    assert (ran.code, "a overflows float16" in ran.err) == (2, True)
    written = mergekit(tmp_path, "task_arithmetic", _W, out_dtype="float16")
    ran = run("merge", written, "--output", tmp_path / "out")
    assert (ran.code, "the merged numbers overflow" in ran.err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_resume_and_other_commands_are_refused(tmp_path: Path, run: Commands) -> None:
    three(tmp_path)
    config = mergekit(tmp_path, "task_arithmetic", _W)
    refused(run("merge", config, "--output", tmp_path / "out", "--resume"), "--resume")
    refused(run("eval", config), "state dicts")
    refused(run("merge", config), "output: missing")
    refused(run("merge", config, "--output", tmp_path), "is in use")
