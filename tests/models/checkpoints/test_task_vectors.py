"""Task vectors and TIES statistics, streamed from files, equal those of whole vectors in memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from raymerge.engine.messages import VectorStorage
from raymerge.engine.worker.vectors import PinnedTaskVectorStore
from raymerge.errors import CheckpointError
from raymerge.merging.layout import CELL, ParameterLayout, Piece
from raymerge.models.checkpoints import task_vectors
from raymerge.models.checkpoints.task_vectors import store, stream, ties_statistics
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint, open_visual

SHAPES = {"a": (50, 3), "b": (CELL,), "c": (7,), "d": (2 * CELL - 100,), "e": ()}
LAYOUT = ParameterLayout(tuple(SHAPES), tuple(SHAPES.values()))
P = LAYOUT.parameters
CPU = torch.device("cpu")
# Tensors of very different magnitude: a threshold over the whole is not one per tensor.
SCALES = torch.cat([torch.full((math.prod(s),), 2.0**-i) for i, s in enumerate(SHAPES.values())])


@pytest.fixture(scope="module", name="vectors_KP")
def _vectors() -> Tensor:
    """Return multiples of 2⁻¹⁰, so that θ₀ + T and T are exact and columns cancel to zero."""
    generator = torch.Generator().manual_seed(0)
    return (4 * torch.randn(3, P, generator=generator)).round() / 2**10 * SCALES


@pytest.fixture(scope="module", name="base_P")
def _base() -> Tensor:
    return torch.randint(-64, 64, (P,), generator=torch.Generator().manual_seed(1)) / 2**6


@pytest.fixture(scope="module")
def files(tmp_path_factory, vectors_KP, base_P) -> tuple[VisualCheckpoint, list[VisualCheckpoint]]:
    root = tmp_path_factory.mktemp("files")
    models = [base_P, *(base_P + vectors_KP)]
    opened = [_write(root / f"{i}.safetensors", flat_P) for i, flat_P in enumerate(models)]
    return opened[0], opened[1:]


def _write(path: Path, flat_P: Tensor) -> VisualCheckpoint:
    parts = zip(LAYOUT.names, flat_P.split(list(LAYOUT.sizes)), LAYOUT.shapes, strict=True)
    save_file({f"visual.{name}": part.reshape(shape).clone() for name, part, shape in parts}, path)
    return open_visual(str(path), LAYOUT)


def _unpadded(flat: Tensor) -> Tensor:
    """Return the P parameters of a flat vector; assert that the padding is zero."""
    spans = list(zip(LAYOUT.offsets, LAYOUT.sizes, strict=False))
    kept = torch.cat([flat[..., start : start + size] for start, size in spans], -1)
    assert flat.count_nonzero() == kept.count_nonzero()
    return kept


def _read_shards(files, shards: int = 1, basis=None, dtype="float32") -> tuple[Tensor, Tensor]:
    """Return θ₀ (P,) and V (K, P), assembled from all shards."""
    pretrained, experts = files
    storage, layers = VectorStorage(dtype), LAYOUT.layers("tensor")
    no_lambdas_KL = torch.zeros(len(experts), len(layers.names))
    base, vectors = [], []
    for rank in range(shards):
        shard = LAYOUT.shard(rank, shards)
        pinned = PinnedTaskVectorStore(storage, pretrained, experts, basis, shard, layers, CPU)
        base.append(torch.zeros(shard.columns))
        pinned.merge(no_lambdas_KL, base[-1])
        vectors.append(pinned.vectors_CKn.transpose(0, 1).flatten(1))
    return _unpadded(torch.cat(base)), _unpadded(torch.cat(vectors, 1))


def _set_block(monkeypatch, cells: int) -> None:
    monkeypatch.setattr(task_vectors, "_BLOCK_BYTES", 4 * 4 * cells * CELL)
    monkeypatch.setattr(task_vectors, "_MIN_COLUMNS", CELL)


def _positions(piece: Piece) -> slice:
    """Return the piece's columns among the P parameters."""
    start = sum(LAYOUT.sizes[: piece.tensor]) + piece.start - LAYOUT.offsets[piece.tensor]
    return slice(start, start + piece.stop - piece.start)


