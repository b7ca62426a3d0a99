"""θ = θ₀ + Σ λ V and its adjoint."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from raymerge.merging import merge
from raymerge.merging.layout import CELL, LayerMap, ParameterLayout
from raymerge.merging.merge import combine, inner_products, merge_into, sum_cells
from raymerge.merging.objectives import entropy

# Deliberately ragged against the grid: tensors smaller than a cell, crossing cells, many cells.
LAYOUT = ParameterLayout(
    ("class_embedding", "resblocks.0.w", "resblocks.0.b", "resblocks.1.w", "resblocks.1.b", "proj"),
    ((5,), (CELL - 7,), (11,), (3 * CELL + 123,), (), (40,)),
)
K, T, P = 3, len(LAYOUT.names), LAYOUT.columns


WHOLE = LAYOUT.shard(0, 1)
TENSORS = LAYOUT.layers("tensor")


def _unpadded(flat: Tensor) -> Tensor:
    """Return the vector with zeros in the padding, as every flat vector has them."""
    out = torch.zeros_like(flat)
    for start, size in zip(LAYOUT.offsets, LAYOUT.sizes, strict=False):
        out[..., start : start + size] = flat[..., start : start + size]
    return out


def _problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pretrained_P = _unpadded(torch.randn(P, generator=generator, dtype=dtype))
    vectors_KP = _unpadded(0.1 * torch.randn(K, P, generator=generator, dtype=dtype))
    lambdas_KT = torch.rand(K, T, generator=generator, dtype=dtype)
    return pretrained_P, vectors_KP, lambdas_KT


def _padded(flat: Tensor, shards: int) -> Tensor:
    longer = LAYOUT.shard(0, shards).padded_columns - P
    return torch.nn.functional.pad(flat, (0, longer))


def _cells(vectors_KN: Tensor) -> Tensor:
    """(K, N) → (C, K, CELL), in its own memory, as a worker stores it."""
    return vectors_KN.unflatten(1, (-1, CELL)).transpose(0, 1).contiguous()


def _merged(pretrained_P: Tensor, vectors_KP: Tensor, lambdas_KT: Tensor, shards: int = 1):
    base, vectors = _padded(pretrained_P, shards), _padded(vectors_KP, shards)
    out = torch.full_like(base, torch.nan)
    for rank in range(shards):
        shard = LAYOUT.shard(rank, shards)
        here = slice(shard.start, shard.start + shard.columns)
        lambdas_KC = lambdas_KT[:, TENSORS.of_cells(shard)]
        merge_into(out[here], base[here], _cells(vectors[:, here]), lambdas_KC)
    return out[:P]


def _products(
    gradient_P: Tensor, vectors_KP: Tensor, shards: int = 1, layers: LayerMap = TENSORS
) -> list[Tensor]:
    """Return the inner products per layer, one tensor for each shard."""
    gradient, vectors = _padded(gradient_P, shards), _padded(vectors_KP, shards)
    out = []
    for rank in range(shards):
        shard = LAYOUT.shard(rank, shards)
        here = slice(shard.start, shard.start + shard.columns)
        per_cell_CK = inner_products(gradient[here].clone(), _cells(vectors[:, here]))
        out.append(sum_cells(per_cell_CK, layers.of_cells(shard), len(layers.names)))
    return out


def _literal_merge(pretrained_P: Tensor, vectors_KP: Tensor, lambdas_KT: Tensor) -> Tensor:
    """The definition, entry by entry: every column takes the λ of its tensor."""
    sizes = [b - a for a, b in zip(LAYOUT.offsets, LAYOUT.offsets[1:], strict=False)]
    lambdas_KP = lambdas_KT.repeat_interleave(torch.tensor(sizes), dim=1)
    return pretrained_P + (lambdas_KP * vectors_KP).sum(0)


def _network_loss(theta_P: Tensor) -> Tensor:
    """A smooth function of θ that couples every parameter: entropies of a two-layer network."""
    hidden_BH = torch.tanh(theta_P.unflatten(0, (1, -1))[:, : P // 64 * 64].reshape(64, -1).mean(1))
    logits_BC = (hidden_BH * torch.linspace(1, 9, 64, dtype=theta_P.dtype)).view(8, 8)
    rest = theta_P.square().mean() + torch.sin(3 * theta_P[:: CELL // 3]).sum()
    return 30 * entropy(10 * logits_BC).mean() + rest


def test_merge_equals_its_definition():
    problem = _problem()
    torch.testing.assert_close(_merged(*problem), _literal_merge(*problem), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
def test_gradient_is_autograd_through_the_merge(granularity):
    """∂ℒ/∂λ = ⟨∂ℒ/∂θ, V⟩ summed over the layer's tensors."""
    pretrained_P, vectors_KP, _ = _problem()
    layers = LAYOUT.layers(granularity)
    generator = torch.Generator().manual_seed(1)
    lambdas_KL = torch.rand(K, len(layers.names), generator=generator, dtype=torch.float64)

    theta_P = _merged(pretrained_P, vectors_KP, layers.expand(lambdas_KL)).requires_grad_(True)
    _network_loss(theta_P).backward()
    ours_KL = _products(theta_P.grad, vectors_KP, layers=layers)[0]

    through_KL = lambdas_KL.clone().requires_grad_(True)
    _network_loss(_literal_merge(pretrained_P, vectors_KP, layers.expand(through_KL))).backward()
    assert through_KL.grad.abs().min() > 1e-9  # the loss depends on every coefficient
    torch.testing.assert_close(ours_KL, through_KL.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
def test_gradient_is_the_central_difference(granularity):
    """This check does not differentiate through the merge."""
    pretrained_P, vectors_KP, _ = _problem()
    layers = LAYOUT.layers(granularity)
    lambdas_KL = torch.full((K, len(layers.names)), 0.3, dtype=torch.float64)

    def loss(at_KL: Tensor) -> float:
        return float(_network_loss(_merged(pretrained_P, vectors_KP, layers.expand(at_KL))))

    theta_P = _merged(pretrained_P, vectors_KP, layers.expand(lambdas_KL)).requires_grad_(True)
    _network_loss(theta_P).backward()
    ours_KL = _products(theta_P.grad, vectors_KP, layers=layers)[0]

    torch.testing.assert_close(
        ours_KL, _central_differences(loss, lambdas_KL), rtol=1e-5, atol=1e-7
    )


def _central_differences(loss: Callable[[Tensor], float], at_KL: Tensor, h: float = 1e-5) -> Tensor:
    out_KL = torch.empty_like(at_KL)
    for k, layer in torch.cartesian_prod(*map(torch.arange, at_KL.shape)).view(-1, 2).tolist():
        step_KL = torch.zeros_like(at_KL)
        step_KL[k, layer] = h
        out_KL[k, layer] = (loss(at_KL + step_KL) - loss(at_KL - step_KL)) / (2 * h)
    return out_KL


def test_inner_products_are_the_adjoint_of_the_merge():
    """⟨g, merge(λ) − θ₀⟩ = ⟨inner_products(g), λ⟩ for any g and λ: the two are one linear map."""
    pretrained_P, vectors_KP, lambdas_KT = _problem()
    g_P = torch.randn(P, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    left = g_P @ (_merged(pretrained_P, vectors_KP, lambdas_KT) - pretrained_P)
    right = (_products(g_P, vectors_KP)[0] * lambdas_KT).sum()
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


# --- the corners of the coefficient cube ------------------------------------------------------


def test_lambda_zero_is_the_pretrained_model_bit_for_bit():
    pretrained_P, vectors_KP, lambdas_KT = _problem(torch.float32)
    zero_KT = torch.zeros_like(lambdas_KT)
    assert torch.equal(_merged(pretrained_P, vectors_KP, zero_KT), pretrained_P)


@pytest.mark.parametrize("k", range(K))
def test_lambda_unit_vector_is_that_expert(k):
    pretrained_P, vectors_KP, lambdas_KT = _problem(torch.float32)
    finetuned_KP = pretrained_P + vectors_KP
    unit_KT = torch.zeros_like(lambdas_KT)
    unit_KT[k] = 1
    merged_P = _merged(pretrained_P, finetuned_KP - pretrained_P, unit_KT)
    torch.testing.assert_close(merged_P, finetuned_KP[k], rtol=0, atol=5e-7)


def test_combine_is_the_merge_of_columns_that_share_their_coefficients():
    pretrained_P, vectors_KP, lambdas_KT = _problem()
    whole_P = _merged(pretrained_P, vectors_KP, lambdas_KT)
    for t, (start, size) in enumerate(zip(LAYOUT.offsets, LAYOUT.sizes, strict=False)):
        here = slice(start, start + size)
        combined_n = combine(pretrained_P[here], vectors_KP[:, here], lambdas_KT[:, t])
        torch.testing.assert_close(combined_n, whole_P[here], rtol=1e-14, atol=1e-15)


def test_padding_stays_zero():
    merged_P = _merged(*_problem())
    assert torch.equal(merged_P, _unpadded(merged_P))


def test_lambda_one_over_k_is_the_average_of_the_experts():
    pretrained_P, vectors_KP, lambdas_KT = _problem()
    merged_P = _merged(pretrained_P, vectors_KP, torch.full_like(lambdas_KT, 1 / K))
    torch.testing.assert_close(merged_P, (pretrained_P + vectors_KP).mean(0), rtol=0, atol=1e-14)


def test_one_task_with_lambda_one_is_its_expert():
    pretrained_P, vectors_KP, _ = _problem()
    merged_P = _merged(pretrained_P, vectors_KP[:1], torch.ones(1, T, dtype=torch.float64))
    torch.testing.assert_close(merged_P, pretrained_P + vectors_KP[0], rtol=0, atol=1e-15)


def test_each_tensor_follows_its_own_coefficient_only():
    pretrained_P, vectors_KP, lambdas_KT = _problem()
    changed_KT = lambdas_KT.clone()
    changed_KT[1, 3] += 1
    moved_P = _merged(pretrained_P, vectors_KP, changed_KT) != _merged(
        pretrained_P, vectors_KP, lambdas_KT
    )
    start, stop = LAYOUT.offsets[3], LAYOUT.offsets[3] + LAYOUT.sizes[3]
    assert moved_P[start:stop].all()
    assert moved_P.sum() == stop - start


# --- shards, in process -----------------------------------------------------------------------


@pytest.mark.parametrize("shards", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_over_shards_is_the_whole_merge(shards, dtype):
    problem = _problem(dtype)
    torch.testing.assert_close(
        _merged(*problem, shards=shards),
        _merged(*problem),
        rtol=4 * torch.finfo(dtype).eps,
        atol=torch.finfo(dtype).eps,
    )


@pytest.mark.parametrize("shards", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inner_products_over_shards_sum_to_the_whole(shards, dtype):
    """Cells are summed in the same way in any shard, so the sums agree beyond float32."""
    pretrained_P, vectors_KP, _ = _problem(dtype)
    whole_KT = _products(pretrained_P, vectors_KP)[0]
    sum_KT = sum(_products(pretrained_P, vectors_KP, shards))
    torch.testing.assert_close(sum_KT, whole_KT, rtol=1e-12, atol=1e-12)


def test_shards_of_one_cell_sum_to_the_whole_within_the_rounding_of_a_cell():
    """A shard of one cell is multiplied by another routine."""
    pretrained_P, vectors_KP, _ = _problem(torch.float32)
    whole_KT = _products(pretrained_P, vectors_KP)[0]
    sum_KT = sum(_products(pretrained_P, vectors_KP, P // CELL))
    torch.testing.assert_close(sum_KT, whole_KT, rtol=1e-5, atol=1e-5)


def test_tensors_of_other_shards_get_an_exact_zero():
    pretrained_P, vectors_KP, _ = _problem()
    for rank, part_KT in enumerate(_products(pretrained_P, vectors_KP, shards=3)):
        own = {piece.tensor for piece in LAYOUT.shard(rank, 3).pieces()}
        others = [t for t in range(T) if t not in own]
        assert part_KT[:, others].count_nonzero() == 0
        assert part_KT[:, sorted(own)].count_nonzero() == K * len(own)


def test_cells_are_summed_beyond_float32():
    """2^24 in the first cell, 1 in each of the others: a float32 sum would stay at 2^24."""
    cells = 64
    per_cell_C1 = torch.ones(cells, 1)
    per_cell_C1[0] = 2.0**24
    one_layer = torch.zeros(cells, dtype=torch.int64)
    assert sum_cells(per_cell_C1, one_layer, 1).tolist() == [[2.0**24 + cells - 1]]


def test_inner_products_are_per_cell_and_sums_float64():
    _, vectors_KP, _ = _problem(torch.float32)
    per_cell_CK = inner_products(vectors_KP[0], _cells(vectors_KP))
    assert per_cell_CK.shape == (P // CELL, K)
    literal_CK = (_cells(vectors_KP) * vectors_KP[0].view(-1, 1, CELL)).sum(2)
    torch.testing.assert_close(per_cell_CK, literal_CK, rtol=1e-4, atol=1e-4)
    assert sum_cells(per_cell_CK, TENSORS.of_cells(WHOLE), T).dtype == torch.float64


# --- V in bfloat16 -----------------------------------------------------------------------------


@pytest.mark.parametrize("block_cells", [0, 1, 3, 5, 100])
def test_vectors_in_bfloat16_are_upcast_exactly_whatever_the_block(monkeypatch, block_cells):
    pretrained_P, vectors_KP, lambdas_KT = _problem(torch.float32)
    monkeypatch.setattr(merge, "_BLOCK_BYTES", block_cells * K * CELL * 4)
    stored_CKn = _cells(vectors_KP).bfloat16()
    lambdas_KC = lambdas_KT[:, TENSORS.of_cells(WHOLE)]
    merged, expected = torch.full((2, P), torch.nan)
    merge_into(merged, pretrained_P, stored_CKn, lambdas_KC)
    merge_into(expected, pretrained_P, stored_CKn.float(), lambdas_KC)
    assert torch.equal(merged, expected)
    product_CK = inner_products(pretrained_P, stored_CKn)
    assert product_CK.dtype == torch.float32
    whole_CK = inner_products(pretrained_P, stored_CKn.float())
    if block_cells > 1:
        assert torch.equal(product_CK, whole_CK)
    torch.testing.assert_close(product_CK, whole_CK, rtol=1e-5, atol=1e-5)
