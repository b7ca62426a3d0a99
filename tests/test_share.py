"""One worker's step on a real open_clip model: ∂ℒ/∂λ against autograd through the whole merge.

In this process: no Ray, no process group.

Legend: K tasks, L layers, T tensors, P parameters, N columns of a shard.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from raymerge.architecture import open_pretrained, resolve_model
from raymerge.checkpoints.task_vectors import ties_statistics
from raymerge.checkpoints.visual import open_visual
from raymerge.config import Config
from raymerge.data.slots import slot_counts, step_images
from raymerge.heads import zero_shot_head
from raymerge.messages import LoadRequest, StepRequest, StepResult, VectorStorage, WorkerSpec
from raymerge.share import ServedModel, Share
from raymerge.worker import MergeWorker

K, IMAGES = 4, 4
LAYERS = {"task": 1, "block": 4, "tensor": 32}


@pytest.fixture(scope="module")
def config(world) -> Config:
    return world.parse()


def _request(granularity: str = "tensor", **changes) -> LoadRequest:
    request = LoadRequest(granularity, "entropy", IMAGES, batches=1, steps=3, seed=1)
    return replace(request, **changes)


def _lambdas(granularity: str = "tensor") -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 0.5, (K, LAYERS[granularity]))


def _worker(config: Config, request: LoadRequest, rank: int = 0, workers: int = 1, **spec):
    worker = MergeWorker(WorkerSpec(config.model, config.tasks, rank, workers, **spec))
    worker.load(request)
    return worker


@pytest.fixture(scope="module")
def lone(config) -> dict[str, MergeWorker]:
    """One worker for all tasks; a test that needs another request loads it again."""
    return {"worker": _worker(config, _request())}


def _step(lone, request: LoadRequest, step: int = 0, lambdas=None) -> StepResult:
    worker = lone["worker"]
    worker.load(request)
    lambdas = _lambdas(request.granularity) if lambdas is None else lambdas
    return worker.step(StepRequest(step, lambdas))


# --- against autograd -------------------------------------------------------------------------


class Literal:
    """The same loss from the config alone: open_clip's model and transform, float64, autograd."""

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

    def images(self, task: int, step: int, count: int) -> Tensor:
        entry = self.config.tasks[task]
        paths = sorted(Path(entry.adapt).iterdir())
        chosen = step_images(1, entry.name, step, min(count, len(paths)), len(paths))
        return torch.stack([self._transform(Image.open(paths[i])).double() for i in chosen])

    def losses(self, lambdas_KT: Tensor, step: int, count: int) -> Tensor:
        """(K,): each task's mean entropy at θ₀ + Σ λ V."""
        theta = {
            name: base
            + sum(lambdas_KT[k, t] * vector[name] for k, vector in enumerate(self.vectors))
            for t, (name, base) in enumerate(self.base.items())
        }
        losses = []
        for task, head_DC in enumerate(self._heads):
            images = self.images(task, step, count)
            features = torch.func.functional_call(self._visual, theta, (images,))
            logits = features / features.norm(dim=1, keepdim=True) @ head_DC
            p = logits.softmax(1)
            losses.append(-(p * p.log()).sum(1).mean())
        return torch.stack(losses)


@pytest.fixture(scope="module")
def literal(config) -> Literal:
    return Literal(config)


def _spread(literal: Literal, lambdas_KL: Tensor, granularity: str) -> Tensor:
    """(K, L) → (K, T), by the names alone."""
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
    """Relative to the largest entry: float32's noise does not shrink with a gradient's size."""
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= rtol * np.abs(expected).max()


@pytest.mark.parametrize("granularity", list(LAYERS))
def test_the_gradient_is_autograd_through_the_merge_of_open_clips_model(lone, literal, granularity):
    losses_K, gradient_KL = _autograd(literal, granularity)
    result = _step(lone, _request(granularity))
    assert result.gradient.dtype == np.float64
    _assert_close(result.gradient, gradient_KL)
    np.testing.assert_allclose(result.loss, losses_K, rtol=1e-4)
    np.testing.assert_allclose(result.entropy, losses_K, rtol=1e-4)


