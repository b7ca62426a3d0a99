"""One worker's step on a real open_clip model: ∂ℒ/∂λ against autograd through the whole merge.

In this process: no Ray, no process group.

Legend: K tasks, L layers, T tensors, P parameters, N columns of a shard.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from raymerge.config import Config
from raymerge.data.slots import SlotRange, slot_counts, step_images
from raymerge.engine.memory import pass_images
from raymerge.engine.messages import (
    LoadReport,
    LoadRequest,
    StepRequest,
    StepResult,
    VectorStorage,
    WorkerSpec,
)
from raymerge.engine.worker.clip_source import ClipSource
from raymerge.engine.worker.shard import WorkerShard, _passes
from raymerge.engine.worker.worker import MergeWorker
from raymerge.errors import DataError, RunError
from raymerge.merging.method import Objective
from raymerge.models.checkpoints.task_vectors import ties_statistics
from raymerge.models.checkpoints.visual_tower import open_visual
from raymerge.models.heads import zero_shot_head
from raymerge.models.pretrained import open_pretrained
from raymerge.models.resolve import resolve_model

K, IMAGES = 4, 4
LAYERS = {"task": 1, "block": 4, "tensor": 32}


@pytest.fixture(scope="module")
def config(world) -> Config:
    return world.parse()


def _request(granularity: str = "tensor", **changes) -> LoadRequest:
    request = LoadRequest((), granularity, Objective(), IMAGES, batches=1, steps=3, seed=1)
    return replace(request, **changes)


def _load(worker: MergeWorker, request: LoadRequest) -> LoadReport:
    return worker.load(_with_models(worker.source, request))


def _with_models(source: ClipSource, request: LoadRequest) -> LoadRequest:
    """Return the request with the tasks' checkpoints as its models."""
    return replace(request, models=tuple(str(task.checkpoint) for task in source.tasks))


def _lambdas(granularity: str = "tensor") -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 0.5, (K, LAYERS[granularity]))


def _worker(config: Config, request: LoadRequest, rank: int = 0, workers: int = 1, **spec):
    worker = MergeWorker(ClipSource(config.model, config.tasks), WorkerSpec(rank, workers, **spec))
    _load(worker, request)
    return worker


@pytest.fixture(scope="module")
def single(config) -> dict[str, MergeWorker]:
    """One worker for all tasks; a test that needs another request loads it again."""
    return {"worker": _worker(config, _request())}


def _step(single, request: LoadRequest, step: int = 0, lambdas=None) -> StepResult:
    worker = single["worker"]
    _load(worker, request)
    lambdas = _lambdas(request.granularity) if lambdas is None else lambdas
    return worker.step(StepRequest(step, lambdas))


# --- against autograd -------------------------------------------------------------------------


class Literal:
    """The same loss by open_clip's model and transform in float64, with autograd."""

    def __init__(self, config: Config) -> None:
        self.config = config
        arch = config.model.arch
        model, _, self._transform = open_clip.create_model_and_transforms(arch)
        tokenizer = open_clip.get_tokenizer(arch)
        self._heads = [
            zero_shot_head(model, tokenizer, t.classnames, t.templates).double()
            for t in config.tasks
        ]
        self._visual = model.eval().double().visual
        self.base = {k: v.detach().clone() for k, v in self._visual.state_dict().items()}
        experts = [load_file(task.checkpoint) for task in config.tasks]
        self.vectors = [
            {name: expert[f"visual.{name}"].double() - base for name, base in self.base.items()}
            for expert in experts
        ]

    def paths(self, task: int, step: int, count: int) -> list[Path]:
        entry = self.config.tasks[task]
        paths = sorted(Path(entry.adapt).rglob("*.png"))
        chosen = step_images(1, entry.name, step, min(count, len(paths)), len(paths))
        return [paths[i] for i in chosen]

    def theta(self, lambdas_KT: Tensor) -> dict[str, Tensor]:
        """θ₀ + Σ λ V."""
        return {
            name: base
            + sum(lambdas_KT[k, t] * vector[name] for k, vector in enumerate(self.vectors))
            for t, (name, base) in enumerate(self.base.items())
        }

    def logits(self, theta: dict[str, Tensor], task: int, step: int, count: int) -> Tensor:
        paths = self.paths(task, step, count)
        images = torch.stack([self._transform(Image.open(path)).double() for path in paths])
        features = torch.func.functional_call(self._visual, theta, (images,))
        return features / features.norm(dim=1, keepdim=True) @ self._heads[task]

    def losses(self, lambdas_KT: Tensor, step: int, count: int) -> Tensor:
        """(K,): each task's mean entropy at θ₀ + Σ λ V."""
        theta = self.theta(lambdas_KT)
        logits = [self.logits(theta, task, step, count) for task in range(K)]
        return torch.stack([_entropy(logits_BC).mean() for logits_BC in logits])


