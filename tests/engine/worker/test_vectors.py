"""The task-vector stores: their memory and mapped files; pinned and streamed ones give the same.

Legend: K models, L layers, P columns of the flat vector, N of a shard, C cells.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from raymerge.engine.messages import VectorStorage
from raymerge.engine.worker.vectors import (
    PinnedTaskVectorStore,
    StreamedTaskVectorStore,
    TaskVectorStore,
    allocate,
    open_task_vector_store,
)
from raymerge.errors import CheckpointError, RunError
from raymerge.merging.basis import Basis, MatrixBasis
from raymerge.merging.dare import Dare
from raymerge.merging.layout import CELL, ParameterLayout
from raymerge.merging.spectral import iso_cts, tsv
from raymerge.merging.ties import TiesStatistics
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint, open_visual

CPU = torch.device("cpu")


@pytest.mark.parametrize("location", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_allocated_memory_is_zero_and_writable(tmp_path, dtype, location):
    vectors_CKn = allocate(VectorStorage(dtype, location, str(tmp_path)), 3, 2, CPU)
    assert vectors_CKn.shape == (3, 2, CELL)
    assert vectors_CKn.dtype == getattr(torch, dtype)
    assert vectors_CKn.is_contiguous()
    assert vectors_CKn.count_nonzero() == 0
    vectors_CKn[1, 1] = 2.5
    assert vectors_CKn.float().sum() == 2.5 * CELL


def _mappings(folder: str) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if folder in line]


def test_a_mapped_file_is_unlinked_and_freed(tmp_path):
    vectors_CKn = allocate(VectorStorage("float32", "disk", str(tmp_path)), 4, 2, CPU)
    assert list(tmp_path.iterdir()) == []
    (mapped,) = _mappings(str(tmp_path))
    assert mapped.endswith("(deleted)")
    del vectors_CKn
    assert _mappings(str(tmp_path)) == []


def test_two_workers_in_one_folder_do_not_share(tmp_path):
    storage = VectorStorage("float32", "disk", str(tmp_path))
    one, two = allocate(storage, 1, 1, CPU), allocate(storage, 1, 1, CPU)
    one.fill_(1.0)
    assert two.count_nonzero() == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_room_is_a_run_error_and_leaves_nothing(tmp_path, monkeypatch, dtype):
    sizes = []

    def full(handle: int, start: int, size: int) -> None:
        sizes.append(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"no room for 0\.\d GB of task vectors \(No space left"):
        allocate(VectorStorage(dtype, "disk", str(tmp_path)), 5000, 2, CPU)
    assert sizes == [5000 * 2 * CELL * (4 if dtype == "float32" else 2)]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match=r"vectors\.folder .*/gone: cannot be written: No such file"):
        allocate(VectorStorage("float32", "disk", str(tmp_path / "gone")), 1, 1, CPU)


def test_a_shard_without_cells_needs_no_memory(tmp_path):
    for location in ("device", "disk"):
        storage = VectorStorage("float32", location, str(tmp_path))
        assert allocate(storage, 0, 2, CPU).shape == (0, 2, CELL)


# --- pinned and streamed: the same θ and the same inner products -------------------------------

SHAPES = {"a": (60, 70), "b": (CELL + 5,), "c": (8, 40), "d": (3, 4, 5, 6), "e": (), "f": (CELL, 3)}
LAYOUT = ParameterLayout(tuple(SHAPES), tuple(SHAPES.values()))
LAYERS = LAYOUT.layers("tensor")
NAMES = ("sun", "cars", "dtd")
K = len(NAMES)
LAMBDAS = torch.rand(K, len(SHAPES), generator=torch.Generator().manual_seed(5)).double()
BASES: dict[str, Basis | None] = {
    "raw": None,
    "ties": TiesStatistics(((0.4,) * len(SHAPES),) * K, 1.0),
    "dare": Dare(NAMES, seed=3, density=0.5),
    "dare, elected": Dare(NAMES, seed=3, density=0.5, elect_sign=True),
    "tsv": MatrixBasis(tsv),
    "iso": MatrixBasis(partial(iso_cts, common_fraction=0.5)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[dict[str, Tensor]]:
    """The pretrained model, then K experts."""
    generator = torch.Generator().manual_seed(0)
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(1 + K)
    ]


def _save(path: Path, state: dict[str, Tensor]) -> VisualCheckpoint:
    save_file({f"visual.{name}": tensor for name, tensor in state.items()}, path)
    return open_visual(str(path), LAYOUT)


@pytest.fixture(scope="module")
def files(tmp_path_factory, models) -> list[VisualCheckpoint]:
    root = tmp_path_factory.mktemp("files")
    return [_save(root / f"{i}.safetensors", state) for i, state in enumerate(models)]


def _store(location: str, files, basis, rank: int = 0, shards: int = 1) -> TaskVectorStore:
    shard = LAYOUT.shard(rank, shards)
    storage = VectorStorage(location=location)
    return open_task_vector_store(storage, files[0], files[1:], basis, shard, LAYERS, CPU)


def _merged(location: str, files, basis, shards: int, lambdas_KL: Tensor = LAMBDAS) -> Tensor:
    """θ (P,), gathered; the padding is left as it was."""
    parts = []
    for rank in range(shards):
        parts.append(torch.zeros(LAYOUT.shard(rank, shards).columns))
        _store(location, files, basis, rank, shards).merge(lambdas_KL, parts[-1])
    return torch.cat(parts)[: LAYOUT.columns]


def _products(location: str, files, basis, shards: int, rows=None) -> Tensor:
    """⟨∂ℒ/∂θ, V_k⟩ of every cell of the whole vector, (C, K)."""
    gradient_P = _gradient(shards)
    parts = []
    for rank in range(shards):
        shard = LAYOUT.shard(rank, shards)
        gradient_N = gradient_P[shard.start : shard.start + shard.columns]
        parts.append(_store(location, files, basis, rank, shards).inner_products(gradient_N, rows))
    return torch.cat(parts)[: LAYOUT.columns // CELL]


def _gradient(shards: int = 1) -> Tensor:
    """A gradient as autograd leaves it: random in the tensors, zero in the padding."""
    gradient_P = torch.zeros(LAYOUT.shard(0, shards).padded_columns)
    generator = torch.Generator().manual_seed(9)
    for view in LAYOUT.views(gradient_P).values():
        view.copy_(torch.randn(view.shape, generator=generator))
    return gradient_P


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("basis", BASES.values(), ids=BASES)
def test_streamed_vectors_give_the_theta_and_products_of_pinned_ones(files, basis, shards):
    theta_P = _merged("files", files, basis, shards)
    torch.testing.assert_close(theta_P, _merged("device", files, basis, 1), rtol=0, atol=2e-6)
    products_CK = _products("files", files, basis, shards)
    expected_CK = _products("device", files, basis, 1)
    error_CK = (products_CK - expected_CK).abs()
    assert error_CK.max() <= 1e-5 * expected_CK.abs().max()


@pytest.mark.parametrize("location", ["device", "files"])
def test_raw_vectors_are_the_differences_to_the_pretrained_model(files, models, location):
    theta = LAYOUT.views(_merged(location, files, None, 2))
    gradient = LAYOUT.views(_gradient())
    products_CK = _products(location, files, None, 2).double()
    cells = LAYERS.of_cells(LAYOUT.shard(0, 1))
    for t, name in enumerate(SHAPES):
        base, *experts = (model[name].double() for model in models)
        expected = base + sum(LAMBDAS[k, t] * (expert - base) for k, expert in enumerate(experts))
        torch.testing.assert_close(theta[name].double(), expected, rtol=0, atol=2e-6)
        for k, expert in enumerate(experts):
            product = ((expert - base) * gradient[name]).sum().item()
            assert products_CK[cells == t, k].sum().item() == pytest.approx(product, abs=1e-3)


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("basis", BASES.values(), ids=BASES)
def test_shards_pin_the_same_columns_bit_for_bit(files, basis, shards):
    """A basis of whole matrices and one of random masks do not depend on the cut."""
    (whole,) = _pinned(files, basis, 1)
    assert torch.equal(torch.cat(_pinned(files, basis, shards))[: len(whole)], whole)


def _pinned(files, basis, shards: int) -> list[Tensor]:
    stores = [_store("device", files, basis, rank, shards) for rank in range(shards)]
    assert all(isinstance(store, PinnedTaskVectorStore) for store in stores)
    return [store.vectors_CKn for store in stores]  # type: ignore[attr-defined]


def test_a_matrix_basis_pins_the_function_of_whole_matrices_and_the_mean_of_the_rest(files, models):
    (vectors_CKn,) = _pinned(files, BASES["tsv"], 1)
    flat_KP = vectors_CKn.transpose(0, 1).flatten(1)
    views = [LAYOUT.views(flat_P) for flat_P in flat_KP]
    for name, shape in SHAPES.items():
        vectors = torch.stack([model[name] - models[0][name] for model in models[1:]])
        expected = tsv(vectors) if len(shape) == 2 else vectors / K
        for k in range(K):
            torch.testing.assert_close(views[k][name], expected[k], rtol=0, atol=1e-5)


def test_base_products_are_those_of_the_pretrained_model(files, models):
    for location in ("device", "files"):
        base_C1 = _store(location, files, None).base_products(_gradient())
        gradient = LAYOUT.views(_gradient())
        expected = sum((models[0][name] * gradient[name]).sum().item() for name in SHAPES)
        assert base_C1.shape == (LAYOUT.columns // CELL, 1)
        assert base_C1.double().sum().item() == pytest.approx(expected, abs=1e-3)


def test_streamed_vectors_hold_nothing(files):
    assert isinstance(_store("files", files, None), StreamedTaskVectorStore)
    assert _store("files", files, None).nbytes == 0
    pinned_bytes = _store("device", files, None).nbytes
    assert pinned_bytes == 4 * K * LAYOUT.columns


# --- a step reads only the files that it needs ----------------------------------------------------


@pytest.fixture
def poisoned(files, models, tmp_path) -> list[VisualCheckpoint]:
    """The files, with one expert that fails as soon as it is read."""
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in models[2].items()}
    return [*files[:2], _save(tmp_path / "poison.safetensors", state), files[3]]


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The file of every read, in order."""
    names: list[str] = []
    fill = VisualCheckpoint.fill

    def counted(self: VisualCheckpoint, piece, out_n: Tensor) -> None:
        names.append(Path(self.checkpoint.path).name)
        fill(self, piece, out_n)

    monkeypatch.setattr(VisualCheckpoint, "fill", counted)
    return names


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_without_a_coefficient_is_not_read(files, poisoned, read, shards):
    lambdas_KL = LAMBDAS.clone()
    lambdas_KL[1] = 0.0
    theta_P = _merged("files", poisoned, None, shards, lambdas_KL)
    assert set(read) == {"0.safetensors", "1.safetensors", "3.safetensors"}
    expected_P = _merged("device", files, None, shards, lambdas_KL)
    torch.testing.assert_close(theta_P, expected_P, rtol=0, atol=2e-6)
    lambdas_KL[1, -1] = 1e-9
    with pytest.raises(CheckpointError, match=r"poison\.safetensors: visual\.\w holds .* NaN"):
        _merged("files", poisoned, None, shards, lambdas_KL)