def test_another_step_sees_other_images(lone, literal):
    losses_K, gradient_KL = _autograd(literal, "tensor", step=2)
    result = _step(lone, _request(), step=2)
    _assert_close(result.gradient, gradient_KL)
    np.testing.assert_allclose(result.loss, losses_K, rtol=1e-4)


def test_a_task_with_fewer_images_than_a_batch_uses_all_of_them(lone, literal):
    losses_K, gradient_KL = _autograd(literal, "task", count=50)
    result = _step(lone, _request("task", images_per_step=50))
    _assert_close(result.gradient, gradient_KL)
    np.testing.assert_allclose(result.loss, losses_K, rtol=1e-4)


def test_two_batches_sum_their_means_as_the_official_loop_does(lone, literal):
    """2 × 4 images: twice the mean over 8, in loss and gradient; the entropy stays a mean."""
    losses_K, gradient_KL = _autograd(literal, "tensor", count=8)
    result = _step(lone, _request(images_per_step=8, batches=2))
    _assert_close(result.gradient, 2 * gradient_KL)
    np.testing.assert_allclose(result.loss, 2 * losses_K, rtol=1e-4)
    np.testing.assert_allclose(result.entropy, losses_K, rtol=1e-4)


def test_with_ties_the_basis_is_phi(lone, literal, config):
    """AdaMerging++: the same gradient with V = Φ(T)."""
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
    result = _step(lone, _request(ties=ties))
    _assert_close(result.gradient, gradient_KL)
    np.testing.assert_allclose(result.loss, losses_K, rtol=1e-4)


def test_bfloat16_autocast_gives_nearly_the_same_gradient(lone, literal):
    _, gradient_KL = _autograd(literal, "task")
    result = _step(lone, _request("task", autocast=True))
    _assert_close(result.gradient, gradient_KL, rtol=0.2)
    assert np.abs(result.gradient - _step(lone, _request("task")).gradient).max() > 0


@pytest.mark.parametrize("location", ["host", "disk"])
def test_where_the_vectors_lie_changes_no_bit(lone, tmp_path, location):
    whole = _step(lone, _request())
    elsewhere = _step(lone, _request(storage=VectorStorage("float32", location, str(tmp_path))))
    assert np.array_equal(elsewhere.gradient, whole.gradient)
    assert np.array_equal(elsewhere.loss, whole.loss)
    assert list(tmp_path.iterdir()) == []


def test_vectors_in_bfloat16_give_the_gradient_of_the_rounded_vectors(lone, literal):
    """Not merely nearly: autograd through the merge of V rounded to bfloat16."""
    exact = literal.vectors
    literal.vectors = [
        {name: t.float().bfloat16().double() for name, t in v.items()} for v in exact
    ]
    try:
        losses_K, gradient_KL = _autograd(literal, "tensor")
    finally:
        literal.vectors = exact
    result = _step(lone, _request(storage=VectorStorage("bfloat16")))
    _assert_close(result.gradient, gradient_KL)
    np.testing.assert_allclose(result.loss, losses_K, rtol=1e-4)
    assert np.abs(result.gradient - _step(lone, _request()).gradient).max() > 0


# --- one worker ---------------------------------------------------------------------------------


def test_a_step_keeps_no_state(lone):
    """Idempotent: the same request gives the same bits, whatever was asked in between."""
    worker = lone["worker"]
    worker.load(_request())
    first = worker.step(StepRequest(1, _lambdas()))
    worker.step(StepRequest(0, 2 * _lambdas()))
    again = worker.step(StepRequest(1, _lambdas(), generation=7))
    assert np.array_equal(first.gradient, again.gradient)
    assert np.array_equal(first.loss, again.loss)
    assert (again.step, again.rank, again.generation) == (1, 0, 7)