def _entropy(logits_BC: Tensor) -> Tensor:
    p_BC = logits_BC.softmax(1)
    return -(p_BC * p_BC.log()).sum(1)


@pytest.fixture(scope="module")
def literal(config) -> Literal:
    return Literal(config)


def _spread(literal: Literal, lambdas_KL: Tensor, granularity: str) -> Tensor:
    """Return λ per tensor (K, T) from λ per layer (K, L), by the names alone."""
    names = list(literal.base)
    if granularity == "tensor":
        return lambdas_KL
    if granularity == "task":
        return lambdas_KL.expand(K, len(names))
    first = {"transformer.resblocks.0": 1, "transformer.resblocks.1": 2, "ln_post": 3, "proj": 3}
    layer = [next((i for p, i in first.items() if n.startswith(p)), 0) for n in names]
    return lambdas_KL[:, layer]


def _autograd(literal: Literal, granularity: str, step: int = 0, count: int = IMAGES):
    lambdas_KL = torch.from_numpy(_lambdas(granularity)).requires_grad_(True)
    losses_K = literal.losses(_spread(literal, lambdas_KL, granularity), step, count)
    losses_K.sum().backward()
    return losses_K.detach().numpy(), lambdas_KL.grad.numpy()


def _assert_close(ours: np.ndarray, expected: np.ndarray, rtol: float = 1e-4) -> None:
    """Compare relative to the largest entry: float32's noise does not shrink with an entry."""
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= rtol * np.abs(expected).max()


@pytest.mark.parametrize("granularity", list(LAYERS))
def test_the_gradient_is_autograd_through_the_merge_of_open_clips_model(
    single, literal, granularity
):
    losses_K, gradient_KL = _autograd(literal, granularity)
    result = _step(single, _request(granularity))
    assert result.gradient.dtype == np.float64
    _assert_close(result.gradient, gradient_KL)
    np.testing.assert_allclose(result.loss, losses_K, rtol=1e-4)
    np.testing.assert_allclose(result.entropy, losses_K, rtol=1e-4)


def test_another_step_sees_other_images(single, literal):
    losses_K, gradient_KL = _autograd(literal, "tensor", step=2)
    result = _step(single, _request(), step=2)
    _assert_close(result.gradient, gradient_KL)
    np.testing.assert_allclose(result.loss, losses_K, rtol=1e-4)


def test_a_task_with_fewer_images_than_a_batch_uses_all_of_them(single, literal):
    losses_K, gradient_KL = _autograd(literal, "task", count=50)
    result = _step(single, _request("task", slots_per_step=50))
    _assert_close(result.gradient, gradient_KL)
    np.testing.assert_allclose(result.loss, losses_K, rtol=1e-4)


