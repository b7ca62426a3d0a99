"""FW-Merging over workers, against choices computed directly from the weights and gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import read_json, read_steps
from direct import Direct, tower
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from world import World

import raymerge.engine.driver.frank_wolfe as loops
from raymerge.config import Config
from raymerge.engine.driver.loop import StepRecord, sum_results
from raymerge.engine.driver.state import LearningState
from raymerge.engine.messages import StepRequest, WorkerSpec
from raymerge.engine.worker.clip_source import ClipSource
from raymerge.engine.worker.worker import MergeWorker
from raymerge.errors import RunError, UserError
from raymerge.merging import frank_wolfe as fw
from raymerge.runs.folder import Recorder
from raymerge.runs.inputs import MergeInputs
from raymerge.runs.merge import MergeResult, merge
from raymerge.runs.workers import open_group

WEIGHTS = "open_clip_model.safetensors"
Run = Callable[..., MergeResult]

pytestmark = pytest.mark.usefixtures("only_the_merge")


def _tasks(world: World) -> list[dict[str, Any]]:
    """All tasks, with labelled images to adapt on and none to test."""
    rows = [{**task, "adapt": task["test"]} for task in world.config["tasks"]]
    return [{k: v for k, v in row.items() if k != "test"} for row in rows]


@pytest.fixture
def run(world: World, tmp_path: Path) -> Run:
    def run(name: str = "out", resume: bool = False, **changes: Any) -> MergeResult:
        return merge(_config(world, tmp_path / name, **changes), resume=resume)

    return run


def _config(world: World, output: Path | None = None, **changes: Any) -> Config:
    changes.setdefault("tasks", _tasks(world))
    return world.parse(output, **changes)


@pytest.fixture(scope="module")
def direct(world: World) -> Direct:
    return Direct(world.root / "pretrained")


@pytest.fixture(scope="module")
def pretrained(world: World, direct: Direct) -> dict[str, Tensor]:
    """The tensors in the order of the model's own state dict, which is that of λ's layers."""
    tensors = tower(world.root / "pretrained" / WEIGHTS)
    return {name: tensors[name] for name in direct.visual.state_dict()}


@pytest.fixture(scope="module")
def experts(world: World) -> list[dict[str, Tensor]]:
    return [tower(task["checkpoint"]) for task in world.config["tasks"]]


def _theta(
    lambdas_KL: Tensor, base: dict[str, Tensor], experts: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    return {
        name: base[name]
        + sum(lambdas_KL[k, i] * (e[name] - base[name]) for k, e in enumerate(experts))
        for i, name in enumerate(base)
    }


def _layerwise(
    function: Callable[[Tensor, Tensor], Tensor],
    g: dict[str, Tensor],
    candidates: list[dict[str, Tensor]],
) -> Tensor:
    """(J, L): a function of the gradient's and each candidate's tensors, flat."""
    return torch.stack(
        [
            torch.stack([function(g[name].flatten(), c[name].flatten()) for name in g])
            for c in candidates
        ]
    )


def _write_start(folder: Path, names: list[str], layers: list[str], value: float) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(len(names), len(layers), generator=generator, dtype=torch.float64)
    lambdas_KL = value * noise
    folder.mkdir()
    text = json.dumps({"tasks": names, "layers": layers, "values": lambdas_KL.tolist()})
    (folder / "lambdas.json").write_text(text)
    return lambdas_KL


# --- hard --------------------------------------------------------------------------------------


def test_a_full_step_reaches_a_model_of_lower_loss_and_never_one_of_higher_loss(
    world: World, pretrained: dict[str, Tensor], run: Run, tmp_path: Path
) -> None:
    """The linear model of the loss is lower than at θ₀ for exactly one of θ₀ + T and θ₀ − T."""
    task = _tasks(world)[0]
    base = load_file(world.root / "pretrained" / WEIGHTS)
    expert = load_file(task["checkpoint"])
    save_file({k: 2 * base[k] - t for k, t in expert.items()}, tmp_path / "mirrored.safetensors")
    method = {
        "name": "fw_hard", "iterations": 1, "step_size": 1.0, "scaling": 1.0, "granularity": "task"
    }  # fmt: skip
    reached = []
    for name, checkpoint in (("plain", task["checkpoint"]), ("mirror", tmp_path / "mirrored")):
        path = str(checkpoint).removesuffix(".safetensors") + ".safetensors"
        result = run(name, tasks=[{**task, "checkpoint": path}], method=method)
        assert result.lambdas is not None
        is_model = bool((result.lambdas == 1).all())
        assert is_model or bool((result.lambdas == 0).all())
        merged, model = tower(tmp_path / name / WEIGHTS), tower(path) if is_model else pretrained
        for key in model:
            assert_close(merged[key], model[key], rtol=0, atol=1e-6)
        reached.append(is_model)
    assert sorted(reached) == [False, True]


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("granularity", ["task", "tensor"])
def test_the_chosen_model_has_the_least_product_with_the_gradient(
    world: World,
    direct: Direct,
    pretrained: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
    run: Run,
    tmp_path: Path,
    granularity: str,
    start: float,
) -> None:
    method: dict[str, Any] = {"name": "fw_hard", "iterations": 1, "step_size": 0.5, "scaling": 0.8}
    first_KL = torch.zeros(len(experts), len(pretrained), dtype=torch.float64)
    if start:
        names = [task["name"] for task in _tasks(world)]
        first_KL = _write_start(tmp_path / "start", names, list(pretrained), start)
        method["start"] = str(tmp_path / "start")
    theta = _theta(first_KL, pretrained, experts)
    g = direct.gradient(theta, _tasks(world))
    products_JL = _layerwise(torch.dot, g, [*experts, theta])
    if granularity == "task":
        products_JL = products_JL.sum(1, keepdim=True).expand_as(products_JL)
    choice_L = products_JL.argmin(0)
    result = run(method={**method, "granularity": granularity})
    vertices_JKL = fw.vertices(first_KL)
    chosen_KL = torch.stack([vertices_JKL[j, :, i] for i, j in enumerate(choice_L)], 1)
    assert result.lambdas is not None
    assert_close(result.lambdas, first_KL + 0.4 * (chosen_KL - first_KL), rtol=0, atol=1e-12)
    if granularity == "tensor":
        assert len(choice_L.unique()) > 2


def test_cosines_are_those_of_the_weights_at_every_iteration(
    world: World,
    direct: Direct,
    pretrained: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model that the run started from stays a candidate after the run has left it."""
    scores: list[Tensor] = []
    states: list[Tensor] = []
    choose = fw.choose

    def seen(scores_JL: Tensor, *rest: Any) -> Tensor:
        scores.append(scores_JL.clone())
        return choose(scores_JL, *rest)

    observe = Recorder.observe
    monkeypatch.setattr(fw, "choose", seen)
    monkeypatch.setattr(
        Recorder,
        "observe",
        lambda self, record, state: (states.append(state.lambdas), observe(self, record, state))[1],
    )
    run(method={"name": "fw_hard", "iterations": 3, "oracle": "cosine", "scaling": 1.0})
    assert len(scores) == 3
    for lambdas_KL, scores_JL in zip([torch.zeros_like(states[0]), *states], scores, strict=False):
        g = direct.gradient(_theta(lambdas_KL, pretrained, experts), _tasks(world))
        expected_JL = _layerwise(
            lambda a, b: torch.cosine_similarity(a, b, dim=0), g, [*experts, pretrained]
        )
        assert_close(scores_JL, expected_JL, rtol=0, atol=1e-5)
        assert scores_JL.abs().max() > 0.01


