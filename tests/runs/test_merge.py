"""A run from end to end: what every method exports, how it is scored, and how it is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from commands import cache_tokenizer, read_json, read_steps, tree
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from world import World

import raymerge
from raymerge.config import Config
from raymerge.engine.driver.loop import StepRecord
from raymerge.engine.driver.monitor import Monitor
from raymerge.engine.driver.state import LearningState
from raymerge.errors import RunError, UserError
from raymerge.merging.guard import CollapseGuard
from raymerge.runs.folder import Recorder
from raymerge.runs.merge import MergeResult, evaluate, merge
from raymerge.runs.state import learning_states

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(autouse=True)
def only_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the drawing, which is tested elsewhere and takes longer than these merges."""
    cache_tokenizer(monkeypatch)
    monkeypatch.setattr("raymerge.runs.folder.write_plots", lambda folder: None)
    monkeypatch.setattr("raymerge.runs.folder.write_report", lambda folder: None)


Merge = Callable[..., MergeResult]


@pytest.fixture
def run(world: World, tmp_path: Path) -> Merge:
    """Merge the world, with changes to its config, into ``tmp_path / name``."""

    def run(name: str = "out", resume: bool = False, **changes: Any) -> MergeResult:
        return merge(_config(world, tmp_path / name, **changes), resume=resume)

    return run


def _config(world: World, output: Path, untested: bool = False, **changes: Any) -> Config:
    if untested:
        changes["tasks"] = [
            {k: v for k, v in task.items() if k != "test"} for task in world.config["tasks"]
        ]
    cluster = {"cpus_per_worker": 1, **changes.pop("cluster", {})}
    return world.parse(output=output, cluster=cluster, **changes)


@pytest.fixture(scope="module")
def pretrained(world: World) -> dict[str, Tensor]:
    return load_file(world.root / "pretrained" / WEIGHTS)


@pytest.fixture(scope="module")
def experts(world: World) -> list[dict[str, Tensor]]:
    return [load_file(task["checkpoint"]) for task in world.config["tasks"]]


def _weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / WEIGHTS)


def _lambdas(output: Path) -> Tensor:
    return torch.tensor(read_json(output / "lambdas.json")["values"], dtype=torch.float64)


# --- methods -----------------------------------------------------------------------------------


def test_zero_shot_exports_the_pretrained_model(
    run: Merge, pretrained: dict[str, Tensor], tmp_path: Path
) -> None:
    run(method={"name": "zero_shot"}, untested=True)
    merged = _weights(tmp_path / "out")
    assert merged.keys() == pretrained.keys()
    assert all(torch.equal(merged[key], pretrained[key]) for key in merged)


def test_lambda_zero_is_the_pretrained_model(
    run: Merge, pretrained: dict[str, Tensor], tmp_path: Path
) -> None:
    for method in ({"name": "task_arithmetic", "scaling": 0}, {"name": "ties", "scaling": 0}):
        run(method["name"], method=method, untested=True)
        merged = _weights(tmp_path / str(method["name"]))
        assert all(torch.equal(merged[key], pretrained[key]) for key in pretrained)


def test_average_is_the_mean_of_the_experts(
    run: Merge,
    pretrained: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    result = run(method={"name": "average"}, untested=True)
    merged = _weights(tmp_path / "out")
    for key in experts[0]:
        mean = torch.stack([expert[key] for expert in experts]).mean(0)
        torch.testing.assert_close(merged[key], mean, rtol=1e-5, atol=1e-6)
    for key in pretrained.keys() - experts[0].keys():
        assert torch.equal(merged[key], pretrained[key])
    assert result.lambdas is not None
    assert result.lambdas.tolist() == [[0.25]] * 4


@pytest.mark.parametrize("scaling", [0.3, 1.0, -0.5])
def test_task_arithmetic_adds_the_scaled_task_vectors(
    run: Merge,
    pretrained: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
    tmp_path: Path,
    scaling: float,
) -> None:
    run(method={"name": "task_arithmetic", "scaling": scaling}, untested=True)
    merged = _weights(tmp_path / "out")
    for key in experts[0]:
        vectors = sum(expert[key] - pretrained[key] for expert in experts)
        expected = pretrained[key] + scaling * vectors
        torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-6)