@pytest.mark.parametrize("block_cells", [1, 2, 1000])
def test_the_stream_yields_the_task_vectors_in_order(
    monkeypatch, files, vectors_KP, base_P, block_cells
):
    _set_block(monkeypatch, block_cells)
    pieces = LAYOUT.shard(0, 1).pieces()
    streamed = stream(lambda *arguments: arguments, *files, pieces)
    seen = []
    for piece, base_n, vectors_Kn in streamed:
        seen.append(piece)
        assert piece.stop - piece.start <= block_cells * CELL
        assert torch.equal(base_n, base_P[_positions(piece)])
        assert torch.equal(vectors_Kn, vectors_KP[:, _positions(piece)])
    assert [_positions(piece).start for piece in seen] == sorted(
        {_positions(piece).start for piece in seen}
    )
    assert sum(piece.stop - piece.start for piece in seen) == P
    assert all((piece.start - LAYOUT.offsets[piece.tensor]) % CELL == 0 for piece in seen)


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 20])
def test_shards_hold_their_columns_and_together_all(files, vectors_KP, base_P, shards):
    read_P, read_KP = _read_shards(files, shards)
    assert torch.equal(read_P, base_P)
    assert torch.equal(read_KP, vectors_KP)


def test_vectors_are_stored_in_the_dtype_of_their_memory(files, vectors_KP, base_P):
    read_P, read_KP = _read_shards(files, 2, dtype="bfloat16")
    assert torch.equal(read_P, base_P)
    assert torch.equal(read_KP, vectors_KP.bfloat16())


@pytest.mark.parametrize("count", [1, CELL - 1, CELL, CELL + 1, 3 * CELL, 3 * CELL + 7])
def test_store_lays_columns_cell_by_cell_and_leaves_the_rest(count):
    values_Kn = torch.randn(3, count, generator=torch.Generator().manual_seed(0))
    out_CKn = torch.full((5, 3, CELL), -1.0)
    store(out_CKn, values_Kn)
    flat_KN = out_CKn.transpose(0, 1).flatten(1)
    assert torch.equal(flat_KN[:, :count], values_Kn)
    assert (flat_KN[:, count:] == -1).all()


def test_reading_leaves_the_files_as_they_were(files, base_P):
    for read in _read_shards(files):
        read.zero_()
    assert torch.equal(_read_shards(files)[0], base_P)


@pytest.mark.parametrize("broken", [0, 1])
def test_nan_in_one_model_is_refused_when_its_columns_are_read(tmp_path, files, base_P, broken):
    broken_P = base_P.clone()
    broken_P[sum(LAYOUT.sizes[:3]) + 5] = torch.nan
    bad = _write(tmp_path / "broken.safetensors", broken_P)
    models = [files[0], *files[1]]
    models[broken] = bad
    with pytest.raises(CheckpointError, match=r"broken\.safetensors: visual\.d holds 1 NaN"):
        _read_shards((models[0], models[1:]))


# --- TIES, against whole vectors ---------------------------------------------------------------


def _whole_ties(vectors_KP: Tensor, density: float, zeros: int = 0) -> Tensor:
    """Return TIES as in the official code: cat, kthvalue, one mask, sign of sums, resolve zeros."""
    padded = torch.cat([vectors_KP, torch.zeros(len(vectors_KP), zeros)], 1)
    d = padded.shape[1]
    kth = padded.abs().kthvalue(d - int(d * density), dim=1, keepdim=True).values
    trimmed = padded * (padded.abs() >= kth)
    signs = torch.sign(trimmed.sum(0))
    signs[signs == 0] = torch.sign(signs.sum())
    return torch.where((signs > 0) == (trimmed > 0), trimmed, 0)[:, : vectors_KP.shape[1]]


def _streamed(
    files, density: float, scope: str, zeros: int = 0, shards: int = 1, mean: bool = False
):
    statistics = ties_statistics(*files, density=density, scope=scope, extra_zeros=zeros, mean=mean)
    return statistics, _read_shards(files, shards, statistics)[1]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.7])
def test_streamed_ties_is_ties_of_the_whole_vector(files, vectors_KP, density, shards):
    _, phi_KP = _streamed(files, density, "visual", shards=shards)
    assert torch.equal(phi_KP, _whole_ties(vectors_KP, density))


@pytest.mark.parametrize("zeros", [1, 10_000, 2 * P])
def test_scope_full_trims_over_the_leftover_zeros_as_well(files, vectors_KP, zeros):
    statistics, phi_KP = _streamed(files, 0.2, "full", zeros)
    assert torch.equal(phi_KP, _whole_ties(vectors_KP, 0.2, zeros))
    assert len({*statistics.thresholds[0]}) == 1


@pytest.mark.parametrize("sampled_cells", [1, 2, 512])
@pytest.mark.parametrize("block_cells", [1, 1000])
def test_neither_the_sample_nor_the_blocks_change_ties(
    monkeypatch, files, vectors_KP, sampled_cells, block_cells
):
    monkeypatch.setattr(task_vectors, "_SORTED_AT_ONCE", 0)
    monkeypatch.setattr(task_vectors, "_SAMPLED_CELLS", sampled_cells)
    _set_block(monkeypatch, block_cells)
    for zeros in (0, 10_000):
        _, phi_KP = _streamed(files, 0.2, "full", zeros)
        assert torch.equal(phi_KP, _whole_ties(vectors_KP, 0.2, zeros))