def test_the_loop_stops_at_the_gap(
    world: World,
    direct: Direct,
    pretrained: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
    run: Run,
    tmp_path: Path,
) -> None:
    g = direct.gradient(pretrained, _tasks(world))
    products_JL = _layerwise(torch.dot, g, [*experts, pretrained])
    gap = float((products_JL[-1] - products_JL.min(0).values).sum())  # ⟨g, θ − s⟩, layer by layer
    assert gap > 0.01
    method = {"name": "fw_hard", "iterations": 2}
    run("below", method={**method, "gap": gap * 1.001})
    run("above", method={**method, "iterations": 1, "gap": gap * 0.999})
    assert read_steps(tmp_path / "below" / "metrics.jsonl") == []
    assert read_steps(tmp_path / "above" / "metrics.jsonl") == [1]
    assert torch.tensor(read_json(tmp_path / "below" / "lambdas.json")["values"]).abs().max() == 0
    merged = tower(tmp_path / "below" / WEIGHTS)
    assert all(torch.equal(merged[key], pretrained[key]) for key in pretrained)


def test_a_run_starts_from_an_earlier_runs_folder(run: Run, tmp_path: Path) -> None:
    earlier = run("earlier", method={"name": "adamerging"}).lambdas
    method = {"name": "fw_hard", "start": str(tmp_path / "earlier"), "iterations": 3}
    at_once = run("at_once", method={**method, "gap": 1e9})
    assert torch.equal(at_once.lambdas, earlier)
    for name in (WEIGHTS,):
        files = [(tmp_path / folder / name).read_bytes() for folder in ("at_once", "earlier")]
        assert files[0] == files[1]
    run("on", method=method)
    lines = (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()
    used = json.loads(lines[0])["lambdas"]
    assert list(used.values()) == pytest.approx(earlier.mean(1).tolist())
    # One folder, or the file in it; and Frank-Wolfe's own runs are starts too.
    run("file", method={**method, "start": str(tmp_path / "earlier" / "lambdas.json")})
    run("again", method={**method, "start": str(tmp_path / "on")})
    assert (tmp_path / "file" / WEIGHTS).read_bytes() == (tmp_path / "on" / WEIGHTS).read_bytes()


def test_a_start_over_other_vectors_is_refused(run: Run, tmp_path: Path) -> None:
    run("trimmed", method={"name": "adamerging", "task_vectors": "ties"}, optimizer={"steps": 1})
    with pytest.raises(UserError, match=r"method\.start: .*multiplies ties vectors"):
        run(method={"name": "fw_hard", "start": str(tmp_path / "trimmed")})
    assert not (tmp_path / "out").exists()


def test_a_model_without_images_is_a_candidate(
    world: World, direct: Direct, pretrained: dict[str, Tensor], run: Run, tmp_path: Path
) -> None:
    """The model lies straight down the gradient of the others' tasks, so it must be chosen."""
    tasks = _tasks(world)[:2]
    g = direct.gradient(pretrained, tasks)
    base = load_file(world.root / "pretrained" / WEIGHTS)
    slope = {f"visual.{name}": (base[f"visual.{name}"] - 10 * t).float() for name, t in g.items()}
    save_file(slope, tmp_path / "slope.safetensors")
    tasks.insert(1, {"name": "slope", "checkpoint": str(tmp_path / "slope.safetensors")})
    for name, options in (("fw_hard", {"granularity": "task"}), ("fw_soft", {})):
        method = {"name": name, "iterations": 1, **options}
        result = run(name, tasks=tasks, method=method, optimizer={"steps": 2})
        lambdas = read_json(tmp_path / name / "lambdas.json")
        assert lambdas["tasks"] == ["colour", "slope", "shade"]
        assert result.lambdas is not None
        assert (result.lambdas[1] > 0).all()
        if name == "fw_hard":
            assert not result.lambdas[[0, 2]].any()


def test_a_loss_that_is_not_finite_ends_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "raymerge.merging.objectives.cross_entropy",
        lambda logits_BC, labels_B: logits_BC.sum(-1) * np.nan,
    )
    for method in ("fw_hard", "fw_soft"):
        with pytest.raises(RunError, match="step 1: the loss of task colour"):
            run(method, method=method)
        assert not (tmp_path / method / WEIGHTS).exists()
        assert not list((tmp_path / method / "state").glob("step-*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_gradient_with_tasks_that_no_model_was_trained_for(
    world: World,
    direct: Direct,
    pretrained: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
    workers: int,
) -> None:
    """∂/∂λ_k of the sum over all M tasks is ⟨g, T_k⟩; weights select a single task's."""
    tasks = _tasks(world)
    entries = [tasks[0], *({k: v for k, v in t.items() if k != "checkpoint"} for t in tasks[1:])]
    entries[2] = tasks[2]  # models 0 and 2, tasks 0 to 3
    config = _config(world, tasks=entries, method={"name": "fw_hard"})
    inputs = MergeInputs(config)
    lambdas_KL = torch.full((2, len(pretrained)), 0.2, dtype=torch.float64)
    models = [experts[0], experts[2]]
    theta = _theta(lambdas_KL, pretrained, models)
    source = ClipSource(config.model, config.tasks)
    group = [MergeWorker(source, WorkerSpec(rank, workers)) for rank in range(workers)]
    for worker in group:
        worker.load(inputs.load_request())
    for weights_M, counted in ((None, tasks), (np.eye(4)[3], tasks[3:])):
        request = StepRequest(0, lambdas_KL.numpy(), weights=weights_M)
        total = sum_results([worker.step(request) for worker in group], request, workers)
        g = direct.gradient(theta, counted)
        expected_KL = _layerwise(lambda a, b: a @ b, g, models) - _layerwise(
            lambda a, b: a @ b, g, [pretrained]
        )
        assert_close(torch.from_numpy(total.gradient), expected_KL, rtol=1e-3, atol=1e-6)
        assert [bool(loss) for loss in total.loss] == [task in counted for task in tasks]


@pytest.mark.parametrize("name", ["fw_hard", "fw_soft"])
def test_an_objective_may_be_of_other_tasks_than_the_models(
    world: World, run: Run, tmp_path: Path, name: str
) -> None:
    """λ has a row for each model; the metrics have every task's entropy."""
    tasks = _tasks(world)
    without_images = [{k: v for k, v in task.items() if k != "adapt"} for task in tasks[:1]]
    others = [{k: v for k, v in task.items() if k != "checkpoint"} for task in tasks[1:]]
    method = {"name": name, "iterations": 2, "scaling": 1.0}
    if name == "fw_soft":
        del method["scaling"]
    result = run(tasks=without_images + others, method=method, optimizer={"steps": 2})
    assert result.lambdas is not None
    assert result.lambdas.shape[0] == 1
    assert read_json(tmp_path / "out" / "lambdas.json")["tasks"] == ["colour"]
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert list(line["lambdas"]) == ["colour"]
    assert list(line["entropy"]) == [task["name"] for task in others]


# --- soft --------------------------------------------------------------------------------------


def _mixed(config: Config, group: Any, seed: int = 0) -> tuple[loops.MixtureGroup, Tensor, Tensor]:
    """A group whose three coefficients mix random directions from a random origin."""
    inputs = MergeInputs(config)
    group.load(inputs.load_request())
    generator = torch.Generator().manual_seed(seed)
    shape = (len(config.models), len(inputs.layers.names))
    origin_KL = 0.2 * torch.rand(shape, generator=generator, dtype=torch.float64)
    directions_JKL = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    directions_JKL[:, 1] = 0  # a model that no direction uses
    return loops.MixtureGroup(group, origin_KL, directions_JKL), origin_KL, directions_JKL


@pytest.mark.parametrize("location", ["device", "files"])
def test_the_gradient_of_a_mixture(world: World, location: str) -> None:
    """∂ℒ/∂μ_j = Σ_k D_jk ∂ℒ/∂λ_k, which central differences of the loss confirm."""
    config = _config(world, vectors={"location": location})
    with open_group(config, None) as group:
        mixed, origin_KL, directions_JKL = _mixed(config, group)
        mu_JL = torch.full((3, origin_KL.shape[1]), 0.05, dtype=torch.float64)
        at_KL = origin_KL + torch.einsum("jl,jkl->kl", mu_JL, directions_JKL)
        assert_close(mixed.lambdas(mu_JL), at_KL)

        def loss(mu_JL: Tensor) -> float:
            (result,) = mixed.step(StepRequest(0, mu_JL.numpy()))
            return float(result.loss.sum())

        (inner,) = group.step(StepRequest(0, at_KL.numpy()))
        (outer,) = mixed.step(StepRequest(0, mu_JL.numpy()))
        gradient_JL = torch.from_numpy(outer.gradient)
        chained_JL = (directions_JKL * torch.from_numpy(inner.gradient)).sum(1)
        assert_close(gradient_JL, chained_JL, rtol=1e-5, atol=1e-9)
        along_JL = gradient_JL / gradient_JL.norm()
        h = 1e-2
        slope = (loss(mu_JL + h * along_JL) - loss(mu_JL - h * along_JL)) / (2 * h)
        assert slope == pytest.approx(float(gradient_JL.norm()), rel=2e-2)


def test_the_first_iteration_over_all_models_is_adamerging(run: Run, tmp_path: Path) -> None:
    """Four tasks choose four models; from the pretrained model the directions are task vectors."""
    optimizer = {"steps": 4, "lr": 0.02}
    soft = run("soft", method={"name": "fw_soft", "iterations": 1}, optimizer=optimizer)
    learned = run("ada", method={"name": "adamerging"}, optimizer=optimizer)
    assert soft.lambdas is not None
    assert learned.lambdas is not None
    assert (learned.lambdas - 0.3).abs().max() > 0.01
    assert_close(soft.lambdas, learned.lambdas, rtol=0, atol=1e-6)


@pytest.mark.parametrize("oracle", ["inner", "cosine"])
@pytest.mark.parametrize("granularity", ["task", "tensor"])
def test_each_task_chooses_among_the_remaining_models_by_its_own_gradient(
    world: World,
    direct: Direct,
    pretrained: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
    granularity: str,
    oracle: str,
) -> None:
    chosen: list[Tensor] = []
    merged = loops._learn_mixture

    def seen(group: Any, chosen_JKL: Tensor, *rest: Any) -> Tensor:
        chosen.append(chosen_JKL)
        return merged(group, chosen_JKL, *rest)

    monkeypatch.setattr(loops, "_learn_mixture", seen)
    method = {"name": "fw_soft", "iterations": 1, "granularity": granularity, "oracle": oracle}
    tasks = _tasks(world)
    for task in tasks[2:]:  # two tasks choose among four models
        del task["adapt"]
    run(tasks=tasks, method=method, optimizer={"steps": 1})
    function = torch.dot
    if oracle == "cosine":
        function = lambda a, b: torch.cosine_similarity(a, b, dim=0)  # noqa: E731
    mask_KL = torch.zeros(4, len(pretrained), dtype=torch.bool)
    assert len(chosen[0]) == 2
    for task, chosen_KL in zip(tasks, chosen[0], strict=False):
        scores_JL = _layerwise(function, direct.gradient(pretrained, [task]), experts)
        if granularity == "task":
            scores_JL = scores_JL.sum(1, keepdim=True).expand_as(scores_JL)
        choice_L = scores_JL.masked_fill(mask_KL, torch.inf).argmin(0)
        mask_KL[choice_L, torch.arange(len(choice_L))] = True
        assert torch.equal(chosen_KL.argmax(0), choice_L)
        assert torch.equal(chosen_KL.sum(0), torch.ones(len(choice_L), dtype=torch.float64))


def test_the_first_iteration_starts_at_init_and_the_others_at_later_init(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    inits: list[float] = []
    merged = loops._learn_mixture

    def seen(*args: Any) -> Tensor:
        inits.append(args[-1])
        return merged(*args)

    monkeypatch.setattr(loops, "_learn_mixture", seen)
    method = {"name": "fw_soft", "iterations": 3, "init": 0.2, "later_init": 1e-3}
    run(method=method, optimizer={"steps": 1})
    assert inits == [0.2, 1e-3, 1e-3]


# --- resuming ----------------------------------------------------------------------------------

METHODS = {
    "hard": {"name": "fw_hard", "iterations": 5, "scaling": 1.0, "images": 3},
    "hard cosine": {"name": "fw_hard", "iterations": 5, "oracle": "cosine", "images": 3},
    "soft": {"name": "fw_soft", "iterations": 4, "images": 3, "objective": "entropy"},
}


@pytest.mark.parametrize("kind", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options: dict[str, Any] = {"method": METHODS[kind], "optimizer": {"steps": 2}}
    observe = Recorder.observe

    def interrupted(self: Recorder, record: StepRecord, state: LearningState) -> None:
        observe(self, record, state)
        if record.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "observe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("resumed", **options)
    run("resumed", resume=True, **options)
    run("uninterrupted", **options)
    first, second = tmp_path / "resumed", tmp_path / "uninterrupted"
    for name in ("lambdas.json", WEIGHTS):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert read_steps(first / "metrics.jsonl") == read_steps(second / "metrics.jsonl")


def test_a_finished_run_takes_more_iterations_but_no_other_inner_steps(
    run: Run, tmp_path: Path
) -> None:
    soft, optimizer = METHODS["soft"], {"steps": 2}
    run("out", method={**soft, "iterations": 2}, optimizer=optimizer)
    with pytest.raises(UserError, match="differs"):  # its steps are part of each iteration
        run("out", resume=True, method=soft, optimizer={"steps": 3})
    run("out", resume=True, method=soft, optimizer=optimizer)
    run("whole", method=soft, optimizer=optimizer)
    for name in ("lambdas.json", WEIGHTS):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(UserError, match=r"method\.iterations: 1, but the run in .* has taken 4"):
        run("out", resume=True, method={**soft, "iterations": 1}, optimizer=optimizer)


def test_details_of_a_step_are_norms_and_products(
    world: World,
    direct: Direct,
    pretrained: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
) -> None:
    config = _config(world, method={"name": "fw_hard"})
    inputs = MergeInputs(config)
    lambdas_KL = torch.full((4, len(pretrained)), 0.15, dtype=torch.float64)
    theta = _theta(lambdas_KL, pretrained, experts)
    g = direct.gradient(theta, _tasks(world))
    with open_group(config, None) as group:
        group.load(inputs.load_request())
        request = StepRequest(0, lambdas_KL.numpy(), details=True)
        details = sum_results(group.step(request), request, 1).details
    expected = {
        "gradient_base": _layerwise(torch.dot, g, [pretrained])[0],
        "gradient_square": _layerwise(lambda a, b: a @ a, g, [theta])[0],
        "theta_square": _layerwise(lambda a, b: b @ b, g, [theta])[0],
        "model_square": _layerwise(lambda a, b: b @ b, g, experts),
    }
    assert details.keys() == expected.keys()
    for name, values in expected.items():
        assert_close(torch.from_numpy(details[name]), values, rtol=1e-4, atol=1e-6)