def _ties(vectors_KP: Tensor, density: float, mean: bool) -> Tensor:
    """Return TIES by sorting, over one whole vector."""
    keep = int(density * vectors_KP.shape[1])
    thresholds = vectors_KP.abs().sort(descending=True).values[:, keep]
    trimmed = torch.where(vectors_KP.abs() >= thresholds[:, None], vectors_KP, 0)
    sign = trimmed.sum(0).sign()
    agreeing = torch.where(trimmed.sign() == sign, trimmed, 0)
    return agreeing.sum(0) / ((agreeing != 0).sum(0).clamp(min=1) if mean else 1)


@pytest.mark.parametrize(("how", "scaling"), [("sum", 0.3), ("mean", 1.0)])
def test_ties_with_its_papers_default_scaling(
    run: Merge,
    pretrained: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
    tmp_path: Path,
    how: str,
    scaling: float,
) -> None:
    run(method={"name": "ties", "merge": how}, untested=True)
    keys = list(experts[0])
    flat = torch.cat([pretrained[key].flatten() for key in keys])
    vectors = torch.stack(
        [torch.cat([expert[key].flatten() for key in keys]) - flat for expert in experts]
    )
    merged = _weights(tmp_path / "out")
    got = torch.cat([merged[key].flatten() for key in keys])
    expected = flat + scaling * _ties(vectors, 0.2, how == "mean")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_trim_scopes_of_ties_differ(run: Merge, tmp_path: Path, how: str) -> None:
    merged = []
    for scope in ("visual", "full", "tensor"):
        run(scope, method={"name": "ties", "merge": how, "trim_scope": scope}, untested=True)
        merged.append(_weights(tmp_path / scope)["visual.conv1.weight"])
    assert not torch.equal(merged[0], merged[1])
    assert not torch.equal(merged[0], merged[2])
    assert not torch.equal(merged[1], merged[2])


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
@pytest.mark.parametrize("task_vectors", ["raw", "ties"])
@pytest.mark.parametrize("clamp", ["projected", "forward", "none"])
def test_every_kind_of_adamerging_learns_what_it_exports(
    run: Merge,
    pretrained: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
    tmp_path: Path,
    granularity: str,
    task_vectors: str,
    clamp: str,
) -> None:
    """A large lr drives λ to the bounds, where the three clamps part."""
    method = {"granularity": granularity, "task_vectors": task_vectors, "clamp": clamp}
    result = run(method=method, optimizer={"lr": 0.2, "steps": 3}, untested=True)
    lambdas, layers = _lambdas(tmp_path / "out"), result.layers
    assert torch.equal(lambdas, result.lambdas)
    assert lambdas.shape == (4, {"task": 1, "block": 4, "tensor": 32}[granularity])
    assert (lambdas != 0.3).any()
    inside = bool(((lambdas >= 0) & (lambdas <= 1)).all())
    assert inside == (clamp != "none")
    assert read_steps(tmp_path / "out" / "metrics.jsonl") == [1, 2, 3]
    if task_vectors == "raw" and granularity == "tensor":
        merged = _weights(tmp_path / "out")
        for i, name in enumerate(layers):
            key = f"visual.{name}"
            vectors = torch.stack([expert[key] - pretrained[key] for expert in experts])
            moved = torch.einsum("k,k...->...", lambdas[:, i].float(), vectors)
            torch.testing.assert_close(merged[key], pretrained[key] + moved, rtol=1e-5, atol=1e-6)


def test_individual_scores_each_expert_and_merges_nothing(
    run: Merge, world: World, tmp_path: Path
) -> None:
    result = run(method={"name": "individual"})
    assert result.lambdas is None
    assert not (tmp_path / "out" / WEIGHTS).exists()
    assert not (tmp_path / "out" / "lambdas.json").exists()
    for task in world.config["tasks"]:
        alone = evaluate(_config(world, tmp_path / "x"), task["checkpoint"])
        assert result.scores[task["name"]] == alone[task["name"]]