def test_two_batches_sum_their_means_as_the_official_loop_does(single, literal):
    """2 × 4 images give twice the mean over 8 in loss and gradient; the entropy stays a mean."""
    losses_K, gradient_KL = _autograd(literal, "tensor", count=8)
    result = _step(single, _request(slots_per_step=8, batches=2))
    _assert_close(result.gradient, 2 * gradient_KL)
    np.testing.assert_allclose(result.loss, 2 * losses_K, rtol=1e-4)
    np.testing.assert_allclose(result.entropy, losses_K, rtol=1e-4)


def test_with_ties_the_basis_is_phi(single, literal, config):
    """In AdaMerging++ the gradient is the same with V = Φ(T)."""
    pretrained, _ = open_pretrained(resolve_model(config.model))
    experts = [open_visual(task.checkpoint, pretrained.layout) for task in config.tasks]
    ties = ties_statistics(pretrained, experts, density=0.2, scope="visual")
    raw = literal.vectors
    names = list(literal.base)
    stacked = {name: torch.stack([v[name].flatten() for v in raw]) for name in names}
    phi = {name: ties.phi(stacked[name].float(), t).double() for t, name in enumerate(names)}
    literal.vectors = [{n: phi[n][k].view_as(raw[k][n]) for n in names} for k in range(K)]
    try:
        losses_K, gradient_KL = _autograd(literal, "tensor")
    finally:
        literal.vectors = raw
    result = _step(single, _request(basis=ties))
    _assert_close(result.gradient, gradient_KL)
    np.testing.assert_allclose(result.loss, losses_K, rtol=1e-4)


def test_bfloat16_autocast_gives_nearly_the_same_gradient(single, literal):
    _, gradient_KL = _autograd(literal, "task")
    result = _step(single, _request("task", autocast=True))
    _assert_close(result.gradient, gradient_KL, rtol=0.2)
    assert np.abs(result.gradient - _step(single, _request("task")).gradient).max() > 0


@pytest.mark.parametrize("granularity", list(LAYERS))
def test_streamed_vectors_give_the_gradient_of_pinned_ones(single, granularity):
    whole = _step(single, _request(granularity))
    streamed = _step(single, _request(granularity, storage=VectorStorage(location="files")))
    _assert_close(streamed.gradient, whole.gradient, rtol=1e-5)
    np.testing.assert_allclose(streamed.loss, whole.loss, rtol=1e-5)


@pytest.mark.parametrize("location", ["host", "disk"])
def test_the_location_of_the_vectors_changes_no_bit(single, tmp_path, location):
    whole = _step(single, _request())
    elsewhere = _step(single, _request(storage=VectorStorage("float32", location, str(tmp_path))))
    assert np.array_equal(elsewhere.gradient, whole.gradient)
    assert np.array_equal(elsewhere.loss, whole.loss)
    assert list(tmp_path.iterdir()) == []


def test_vectors_in_bfloat16_give_the_gradient_of_the_rounded_vectors(single, literal):
    """It is as close to autograd through the merge of V rounded to bfloat16 as in float32."""
    exact = literal.vectors
    literal.vectors = [
        {name: t.float().bfloat16().double() for name, t in v.items()} for v in exact
    ]
    try:
        losses_K, gradient_KL = _autograd(literal, "tensor")
    finally:
        literal.vectors = exact
    result = _step(single, _request(storage=VectorStorage("bfloat16")))
    _assert_close(result.gradient, gradient_KL)
    np.testing.assert_allclose(result.loss, losses_K, rtol=1e-4)
    assert np.abs(result.gradient - _step(single, _request()).gradient).max() > 0


# --- other objectives ---------------------------------------------------------------------------


Definition = Callable[[int, Tensor], Tensor]
"""(task, logits (B, C)) → the losses of its images, (B,)."""