def test_scope_full_keeps_a_larger_part_of_the_visual_vector(files, vectors_KP):
    """With the official leftovers, 20 % is 25.8 % of the B/16 visual vector."""
    zeros = P
    (full, _), (visual, _) = _streamed(files, 0.2, "full", zeros), _streamed(files, 0.2, "visual")
    for k, row in enumerate(vectors_KP):
        assert full.thresholds[k][0] < visual.thresholds[k][0]
        kept = (row.abs() > full.thresholds[k][0]).sum()
        assert kept <= math.floor(0.2 * (P + zeros)) <= (row.abs() >= full.thresholds[k][0]).sum()


def test_scope_visual_does_not_count_the_leftovers(files):
    with_zeros, _ = _streamed(files, 0.2, "visual", zeros=10_000)
    without, _ = _streamed(files, 0.2, "visual", zeros=0)
    assert with_zeros == without


def test_scope_tensor_trims_each_tensor_by_itself(files, vectors_KP):
    statistics, _ = _streamed(files, 0.2, "tensor")
    for k, row in enumerate(vectors_KP):
        for t, part in enumerate(row.split(list(LAYOUT.sizes))):
            n = len(part)
            expected = part.abs().kthvalue(n - math.floor(0.2 * n)).values
            assert statistics.thresholds[k][t] == float(expected)
    assert len({*statistics.thresholds[0]}) > 2


@pytest.mark.parametrize("shards", [1, 3])
def test_scope_tensor_is_ties_with_one_vector_per_tensor(files, vectors_KP, shards):
    """Only zero-sum columns depend on other tensors: they follow the majority of the whole."""
    statistics, phi_KP = _streamed(files, 0.2, "tensor", shards=shards)
    parts = zip(*(x.split(list(LAYOUT.sizes), 1) for x in (vectors_KP, phi_KP)), strict=True)
    for t, (part, phi) in enumerate(parts):
        thresholds_K1 = torch.tensor([[row[t]] for row in statistics.thresholds])
        trimmed = part * (part.abs() >= thresholds_K1)
        total = trimmed.sum(0)
        sign = torch.where(total == 0, torch.tensor(statistics.majority), total.sign())
        assert torch.equal(phi, trimmed * (trimmed.sign() == sign))


def test_density_one_only_elects(files, vectors_KP):
    statistics, phi_KP = _streamed(files, 1.0, "visual")
    assert {threshold for row in statistics.thresholds for threshold in row} == {0.0}
    assert (phi_KP != 0).any(0).sum() == ((vectors_KP != 0).any(0)).sum()


@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_the_majority_is_the_sign_of_the_sum_of_the_elected_signs(tmp_path, files, base_P, flip):
    """Three columns up, one down; the cancelling one follows the majority, not the magnitudes."""
    one_P, two_P = torch.zeros(P), torch.zeros(P)
    one_P[:5] = flip * torch.tensor([1.0, 1.0, 1.0, -1.0, 2.0])
    two_P[:5] = flip * torch.tensor([1.0, 1.0, 1.0, -9.0, -2.0])
    experts = [
        _write(tmp_path / f"{i}.safetensors", base_P + v_P) for i, v_P in enumerate((one_P, two_P))
    ]
    statistics, phi_KP = _streamed((files[0], experts), 0.5, "visual")
    assert statistics.majority == flip
    assert phi_KP[:, 4].tolist() == [flip * 2.0, 0.0]


def test_task_order_does_not_matter(files, vectors_KP):
    """The rows of Φ permute with the tasks."""
    pretrained, experts = files
    _, phi_KP = _streamed(files, 0.2, "visual")
    order = [2, 0, 1]
    _, permuted_KP = _streamed((pretrained, [experts[k] for k in order]), 0.2, "visual")
    assert torch.equal(permuted_KP, phi_KP[order])


def test_mean_divides_each_column_by_its_entries(files):
    _, sums_KP = _streamed(files, 0.2, "visual")
    _, means_KP = _streamed(files, 0.2, "visual", mean=True)
    count_P = (sums_KP != 0).sum(0)
    assert count_P.max() > 1
    expected_P = torch.where(count_P > 0, sums_KP.sum(0) / count_P.clamp(min=1), 0)
    torch.testing.assert_close(means_KP.sum(0), expected_P, rtol=1e-6, atol=0)