@pytest.mark.parametrize("micro_batch", [1, 3, 100, "all"])
def test_micro_batches_sum_to_the_whole_batch(lone, config, micro_batch):
    whole = _step(lone, _request())
    cut = _worker(config, _request(), micro_batch=micro_batch).step(StepRequest(0, _lambdas()))
    _assert_close(cut.gradient, whole.gradient, rtol=1e-5)
    np.testing.assert_allclose(cut.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(cut.entropy, whole.entropy, rtol=1e-5)


def test_a_step_before_load_is_refused(config):
    with pytest.raises(RuntimeError, match="before load"):
        MergeWorker(WorkerSpec(config.model, config.tasks)).step(StepRequest(0, _lambdas()))


def test_the_report_says_what_is_held(lone, config):
    report = lone["worker"].load(_request())
    layout = open_pretrained(resolve_model(config.model))[0].layout
    assert report.vector_bytes == 4 * K * layout.columns
    in_bfloat16 = lone["worker"].load(_request(storage=VectorStorage("bfloat16")))
    assert in_bfloat16.vector_bytes == 2 * K * layout.columns
    assert report.tasks == config.task_names
    assert report.rank == 0


# --- the same batches, cut over workers and shards ----------------------------------


@pytest.mark.parametrize("workers", [2, 5])
def test_the_shares_of_all_workers_sum_to_one_workers_step(lone, config, workers):
    whole = _step(lone, _request())
    parts = [
        _worker(config, _request(), rank, workers).step(StepRequest(0, _lambdas()))
        for rank in range(workers)
    ]
    _assert_close(sum(p.gradient for p in parts), whole.gradient, rtol=1e-5)
    np.testing.assert_allclose(sum(p.loss for p in parts), whole.loss, rtol=1e-5)
    np.testing.assert_allclose(sum(p.entropy for p in parts), whole.entropy, rtol=1e-5)


def test_workers_pin_only_the_images_of_their_own_slots(config):
    reports = [
        MergeWorker(WorkerSpec(config.model, config.tasks, rank, 4)).load(_request())
        for rank in range(4)
    ]
    assert [report.tasks for report in reports] == [(name,) for name in config.task_names]
    assert all(0 < report.image_bytes <= 12 * 3 * 32 * 32 for report in reports)


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_give_the_gradient_of_the_whole(lone, config, shards):
    """The collectives done by hand: gather θ, sum ∂ℒ/∂θ, and each takes its own columns."""
    whole = _step(lone, _request())
    spec = WorkerSpec(config.model, config.tasks, workers=shards, shards=shards)
    specs = [replace(spec, rank=rank) for rank in range(shards)]
    models = [ServedModel(s) for s in specs]
    shares = [Share(s, _request(), m, {}) for s, m in zip(specs, models, strict=True)]
    width = models[0].encoder.theta_P.numel() // shards
    columns = [slice(rank * width, (rank + 1) * width) for rank in range(shards)]

    held = sum(share.vectors_CKn.numel() for share in shares)
    assert held == K * models[0].layout.shard(0, shards).padded_columns
    for share, model, here in zip(shares, models, columns, strict=True):
        share.merge(_lambdas(), model.encoder.theta_P[here])
    gathered = torch.cat([m.encoder.theta_P[here] for m, here in zip(models, columns, strict=True)])
    losses = []
    for share, model in zip(shares, models, strict=True):
        model.encoder.theta_P.copy_(gathered)
        losses.append(share.backward(0)[0])
    summed_P = sum(model.encoder.gradient_P for model in models)
    gradient_KL = sum(
        share.inner_products(summed_P[here]) for share, here in zip(shares, columns, strict=True)
    )
    _assert_close(gradient_KL, whole.gradient, rtol=1e-5)
    np.testing.assert_allclose(sum(losses), whole.loss, rtol=1e-5)


def test_slots_are_counted_by_the_population(lone, config):
    lone["worker"].load(_request(images_per_step=50))
    counts = slot_counts([12] * K, 50)
    slots = lone["worker"]._share.slots
    assert [(s.task, s.start, s.stop) for s in slots] == [(k, 0, counts[k]) for k in range(K)]