def _assert_flat_gradient(
    worker: MergeWorker,
    literal: Literal,
    request: LoadRequest,
    definition: Definition,
    **changes,
) -> None:
    """∂ℒ/∂θ of every tensor, ∂ℒ/∂λ, and each task's loss, against autograd of the definition."""
    step = StepRequest(1, _lambdas(), **changes)
    theta = literal.theta(torch.from_numpy(step.lambdas))
    theta = {name: tensor.detach().requires_grad_(True) for name, tensor in theta.items()}
    logits = [literal.logits(theta, task, step.step, request.slots_per_step) for task in range(K)]
    losses_K = torch.stack([definition(task, z_BC).mean() for task, z_BC in enumerate(logits)])
    weights_K = torch.ones(K) if step.weights is None else torch.from_numpy(step.weights)
    (weights_K * losses_K).sum().backward()

    _load(worker, request)
    result = worker.step(step)
    views = worker._model.layout.views(worker._model.gradient_P)
    names, gradients = list(theta), [tensor.grad for tensor in theta.values()]
    ours_P = torch.cat([views[name].flatten() for name in names]).double().numpy()
    _assert_close(ours_P, torch.cat([g.flatten() for g in gradients]).numpy(), rtol=2e-4)
    pairs = list(zip(names, gradients, strict=True))
    lambdas_KL = [[(g * vector[name]).sum() for name, g in pairs] for vector in literal.vectors]
    _assert_close(result.gradient, torch.tensor(lambdas_KL).numpy(), rtol=2e-4)
    np.testing.assert_allclose(result.loss, (weights_K * losses_K).detach(), rtol=2e-4, atol=1e-6)
    for task in np.flatnonzero(weights_K):
        z_BC = logits[task].detach()
        assert result.entropy[task] == pytest.approx(float(_entropy(z_BC).mean()), rel=1e-4)
        mean_p_C = z_BC.softmax(1).mean(0).numpy()
        padded_C = np.pad(mean_p_C, (0, CLASSES - len(mean_p_C)))
        np.testing.assert_allclose(result.probabilities[task], padded_C, rtol=1e-4)


def _marginals() -> np.ndarray:
    """(M, C), C classes of the task with the most; a task with fewer has zeros at the end."""
    marginals_MC = np.random.default_rng(3).dirichlet(np.ones(CLASSES), K)
    for task, entry in enumerate(COUNTS):
        marginals_MC[task, entry:] = 0.0
    return marginals_MC / marginals_MC.sum(1, keepdims=True)


CLASSES, COUNTS = 4, (3, 2, 2, 4)


def test_every_task_has_as_many_probabilities_as_classes(config):
    assert tuple(len(task.classnames) for task in config.tasks) == COUNTS


@pytest.fixture(scope="module")
def teachers(config, literal) -> list[dict[str, Tensor]]:
    """Every expert's own weights, from its file."""
    experts = [load_file(task.checkpoint) for task in config.tasks]
    return [{name: e[f"visual.{name}"].double() for name in literal.base} for e in experts]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_kl_is_the_divergence_from_each_tasks_own_expert(single, literal, teachers, temperature):
    def definition(task: int, logits_BC: Tensor) -> Tensor:
        with torch.no_grad():
            expert_BC = literal.logits(teachers[task], task, 1, IMAGES)
        q_BC = (expert_BC / temperature).softmax(1)
        p_BC = (logits_BC / temperature).softmax(1)
        return temperature**2 * (q_BC * (q_BC / p_BC).log()).sum(1)

    request = _request(objective=Objective("kl", temperature))
    _assert_flat_gradient(single["worker"], literal, request, definition)


def test_the_targets_of_kl_are_the_experts_logits_on_all_images_of_the_steps(
    single, literal, teachers
):
    """At the coefficients of one expert alone, its own loss is 0 and the others' are not."""
    _load(single["worker"], _request("task", objective=Objective("kl"), slots_per_step=50))
    targets = single["worker"]._shard._targets
    for task in range(K):
        assert targets[task].examples.tolist() == list(range(12))
        expected_BC = literal.logits(teachers[task], task, 0, 50).numpy()
        np.testing.assert_allclose(
            torch.cat(list(targets[task].values)).numpy(), expected_BC, rtol=0, atol=1e-4
        )
        alone = single["worker"].step(StepRequest(0, np.eye(K)[:, [task]]))
        assert abs(alone.loss[task]) < 1e-6
        assert np.delete(alone.loss, task).min() > 5e-6