def test_learning_lowers_the_entropy(run: Merge, tmp_path: Path) -> None:
    run(optimizer={"steps": 25, "lr": 0.05, "batch_size": 12}, untested=True)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.05


def test_the_python_api(world: World, tmp_path: Path) -> None:
    path = world.write(tmp_path / "config.yaml", output="out")
    config = raymerge.load_config(path, ["optimizer.steps=1", "cluster.cpus_per_worker=1"])
    assert config.output == str(tmp_path / "out")
    result = raymerge.merge(config)
    assert result.output == tmp_path / "out"
    assert result.config == config
    assert result.top1 == pytest.approx(sum(row.top1 for row in result.scores.values()) / 4)
    assert raymerge.evaluate(config, str(result.output)) == result.scores


# --- tasks without a model and models without a task -------------------------------------------


def _model_only(task: dict[str, Any]) -> dict[str, Any]:
    """Return the entry as a model without a task: neither classes nor images."""
    return {key: task[key] for key in ("name", "checkpoint")}


def _task_only(task: dict[str, Any]) -> dict[str, Any]:
    """Return the entry as a task that is only tested."""
    return {key: task[key] for key in ("name", "classnames", "test")}


def _mixed_tasks(world: World) -> list[dict[str, Any]]:
    """Return colour and shape as model and task, shade as a model, tone as a task."""
    colour, shade, tone, shape = world.config["tasks"]
    return [colour, _model_only(shade), _task_only(tone), shape]


@pytest.mark.parametrize(
    "method",
    [
        {"name": "average"},
        {"name": "ties"},
        {"name": "tsv"},
        {"name": "fw_hard", "objective": "entropy", "iterations": 2, "images": 4},
    ],
)
def test_rows_of_lambda_are_models_and_rows_of_results_are_tasks(
    run: Merge, world: World, tmp_path: Path, method: dict[str, Any]
) -> None:
    result = run(tasks=_mixed_tasks(world), method=method)
    written = read_json(tmp_path / "out" / "lambdas.json")
    assert written["tasks"] == ["colour", "shade", "shape"]
    assert result.lambdas is not None
    assert result.lambdas.shape == (3, len(result.layers))
    assert list(result.scores) == ["colour", "tone", "shape"]
    recorded = read_json(tmp_path / "out" / "results.json")["tasks"]
    assert list(recorded) == ["colour", "tone", "shape"]


