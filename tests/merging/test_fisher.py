"""The diagonal Fisher information against its definition, and the average that it weights."""

from __future__ import annotations

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor
from torch.func import functional_call
from torch.testing import assert_close

from raymerge.merging.fisher import EPSILON, FisherSum, fisher_diagonal, task_weight
from raymerge.merging.layout import ParameterLayout

N, D, C = 7, 5, 4


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _linear(parameters: dict[str, Tensor], x_bD: Tensor) -> Tensor:
    return x_bD @ parameters["w"].t()


def _mlp(parameters: dict[str, Tensor], x_bD: Tensor) -> Tensor:
    hidden = torch.tanh(x_bD @ parameters["w1"] + parameters["b1"])
    return hidden @ parameters["w2"]


MLP = {"w1": _normal(D, 6), "b1": _normal(6, seed=1), "w2": _normal(6, C, seed=2)}
X_ND = _normal(N, D, seed=3)


def _by_definition(logits, parameters: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    """mean_n Σ_c p_nc (∂ log p_nc)², one image and one class at a time, by autograd."""
    leaves = {name: t.clone().requires_grad_(True) for name, t in parameters.items()}
    total = {name: torch.zeros_like(t) for name, t in parameters.items()}
    for image in images:
        log_p_C = logits(leaves, image[None])[0].log_softmax(-1)
        for log_p in log_p_C:
            gradients = torch.autograd.grad(log_p, list(leaves.values()), retain_graph=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                total[name] += log_p.detach().exp() * gradient**2 / len(images)
    return total


def test_a_softmax_linear_layer_has_a_closed_form():
    """F_cj = mean_n p_c (1 − p_c) x_j²."""
    w_CD = _normal(C, D)
    p_NC = (X_ND @ w_CD.t()).softmax(-1)
    expected_CD = (p_NC * (1 - p_NC)).t() @ X_ND**2 / N
    assert_close(fisher_diagonal(_linear, {"w": w_CD}, X_ND)["w"], expected_CD)


def test_it_is_its_definition():
    assert_close(fisher_diagonal(_mlp, MLP, X_ND), _by_definition(_mlp, MLP, X_ND))


def test_images_and_classes_do_not_cancel():
    """The gradient of the expected log-likelihood is zero, its mean square is not; and an image
    with its mirror image, whose gradients cancel, has the Fisher information of either."""
    w_CD = torch.zeros(C, D, dtype=torch.float64)
    one_CD = fisher_diagonal(_linear, {"w": w_CD}, X_ND[:1])["w"]
    both_CD = fisher_diagonal(_linear, {"w": w_CD}, torch.cat([X_ND[:1], -X_ND[:1]]))["w"]
    assert (one_CD > 0).all()
    assert_close(both_CD, one_CD)


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("chunk", [1, 3, N, 100])
def test_chunks_change_nothing(samples, chunk):
    def run(chunk: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(5)
        return fisher_diagonal(_mlp, MLP, X_ND, samples=samples, generator=generator, chunk=chunk)

    assert_close(run(chunk), run(2))


def _error(samples: int) -> float:
    """Return the sampled estimate's relative root-mean-square error over eight seeds."""
    exact = fisher_diagonal(_mlp, MLP, X_ND)["w1"]
    total = 0.0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        drawn = fisher_diagonal(_mlp, MLP, X_ND, samples=samples, generator=generator)["w1"]
        total += float((drawn - exact).square().sum() / exact.square().sum()) / 8
    return total**0.5


def test_sampled_classes_approach_the_expectation_as_one_over_the_root_of_the_draws():
    few, many = _error(8), _error(512)
    assert many < 0.1
    assert few / many == pytest.approx(8, rel=0.4)


def test_certain_predictions_carry_no_information():
    """Saturated logits: finite, and zero. No class of probability zero is ever drawn."""
    w_CD = _normal(C, D) * 1e6
    assert fisher_diagonal(_linear, {"w": w_CD}, X_ND)["w"].count_nonzero() == 0
    drawn = fisher_diagonal(_linear, {"w": w_CD}, X_ND, samples=50)["w"]
    assert drawn.count_nonzero() == 0


def _tower() -> tuple[VisionTransformer, Tensor]:
    torch.manual_seed(0)
    tower = VisionTransformer(
        image_size=32, patch_size=16, width=16, layers=1, heads=2, mlp_ratio=2.0, output_dim=C
    )
    return tower.double().eval(), _normal(3, 3, 32, 32)


@pytest.mark.filterwarnings("error")
def test_the_diagonal_is_right_through_open_clips_attention():
    """It takes no slow path (torch would warn) and builds no graph."""
    tower, images = _tower()
    parameters = dict(tower.named_parameters())
    diagonal = fisher_diagonal(lambda p, x: functional_call(tower, p, (x,)), parameters, images)
    expected = _by_definition(lambda p, x: functional_call(tower, p, (x,)), parameters, images)
    assert not any(t.requires_grad for t in diagonal.values())
    assert_close(diagonal, {name: t.detach() for name, t in expected.items()}, rtol=1e-6, atol=1e-9)


# --- the average -------------------------------------------------------------------------------


K, P = 3, 40


def _merged(fishers_KP: Tensor, vectors_KP: Tensor) -> Tensor:
    total = FisherSum(vectors_KP.shape[1])
    for fisher_P, vector_P in zip(fishers_KP, vectors_KP, strict=True):
        total.add(fisher_P, vector_P, task_weight(fisher_P))
    return total.delta()


def _problem() -> tuple[Tensor, Tensor]:
    return _normal(K, P).square().float(), _normal(K, P, seed=1).float()


def test_equal_information_gives_the_mean():
    fishers_KP, vectors_KP = _problem()
    assert_close(_merged(fishers_KP[:1].expand(K, P), vectors_KP), vectors_KP.mean(0))


def test_the_merged_model_is_the_weighted_average_of_the_experts():
    """The expected average has a normalised over the tasks, and θ_k instead of task vectors."""
    fishers_KP, vectors_KP = _problem()
    pretrained_P = _normal(P, seed=2).float()
    a_K = 1 / (fishers_KP.norm(dim=1) + EPSILON)
    weights_KP = (a_K / a_K.sum())[:, None] * (fishers_KP + EPSILON)
    expected_P = (weights_KP * (pretrained_P + vectors_KP)).sum(0) / weights_KP.sum(0)
    assert_close(pretrained_P + _merged(fishers_KP, vectors_KP), expected_P)


def test_the_scale_of_a_tasks_information_does_not_matter():
    fishers_KP, vectors_KP = _problem()
    scaled_KP = fishers_KP * torch.tensor([1.0, 300.0, 0.02])[:, None]
    assert_close(_merged(scaled_KP, vectors_KP), _merged(fishers_KP, vectors_KP), rtol=0, atol=1e-3)


def test_an_informed_column_is_its_experts_and_an_uninformed_one_the_mean():
    fishers_KP = torch.eye(K)[:, :2].repeat(1, 2) * torch.tensor([1.0, 1.0, 0.0, 0.0])
    fishers_KP[2, 0] = 0.0
    fishers_KP = torch.cat([fishers_KP, torch.eye(K)], dim=1)  # equal norms but for ε
    fishers_KP /= fishers_KP.norm(dim=1, keepdim=True)
    vectors_KP = _normal(K, fishers_KP.shape[1]).float()
    merged_P = _merged(fishers_KP, vectors_KP)
    assert_close(merged_P[:2], vectors_KP.diagonal()[:2], rtol=0, atol=1e-4)
    assert_close(merged_P[2:4], vectors_KP[:, 2:4].mean(0))


def test_any_slice_is_the_slice_of_the_whole_and_padding_stays_zero():
    layout = ParameterLayout(("a", "b"), ((5,), (3, 7)))
    fishers_KP, vectors_KP = torch.zeros(2, K, layout.columns)
    for k in range(K):
        for name, view in layout.views(fishers_KP[k]).items():
            view.copy_(_normal(*view.shape, seed=k).square())
            layout.views(vectors_KP[k])[name].copy_(_normal(*view.shape, seed=k + K))
    whole_P = _merged(fishers_KP, vectors_KP)
    views = layout.views(whole_P)
    assert whole_P.count_nonzero() == sum(v.count_nonzero() for v in views.values()) == 26
    here = slice(layout.offsets[1], layout.columns)
    part = FisherSum(here.stop - here.start)
    for fisher_P, vector_P in zip(fishers_KP, vectors_KP, strict=True):
        part.add(fisher_P[here], vector_P[here], task_weight(fisher_P))
    assert torch.equal(part.delta(), whole_P[here])