@pytest.mark.parametrize("normalise", [False, True])
def test_infomax_compares_with_the_marginals_of_the_request(single, literal, normalise):
    marginals_MC = _marginals()

    def definition(task: int, logits_BC: Tensor) -> Tensor:
        classes = logits_BC.shape[1]
        p_BC, m_C = logits_BC.softmax(1), torch.from_numpy(marginals_MC[task, :classes])
        return -(p_BC * (p_BC / m_C).log()).sum(1) / (np.log(classes) if normalise else 1.0)

    request = _request(objective=Objective("infomax", normalise=normalise))
    _assert_flat_gradient(single["worker"], literal, request, definition, marginals=marginals_MC)


def test_infomax_without_marginals_is_entropy(single, literal):
    """So it is in the first step, before any prediction is known."""
    request = _request(objective=Objective("infomax"))
    _assert_flat_gradient(single["worker"], literal, request, lambda task, z_BC: _entropy(z_BC))


def test_normalise_divides_each_tasks_loss_by_log_c(single, literal):
    request = _request(objective=Objective(normalise=True))

    def definition(task: int, logits_BC: Tensor) -> Tensor:
        return _entropy(logits_BC) / np.log(COUNTS[task])

    _assert_flat_gradient(single["worker"], literal, request, definition)


def test_weights_multiply_the_tasks_losses_and_zero_leaves_a_task_out(single, literal):
    weights_M = np.array([1.0, 0.5, 0.0, 2.0])
    worker = single["worker"]
    _assert_flat_gradient(
        worker, literal, _request(), lambda task, z_BC: _entropy(z_BC), weights=weights_M
    )
    result = worker.step(StepRequest(1, _lambdas(), weights=weights_M))
    assert result.entropy[2] == 0
    assert not result.probabilities[2].any()
    nothing = worker.step(StepRequest(1, _lambdas(), weights=np.zeros(K)))
    assert not nothing.gradient.any()


FILTER = 0.9


def test_the_filter_counts_only_images_of_low_entropy_the_lower_the_more(single, literal):
    """The weights are constants; the mean is over all images, also those that do not count."""
    kept: list[bool] = []

    def definition(task: int, logits_BC: Tensor) -> Tensor:
        entropy_B, limit = _entropy(logits_BC), FILTER * np.log(COUNTS[task])
        weights_B = (limit - entropy_B.detach()).exp() * (entropy_B.detach() < limit)
        kept.extend((weights_B > 0).tolist())
        return weights_B * entropy_B

    request = _request(objective=Objective(filter=FILTER), slots_per_step=12)
    _assert_flat_gradient(single["worker"], literal, request, definition)
    assert 0 < sum(kept) < len(kept)


@pytest.fixture(scope="module", params=["as listed", "reversed"])
def labelled(world, request) -> Config:
    """A config whose adapt images lie in a folder for each class."""
    tasks = [dict(task, adapt=task["test"]) for task in world.config["tasks"]]
    if request.param == "reversed":
        tasks = [dict(task, classnames=task["classnames"][::-1]) for task in tasks]
    return world.parse(tasks=tasks)


def _label(config: Config, task: int, path: Path) -> int:
    return config.tasks[task].classnames.index(path.parent.name)


def test_labels_follow_the_folders_in_any_order_of_classes(labelled):
    worker = _worker(labelled, _request(objective=Objective("cross_entropy")))
    for task, entry in enumerate(labelled.tasks):
        paths = sorted(Path(entry.adapt).rglob("*.png"))
        target = worker._shard._targets[task]
        expected = [_label(labelled, task, path) for path in paths]
        assert target.of(np.arange(len(paths))).tolist() == expected
        assert len(set(expected)) == COUNTS[task]