def test_without_any_coefficient_only_the_pretrained_model_is_read(poisoned, models, read):
    theta = LAYOUT.views(_merged("files", poisoned, None, 1, torch.zeros_like(LAMBDAS)))
    assert set(read) == {"0.safetensors"}
    assert all(torch.equal(theta[name], models[0][name]) for name in SHAPES)


@pytest.mark.parametrize("rows", [(0, 2), (2,), ()])
def test_only_the_requested_rows_are_read_and_the_others_are_zero(files, poisoned, read, rows):
    products_CK = _products("files", poisoned, None, 2, rows)
    assert set(read) == {"0.safetensors", *(f"{1 + k}.safetensors" for k in rows)}
    expected_CK = _products("files", files, None, 2)
    others = [k for k in range(K) if k not in rows]
    atol = 1e-5 * float(expected_CK.abs().max())
    products_Cr, expected_Cr = products_CK[:, list(rows)], expected_CK[:, list(rows)]
    torch.testing.assert_close(products_Cr, expected_Cr, rtol=0, atol=atol)
    assert not products_CK[:, others].any()


def test_a_basis_makes_its_rows_of_all_models(files, read):
    """Each row may depend on every model, so none can be left out."""
    lambdas_KL = torch.zeros_like(LAMBDAS)
    lambdas_KL[0] = 1.0
    _merged("files", files, BASES["tsv"], 1, lambdas_KL)
    assert {f"{k}.safetensors" for k in range(1 + K)} == set(read)


def test_one_step_reads_every_column_of_every_model_twice(files, read):
    """The merge and the products read; opening the store does not."""
    store = _store("files", files, None)
    assert read == []
    store.merge(LAMBDAS, torch.zeros(LAYOUT.columns))
    once = sorted(read)
    store.inner_products(_gradient())
    assert sorted(read) == sorted(2 * once)