def test_a_task_that_is_only_tested_changes_nothing_that_is_learned(
    run: Merge, world: World, tmp_path: Path
) -> None:
    """Its position in the list changes nothing either; its score is the merged model's."""
    colour, _, tone, shape = world.config["tasks"]
    method = {"objective": "infomax", "collapse": "restore"}
    run("three", tasks=[colour, _task_only(tone), shape], method=method)
    run("two", tasks=[colour, shape], method=method)
    for name in (WEIGHTS, "lambdas.json"):
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    three, two = (read_json(tmp_path / name / "results.json")["tasks"] for name in ("three", "two"))
    assert list(three) == ["colour", "tone", "shape"]
    assert {name: three[name] for name in two} == two
    alone = evaluate(_config(world, tmp_path / "x", tasks=[tone]), str(tmp_path / "two"))
    assert three["tone"] == asdict(alone["tone"])
    lines = (tmp_path / "three" / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        for key in ("entropy", "lambdas", "marginal_entropy"):
            assert list(line[key]) == ["colour", "shape"]


def test_a_model_that_is_only_merged_is_merged(
    run: Merge,
    world: World,
    pretrained: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    run(tasks=_mixed_tasks(world), method={"name": "task_arithmetic", "scaling": 0.5})
    merged = _weights(tmp_path / "out")
    for key in experts[0]:
        vectors = sum(experts[k][key] - pretrained[key] for k in (0, 1, 3))
        expected = pretrained[key] + 0.5 * vectors
        torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-6)


def test_only_tasks_with_an_expert_are_scored_on_it(run: Merge, world: World) -> None:
    result = run(tasks=_mixed_tasks(world), method={"name": "individual"})
    assert list(result.scores) == ["colour", "shape"]


def test_learning_needs_images_of_every_model(run: Merge, world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adamerging learns .* task shade has no adapt folder"):
        run(tasks=_mixed_tasks(world))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("objective", ["kl", "infomax", "cross_entropy"])
def test_every_objective_learns_and_lowers_its_loss(
    run: Merge, world: World, tmp_path: Path, objective: str
) -> None:
    tasks = [
        {k: v for k, v in task.items() if k != "test"} | {"adapt": task["test"]}
        for task in world.config["tasks"]
    ]
    optimizer = {"steps": 12, "lr": 0.05, "batch_size": 24, "sharpness": 0.01}
    run(tasks=tasks, method={"objective": objective}, optimizer=optimizer)
    losses = _read_metric(tmp_path / "out", "loss")
    # The loss of infomax's first step is the entropy.
    assert losses[-1] < losses[1]


# --- scores ------------------------------------------------------------------------------------


@torch.no_grad()
def _score_with_open_clip(folder: str, config: Config) -> dict[str, dict[str, float]]:
    """Return the scores by open_clip's own loader, transform and tokenizer."""
    model, _, preprocess = open_clip.create_model_and_transforms(folder)
    tokenizer = open_clip.get_tokenizer(folder)
    model.eval()
    rows = {}
    for task in config.tasks:
        heads = []
        for name in task.classnames:
            texts = tokenizer([template.format(name) for template in task.templates])
            heads.append(normalize(model.encode_text(texts), dim=-1).mean(0))
        head = normalize(torch.stack(heads), dim=-1).t() * model.logit_scale.exp()
        files = [
            (path, label)
            for label, name in enumerate(task.classnames)
            for path in sorted((Path(str(task.test)) / name).iterdir())
        ]
        images = torch.stack([preprocess(Image.open(path)) for path, _ in files])
        labels = torch.tensor([label for _, label in files])
        logits = normalize(model.encode_image(images), dim=-1) @ head
        p = logits.softmax(-1)
        rows[task.name] = {
            "top1": (logits.argmax(-1) == labels).double().mean().item(),
            "loss": cross_entropy(logits, labels).item(),
            "entropy": -(p * p.log()).sum(-1).mean().item(),
            "examples": len(labels),
        }
    return rows


@pytest.mark.parametrize("method", ["adamerging", "ties"])
def test_open_clip_loads_the_output_and_agrees_on_every_score(
    world: World, tmp_path: Path, method: str
) -> None:
    templates = ["a photo of a {}.", "a {} thing", "{}"]
    tasks = [{**task, "templates": templates} for task in world.config["tasks"]]
    config = _config(world, tmp_path / "out", tasks=tasks, method={"name": method})
    merge(config)
    expected = _score_with_open_clip(f"local-dir:{tmp_path / 'out'}", config)
    got = read_json(tmp_path / "out" / "results.json")["tasks"]
    assert got.keys() == expected.keys()
    for name, row in expected.items():
        assert (got[name]["top1"], got[name]["examples"]) == (row["top1"], row["examples"])
        assert got[name]["loss"] == pytest.approx(row["loss"], abs=2e-5)
        assert got[name]["entropy"] == pytest.approx(row["entropy"], abs=2e-5)


def test_evaluating_the_output_gives_its_results(run: Merge, world: World, tmp_path: Path) -> None:
    result = run()
    config = _config(world, tmp_path / "out")
    assert evaluate(config, str(tmp_path / "out")) == result.scores
    assert evaluate(config, str(tmp_path / "out" / WEIGHTS)) == result.scores
    recorded = read_json(tmp_path / "out" / "results.json")["tasks"]
    assert recorded == {name: asdict(row) for name, row in result.scores.items()}
    assert evaluate(config) != result.scores


def test_evaluation_without_a_model_scores_the_pretrained_one(
    run: Merge, world: World, tmp_path: Path
) -> None:
    before = tree(world.root)
    config = _config(world, tmp_path / "unused")
    scores = evaluate(config)
    assert scores == run(method={"name": "zero_shot"}).scores
    assert not (tmp_path / "unused").exists()
    assert tree(world.root) == before


def test_tasks_without_test_images_are_left_out(run: Merge, world: World, tmp_path: Path) -> None:
    tasks = [dict(task) for task in world.config["tasks"]]
    del tasks[0]["test"], tasks[2]["test"]
    result = run(tasks=tasks, method={"name": "average"})
    assert list(result.scores) == ["shade", "shape"]
    results = read_json(tmp_path / "out" / "results.json")
    mean = sum(row["top1"] for row in results["tasks"].values()) / 2
    assert results["average"]["top1"] == pytest.approx(mean)


def test_a_run_without_test_images_has_no_average(run: Merge, tmp_path: Path) -> None:
    result = run(method={"name": "average"}, untested=True)
    assert result.scores == {}
    assert result.top1 is None
    results = read_json(tmp_path / "out" / "results.json")
    assert (results["average"], results["tasks"]) == ({}, {})


def test_a_nan_loss_is_written_as_null(run: Merge, world: World, tmp_path: Path) -> None:
    result = run(method={"name": "task_arithmetic", "scaling": 1e30})  # finite, but useless
    results = read_json(tmp_path / "out" / "results.json")
    assert all(row.loss != row.loss for row in result.scores.values())
    assert [row["loss"] for row in results["tasks"].values()] == [None] * 4
    assert results["average"]["loss"] is None
    assert 0 <= results["average"]["top1"] <= 1


# --- the same λ, whatever else changes ---------------------------------------------------------


def test_a_repeated_run_is_bit_identical(run: Merge, tmp_path: Path) -> None:
    run("first")
    run("second")
    for name in (WEIGHTS, "lambdas.json"):
        first, second = (tmp_path / run / name for run in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_another_seed_is_another_run(run: Merge, tmp_path: Path) -> None:
    run("first", untested=True)
    run("second", untested=True, seed=2)
    assert not torch.equal(_lambdas(tmp_path / "first"), _lambdas(tmp_path / "second"))


@pytest.mark.parametrize("micro_batch", [1, 5, 1000, "all"])
def test_micro_batches_give_the_same_lambda(
    run: Merge, tmp_path: Path, micro_batch: int | str
) -> None:
    run("whole", untested=True)
    run("parts", untested=True, cluster={"micro_batch": micro_batch})
    whole, parts = _lambdas(tmp_path / "whole"), _lambdas(tmp_path / "parts")
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_scoring_does_not_disturb_learning(run: Merge, tmp_path: Path) -> None:
    run("tested")
    run("untested", untested=True)
    assert torch.equal(_lambdas(tmp_path / "tested"), _lambdas(tmp_path / "untested"))


def test_bfloat16_learns_nearly_the_same_and_exports_float32(run: Merge, tmp_path: Path) -> None:
    full = run("full")
    half = run("half", precision="bfloat16")
    first, second = _lambdas(tmp_path / "full"), _lambdas(tmp_path / "half")
    assert not torch.equal(first, second)  # so the option does something
    assert (first - second).abs().max() < 0.05
    assert {t.dtype for t in _weights(tmp_path / "half").values()} == {torch.float32}
    for name, row in full.scores.items():
        assert half.scores[name].loss == pytest.approx(row.loss, abs=0.1)


@pytest.mark.parametrize("location", ["host", "disk"])
def test_where_the_vectors_lie_changes_no_bit(run: Merge, tmp_path: Path, location: str) -> None:
    (tmp_path / "scratch").mkdir()
    elsewhere = {"dtype": "float32", "location": location, "folder": str(tmp_path / "scratch")}
    run("here", untested=True, vectors={"dtype": "float32"})
    run("there", untested=True, vectors=elsewhere)
    for name in (WEIGHTS, "lambdas.json"):
        here, there = (tmp_path / run / name for run in ("here", "there"))
        assert here.read_bytes() == there.read_bytes()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_vectors_read_from_files_in_every_step_give_the_same_lambda(
    run: Merge, tmp_path: Path
) -> None:
    run("pinned", untested=True)
    result = run("anew", untested=True, vectors={"location": "files"})
    pinned, anew = _lambdas(tmp_path / "pinned"), _lambdas(tmp_path / "anew")
    torch.testing.assert_close(anew, pinned, rtol=0, atol=1e-6)
    assert result.lambdas is not None


@pytest.mark.parametrize("location", ["device", "disk"])
def test_vectors_in_bfloat16_learn_nearly_the_same(
    run: Merge, tmp_path: Path, location: str
) -> None:
    """Five steps of 0.01; the written model is still made of the exact vectors."""
    run("exact", untested=True)
    vectors = {"dtype": "bfloat16", "location": location, "folder": str(tmp_path)}
    run("rounded", untested=True, vectors=vectors)
    exact, rounded = _lambdas(tmp_path / "exact"), _lambdas(tmp_path / "rounded")
    assert not torch.equal(exact, rounded)
    difference = (exact - rounded).abs()
    # Of 0.05 that λ can move. Measured 0.0014 and 0.00005: Adam makes much of tiny gradients.
    assert difference.max() < 0.003
    assert difference.mean() < 0.0001


def test_a_run_resumes_where_its_vectors_lie_elsewhere(
    run: Merge, undisturbed: Path, tmp_path: Path
) -> None:
    run(untested=True, optimizer={"steps": 3}, vectors={"dtype": "float32"})
    vectors = {"dtype": "float32", "location": "disk", "folder": str(tmp_path)}
    run(resume=True, untested=True, optimizer={"steps": 6}, vectors=vectors)
    _assert_same_run(tmp_path / "out", undisturbed, 6)


def test_the_order_of_tasks_does_not_matter(run: Merge, world: World, tmp_path: Path) -> None:
    run("forward", untested=True)
    tasks = [{k: v for k, v in task.items() if k != "test"} for task in world.config["tasks"]]
    run("backward", tasks=tasks[::-1])
    forward, backward = _lambdas(tmp_path / "forward"), _lambdas(tmp_path / "backward")
    torch.testing.assert_close(backward.flip(0), forward, rtol=0, atol=1e-5)


# --- resuming ----------------------------------------------------------------------------------


def _stop_at(monkeypatch: pytest.MonkeyPatch, step: int, *, recorded: bool) -> None:
    """Press Ctrl-C in the middle of a step, before or after its record is written."""
    observe = Recorder.observe

    def interrupted(self: Recorder, record: StepRecord, state: LearningState) -> None:
        if record.step == step and not recorded:
            raise KeyboardInterrupt
        observe(self, record, state)
        if record.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "observe", interrupted)


def _assert_same_run(output: Path, reference: Path, steps: int) -> None:
    assert read_steps(output / "metrics.jsonl") == list(range(1, steps + 1))
    for name in ("lambdas.json", WEIGHTS):
        assert (output / name).read_bytes() == (reference / name).read_bytes(), name
    for key in ("loss", "entropy", "lambdas"):
        assert _read_metric(output, key) == _read_metric(reference, key)


def _read_metric(output: Path, key: str) -> list[Any]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of six steps without an interruption."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raymerge.runs.folder.write_plots", lambda folder: None)
        merge(_config(world, out, untested=True, optimizer={"steps": 6}))
    return out


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("step", [1, 2, 5, 6])
def test_a_resumed_run_is_the_undisturbed_one(
    run: Merge,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    recorded: bool,
) -> None:
    options: dict[str, Any] = {"untested": True, "optimizer": {"steps": 6}}
    with monkeypatch.context() as patch:
        _stop_at(patch, step, recorded=recorded)
        with pytest.raises(KeyboardInterrupt):
            run(**options)
    run(resume=True, **options)
    _assert_same_run(tmp_path / "out", undisturbed, 6)


def test_no_step_is_done_twice(run: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observe, seen = Recorder.observe, []

    def counted(self: Recorder, record: StepRecord, state: LearningState) -> None:
        seen.append(record.step)
        observe(self, record, state)

    monkeypatch.setattr(Recorder, "observe", counted)
    for steps in (4, 4, 6):
        run(resume=True, untested=True, optimizer={"steps": steps})
    with pytest.raises(UserError, match=r"optimizer\.steps: 3, but the run in .* has taken 6"):
        run(resume=True, untested=True, optimizer={"steps": 3})
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_run_stopped_twice_and_resumed_with_other_settings(
    run: Merge, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the number of steps nor the interval of saved states changes the result."""
    for step, state in ((2, {"every_steps": 1}), (4, {"every_steps": 3})):
        with monkeypatch.context() as patch:
            _stop_at(patch, step, recorded=True)
            with pytest.raises(KeyboardInterrupt):
                run(resume=True, untested=True, optimizer={"steps": 9}, state=state)
    run(resume=True, untested=True, optimizer={"steps": 6})
    _assert_same_run(tmp_path / "out", undisturbed, 6)


def test_a_run_resumes_in_a_folder_that_was_moved(
    run: Merge, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"untested": True, "optimizer": {"steps": 6}}
    with monkeypatch.context() as patch:
        _stop_at(patch, 3, recorded=True)
        with pytest.raises(KeyboardInterrupt):
            run(**options)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    run("elsewhere", resume=True, **options)
    _assert_same_run(tmp_path / "elsewhere", undisturbed, 6)


def test_resume_logs_the_step_at_which_the_run_continues(
    run: Merge, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"untested": True, "resume": True}
    run(optimizer={"steps": 1}, **options)
    run(optimizer={"steps": 2}, **options)
    where = f"{tmp_path / 'out'}: the run continues"
    assert [line for line in caplog.messages if line.startswith(where)] == [
        f"{where} at step 0: it has no saved state",
        f"{where} after step 1",
    ]


def test_a_damaged_newest_state_falls_back_to_the_one_before(
    run: Merge, undisturbed: Path, tmp_path: Path
) -> None:
    run(untested=True, optimizer={"steps": 4}, state={"every_steps": 1})
    newest = tmp_path / "out" / "state" / "step-00000004" / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    run(resume=True, untested=True, optimizer={"steps": 6})
    _assert_same_run(tmp_path / "out", undisturbed, 6)


def test_a_finished_run_is_extended(run: Merge, undisturbed: Path, tmp_path: Path) -> None:
    run(untested=True, optimizer={"steps": 3})
    run(resume=True, untested=True, optimizer={"steps": 6})
    _assert_same_run(tmp_path / "out", undisturbed, 6)


def test_resuming_a_finished_run_changes_nothing_that_counts(
    run: Merge, undisturbed: Path, tmp_path: Path
) -> None:
    run(untested=True, optimizer={"steps": 6})
    before = tree(tmp_path)
    run(resume=True, untested=True, optimizer={"steps": 6})
    changed = {Path(p).name for p, digest in tree(tmp_path).items() if before.get(p) != digest}
    assert changed <= {"attempt-0002", "results.json"}  # who ran last, and how long it took
    _assert_same_run(tmp_path / "out", undisturbed, 6)


@pytest.mark.parametrize("stop", [2, 4, 5])
@pytest.mark.parametrize(
    "method",
    [
        {"objective": "infomax"},
        {"objective": "infomax", "collapse": "restore"},
        {"objective": "kl", "collapse": "restore"},
    ],
)
def test_the_state_of_the_monitor_is_resumed_as_well(
    run: Merge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: dict[str, Any],
    stop: int,
) -> None:
    """The guard here takes every task whose entropy falls for a collapsing one."""
    _use_sensitive_guard(monkeypatch)
    options = {"untested": True, "method": method, "optimizer": {"steps": 8, "lr": 0.05}}
    run("whole", **options)
    restored = [r.getMessage() for r in caplog.records if "are restored" in r.getMessage()]
    assert bool(restored) == (method.get("collapse") == "restore")
    with monkeypatch.context() as patch:
        _stop_at(patch, stop, recorded=True)
        with pytest.raises(KeyboardInterrupt):
            run(**options)
    run(resume=True, **options)
    _assert_same_run(tmp_path / "out", tmp_path / "whole", 8)
    assert _read_metric(tmp_path / "out", "marginal_entropy") == _read_metric(
        tmp_path / "whole", "marginal_entropy"
    )


def _use_sensitive_guard(monkeypatch: pytest.MonkeyPatch, warmup_steps: int = 1) -> None:
    guard = CollapseGuard(2.0, momentum=0.5, warmup_steps=warmup_steps)
    monkeypatch.setattr("raymerge.runs.inputs.Monitor", partial(Monitor, guard=guard))


def test_a_run_ends_and_reports_when_every_task_was_restored(
    run: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every task was restored: λ stays as it is, and a step has no entropies to record."""
    monkeypatch.undo()  # draw the report as well
    cache_tokenizer(monkeypatch)
    _use_sensitive_guard(monkeypatch)
    method = {"collapse": "restore"}
    run(untested=True, method=method, optimizer={"steps": 25, "lr": 0.05, "batch_size": 12})
    entropies = _read_metric(tmp_path / "out", "entropy")
    assert len(entropies[0]) == 4
    assert entropies[-1] == {}
    assert (tmp_path / "out" / "report.html").exists()


def test_a_collapse_that_stops_the_run_leaves_its_state(
    run: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use_sensitive_guard(monkeypatch)
    options = {"untested": True, "optimizer": {"steps": 25, "lr": 0.05, "batch_size": 12}}
    with pytest.raises(RunError, match=r"step \d+: task \w+ collapses: .* set method\.collapse"):
        run(method={"collapse": "stop"}, **options)
    assert not (tmp_path / "out" / WEIGHTS).exists()
    (state,) = (tmp_path / "out" / "state").glob("step-*")
    assert int(state.name[5:]) == read_steps(tmp_path / "out" / "metrics.jsonl")[-1]


def test_resume_without_a_run_starts_one(run: Merge, undisturbed: Path, tmp_path: Path) -> None:
    run(resume=True, untested=True, optimizer={"steps": 6})
    _assert_same_run(tmp_path / "out", undisturbed, 6)


def test_a_static_merge_is_resumed_by_repeating_it(run: Merge, tmp_path: Path) -> None:
    run(method={"name": "ties"})
    first = (tmp_path / "out" / WEIGHTS).read_bytes()
    run(resume=True, method={"name": "ties"})
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == first


def test_a_second_driver_locks_out_the_first(
    run: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observe = Recorder.observe

    def rivalled(self: Recorder, record: StepRecord, state: LearningState) -> None:
        if record.step == 2:
            learning_states(tmp_path / "out" / "state", "", (), (), 1).claim()
        observe(self, record, state)

    monkeypatch.setattr(Recorder, "observe", rivalled)
    with pytest.raises(RunError, match="attempt 2 has taken over this run from attempt 1"):
        run(untested=True, state={"every_steps": 2})
    assert not (tmp_path / "out" / WEIGHTS).exists()


def test_a_loss_that_is_not_finite_stops_the_run_at_the_last_good_step(
    run: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    from raymerge.merging.objectives import entropy

    calls = 0

    def explode(logits_BC: Tensor) -> Tensor:
        nonlocal calls
        calls += logits_BC.requires_grad  # as the loss, not as what is reported
        return entropy(logits_BC) * (float("nan") if calls > 8 + 1 else 1.0)

    monkeypatch.setattr("raymerge.merging.objectives.entropy", explode)
    with pytest.raises(RunError, match=r"step 3: the loss of task shade, tone, shape is NaN"):
        run(untested=True)
    assert read_steps(tmp_path / "out" / "metrics.jsonl") == [1, 2]
    assert [p.name for p in (tmp_path / "out" / "state").glob("step-*")] == ["step-00000002"]