def test_cross_entropy_is_minus_log_p_of_the_folders_class(labelled):
    literal = Literal(labelled)

    def definition(task: int, logits_BC: Tensor) -> Tensor:
        labels = [_label(labelled, task, path) for path in literal.paths(task, 1, IMAGES)]
        return -logits_BC.log_softmax(1)[range(len(labels)), labels]

    request = _request(objective=Objective("cross_entropy"))
    _assert_flat_gradient(_worker(labelled, request), literal, request, definition)


def test_an_image_outside_the_class_folders_has_no_label(labelled, tmp_path):
    shutil.copytree(labelled.tasks[1].adapt, tmp_path / "adapt")
    shutil.copy(next((tmp_path / "adapt").rglob("*.png")), tmp_path / "adapt" / "stray.png")
    stray = labelled.tasks[1].model_copy(update={"adapt": str(tmp_path / "adapt")})
    config = labelled.model_copy(update={"tasks": (labelled.tasks[0], stray, *labelled.tasks[2:])})
    with pytest.raises(DataError, match=r"tasks\[1\]\.adapt: .* lie in no class folder"):
        _worker(config, _request(objective=Objective("cross_entropy")))


@pytest.mark.parametrize("objective", ["kl", "infomax", "cross_entropy"])
def test_the_parts_of_other_objectives_sum_to_one_workers_step(labelled, objective):
    request = _request(
        objective=Objective(objective, normalise=True, filter=FILTER), slots_per_step=6
    )
    step = StepRequest(2, _lambdas(), marginals=_marginals(), weights=np.array([1, 0, 3.0, 0.5]))
    whole = _worker(labelled, request).step(step)
    parts = [_worker(labelled, request, rank, 3).step(step) for rank in range(3)]
    for name in ("gradient", "loss", "entropy", "probabilities"):
        total = sum(getattr(part, name) for part in parts)
        _assert_close(total, getattr(whole, name), rtol=1e-5)


# --- tasks and models that are not the same -----------------------------------------------------


@pytest.mark.parametrize("location", ["device", "files"])
def test_the_requested_rows_are_those_of_the_whole_gradient(single, location):
    request = _request(storage=VectorStorage(location=location))
    whole = _step(single, request)
    some = single["worker"].step(StepRequest(0, _lambdas(), rows=(1, 3)))
    _assert_close(some.gradient[[1, 3]], whole.gradient[[1, 3]], rtol=1e-5)
    assert location == "device" or not some.gradient[[0, 2]].any()


def test_the_models_are_those_of_the_request_not_of_the_tasks(single, literal):
    """Two of the four checkpoints, in another order, are two rows."""
    worker = single["worker"]
    whole = _load(worker, _request())
    lambdas_KL = np.zeros((K, LAYERS["tensor"]))
    lambdas_KL[[3, 1]] = _lambdas()[:2]
    expected = worker.step(StepRequest(0, lambdas_KL))
    some = tuple(worker.source.tasks[k].checkpoint for k in (3, 1))
    report = worker.load(replace(_request(), models=some))
    result = worker.step(StepRequest(0, _lambdas()[:2]))
    assert report.vector_bytes == whole.vector_bytes // 2
    assert result.gradient.shape == (2, LAYERS["tensor"])
    _assert_close(result.gradient, expected.gradient[[3, 1]], rtol=1e-5)
    np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-5)


def test_a_task_without_images_has_neither_loss_nor_predictions(config):
    without_images = config.tasks[2].model_copy(
        update={"adapt": None, "classnames": (), "test": None}
    )
    some = config.model_copy(update={"tasks": (*config.tasks[:2], without_images, config.tasks[3])})
    whole = _worker(config, _request()).step(StepRequest(0, _lambdas()))
    result = _worker(some, _request()).step(StepRequest(0, _lambdas()))
    assert result.gradient.shape == (K, LAYERS["tensor"])
    assert result.gradient[2].any()  # its expert is merged nevertheless
    assert result.loss[2] == result.entropy[2] == 0
    assert not result.probabilities[2].any()
    np.testing.assert_allclose(result.loss[[0, 1, 3]], whole.loss[[0, 1, 3]], rtol=1e-5)


def test_details_are_the_products_of_whole_vectors(single, literal):
    """⟨∂ℒ/∂θ, θ₀⟩, ‖∂ℒ/∂θ‖², ‖θ‖² and ‖θ_k‖² of every layer."""
    worker = single["worker"]
    _load(worker, _request())
    details = worker.step(StepRequest(0, _lambdas(), details=True)).details
    theta = literal.theta(torch.from_numpy(_lambdas()))
    views = worker._model.layout.views(worker._model.gradient_P)
    gradient = {name: view.double() for name, view in views.items()}
    names = list(theta)
    base = [(gradient[n] * literal.base[n]).sum().item() for n in names]
    _assert_close(details["gradient_base"], np.array(base))
    _assert_close(
        details["gradient_square"], np.array([gradient[n].square().sum().item() for n in names])
    )
    _assert_close(
        details["theta_square"], np.array([theta[n].square().sum().item() for n in names])
    )
    experts = [{n: literal.base[n] + v[n] for n in names} for v in literal.vectors]
    squares = [[e[n].square().sum().item() for n in names] for e in experts]
    _assert_close(details["model_square"], np.array(squares))


# --- one worker ---------------------------------------------------------------------------------


def test_a_step_keeps_no_state(single):
    """The same request gives the same bits, whatever is requested in between."""
    worker = single["worker"]
    _load(worker, _request())
    first = worker.step(StepRequest(1, _lambdas()))
    worker.step(StepRequest(0, 2 * _lambdas()))
    again = worker.step(StepRequest(1, _lambdas(), generation=7))
    assert np.array_equal(first.gradient, again.gradient)
    assert np.array_equal(first.loss, again.loss)
    assert (again.step, again.rank, again.generation) == (1, 0, 7)


def test_a_request_of_an_abandoned_generation_is_refused(config):
    """It was sent before the group was built anew."""
    worker = _worker(config, _request())
    worker.abort(3)
    with pytest.raises(
        RunError, match="step 1: the request is of generation 2, this worker is in generation 3"
    ):
        worker.step(StepRequest(0, _lambdas(), generation=2))
    assert worker.step(StepRequest(0, _lambdas(), generation=3)).generation == 3


@pytest.mark.parametrize("micro_batch", [1, 3, 100, "all"])
def test_micro_batches_sum_to_the_whole_batch(single, config, micro_batch):
    whole = _step(single, _request())
    cut = _worker(config, _request(), micro_batch=micro_batch).step(StepRequest(0, _lambdas()))
    _assert_close(cut.gradient, whole.gradient, rtol=1e-5)
    np.testing.assert_allclose(cut.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(cut.entropy, whole.entropy, rtol=1e-5)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7, 16, 100])
def test_passes_show_every_slot_once_in_order_and_evenly(most):
    slots = [SlotRange(0, 0, 4), SlotRange(1, 2, 9), SlotRange(3, 0, 1)]
    total = sum(part.stop - part.start for part in slots)
    passes = list(_passes(slots, pass_images(total, most)))
    shown = [(p.task, i) for parts in passes for p in parts for i in range(p.start, p.stop)]
    assert shown == [(part.task, i) for part in slots for i in range(part.start, part.stop)]
    sizes = [sum(part.stop - part.start for part in parts) for parts in passes]
    assert max(sizes) <= most
    assert len(sizes) == -(-total // most)
    assert len({*sizes[:-1]}) <= 1
    assert sizes[0] - sizes[-1] < len(sizes)


def test_a_step_before_load_is_refused(config):
    with pytest.raises(RuntimeError, match="before load"):
        MergeWorker(ClipSource(config.model, config.tasks), WorkerSpec()).step(
            StepRequest(0, _lambdas())
        )


def test_the_load_report_counts_bytes_and_tasks(single, config):
    report = _load(single["worker"], _request())
    layout = open_pretrained(resolve_model(config.model))[0].layout
    assert report.vector_bytes == 4 * K * layout.columns
    in_bfloat16 = _load(single["worker"], _request(storage=VectorStorage("bfloat16")))
    assert in_bfloat16.vector_bytes == 2 * K * layout.columns
    assert report.tasks == config.task_names
    assert report.rank == 0


# --- the same batches, cut over workers and shards ----------------------------------


@pytest.mark.parametrize("workers", [2, 5])
def test_the_parts_of_all_workers_sum_to_one_workers_step(single, config, workers):
    whole = _step(single, _request())
    parts = [
        _worker(config, _request(), rank, workers).step(StepRequest(0, _lambdas()))
        for rank in range(workers)
    ]
    _assert_close(sum(p.gradient for p in parts), whole.gradient, rtol=1e-5)
    np.testing.assert_allclose(sum(p.loss for p in parts), whole.loss, rtol=1e-5)
    np.testing.assert_allclose(sum(p.entropy for p in parts), whole.entropy, rtol=1e-5)


def test_workers_pin_only_the_images_of_their_own_slots(config):
    reports = [
        _load(MergeWorker(ClipSource(config.model, config.tasks), WorkerSpec(rank, 4)), _request())
        for rank in range(4)
    ]
    assert [report.tasks for report in reports] == [(name,) for name in config.task_names]
    assert all(0 < report.image_bytes <= 12 * 3 * 32 * 32 for report in reports)


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_give_the_gradient_of_the_whole(single, config, shards):
    """With the collectives by hand: gather θ, sum ∂ℒ/∂θ, and give each shard its columns."""
    whole = _step(single, _request())
    source = ClipSource(config.model, config.tasks)
    specs = [WorkerSpec(rank, shards, shards) for rank in range(shards)]
    models = [source.serve(spec, {}) for spec in specs]
    worker_shards = [
        WorkerShard(spec, source.task_names, _with_models(source, _request()), model)
        for spec, model in zip(specs, models, strict=True)
    ]
    width = models[0].theta_P.numel() // shards
    columns = [slice(rank * width, (rank + 1) * width) for rank in range(shards)]

    pinned_bytes = sum(shard.store.nbytes for shard in worker_shards)
    assert pinned_bytes == 4 * K * models[0].layout.shard(0, shards).padded_columns
    for shard, model, here in zip(worker_shards, models, columns, strict=True):
        shard.merge(_lambdas(), model.theta_P[here])
    gathered = torch.cat([m.theta_P[here] for m, here in zip(models, columns, strict=True)])
    losses, request = [], StepRequest(0, _lambdas())
    for shard, model in zip(worker_shards, models, strict=True):
        model.theta_P.copy_(gathered)
        losses.append(shard.backward(request).loss)
    summed_P = sum(model.gradient_P for model in models)
    gradient_KL = sum(
        shard.inner_products(summed_P[here])
        for shard, here in zip(worker_shards, columns, strict=True)
    )
    _assert_close(gradient_KL, whole.gradient, rtol=1e-5)
    np.testing.assert_allclose(sum(losses), whole.loss, rtol=1e-5)


def test_slots_are_counted_by_the_population(single, config):
    _load(single["worker"], _request(slots_per_step=50))
    counts = slot_counts([12] * K, 50)
    slots = single["worker"]._shard.slots
    assert [(s.task, s.start, s.stop) for s in slots] == [(k, 0, counts[k]) for k in range(K)]
