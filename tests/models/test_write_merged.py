"""The written model is θ₀ + Σ λ V, and open_clip loads its folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from world import RESNET, write_model

from raymerge.config import ModelConfig
from raymerge.errors import CheckpointError, UserError
from raymerge.merging.basis import ConstantRow, MatrixBasis
from raymerge.merging.dare import Dare
from raymerge.merging.layout import CELL
from raymerge.merging.spectral import iso_c, iso_cts, tsv
from raymerge.models.checkpoints import task_vectors
from raymerge.models.checkpoints.task_vectors import ties_statistics
from raymerge.models.checkpoints.visual_tower import open_visual
from raymerge.models.pretrained import open_pretrained
from raymerge.models.resolve import ResolvedModel, resolve_model
from raymerge.models.write_merged import write_merged
from raymerge.runs.folder import RunFolder


@pytest.fixture(scope="module")
def resolved(world) -> ResolvedModel:
    return resolve_model(ModelConfig(arch=f"local-dir:{world.root / 'pretrained'}"))


@pytest.fixture(scope="module")
def opened(world, resolved):
    pretrained, _ = open_pretrained(resolved)
    paths = [task["checkpoint"] for task in world.config["tasks"]]
    return pretrained, [open_visual(path, pretrained.layout) for path in paths]


def _flat(checkpoint) -> Tensor:
    """Return θ of a checkpoint, with the padding of its layout."""
    flat_P = torch.zeros(checkpoint.layout.columns)
    for piece in checkpoint.layout.shard(0, 1).pieces():
        checkpoint.read(piece, flat_P[piece.start : piece.stop])
    return flat_P


def _write(path: Path, opened, lambdas_KL: Tensor, granularity: str = "tensor", basis=None) -> Path:
    pretrained, experts = opened
    layers = pretrained.layout.layers(granularity)
    lambdas_KL = lambdas_KL.expand(len(experts), len(layers.names)).double()
    write_merged(path, pretrained, experts, lambdas_KL, layers, basis)
    return path


@pytest.fixture
def merged(tmp_path):
    """Return the merged θ of the written file; assert that nothing else has changed."""

    def merged(opened, lambdas_KL: Tensor, granularity: str = "tensor", basis=None) -> Tensor:
        path = _write(tmp_path / "merged.safetensors", opened, lambdas_KL, granularity, basis)
        return _flat(open_visual(str(path), opened[0].layout))

    return merged


# --- the corners of λ, on files ---------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
def test_lambda_zero_is_the_pretrained_model_bit_for_bit(merged, opened, granularity):
    assert torch.equal(merged(opened, torch.zeros(4, 1), granularity), _flat(opened[0]))


@pytest.mark.parametrize("k", range(4))
def test_lambda_unit_vector_is_that_expert(merged, opened, k):
    merged_P = merged(opened, torch.eye(4)[:, k : k + 1])
    torch.testing.assert_close(merged_P, _flat(opened[1][k]), rtol=0, atol=5e-7)


def test_lambda_one_over_k_is_the_average(merged, opened):
    mean_P = torch.stack([_flat(expert).double() for expert in opened[1]]).mean(0)
    merged_P = merged(opened, torch.full((4, 1), 0.25))
    torch.testing.assert_close(merged_P.double(), mean_P, rtol=0, atol=1e-6)


def test_one_task_with_lambda_one_is_its_expert(merged, opened):
    merged_P = merged((opened[0], opened[1][2:3]), torch.ones(1, 1))
    torch.testing.assert_close(merged_P, _flat(opened[1][2]), rtol=0, atol=5e-7)


def test_every_layer_takes_its_own_coefficients(merged, opened):
    pretrained, experts = opened
    layers = pretrained.layout.layers("tensor")
    lambdas_KL = torch.rand(4, len(layers.names), generator=torch.Generator().manual_seed(0))
    views = pretrained.layout.views(merged(opened, lambdas_KL).double())
    base = pretrained.layout.views(_flat(pretrained).double())
    finetuned = [pretrained.layout.views(_flat(expert).double()) for expert in experts]
    for t, name in enumerate(layers.names):
        terms = zip(lambdas_KL[:, t].double(), finetuned, strict=True)
        expected = base[name] + sum(x * (expert[name] - base[name]) for x, expert in terms)
        torch.testing.assert_close(views[name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mean", [False, True])
def test_ties_is_the_sum_of_phi(merged, opened, mean):
    pretrained, experts = opened
    statistics = ties_statistics(pretrained, experts, density=0.2, scope="visual", mean=mean)
    merged_P = merged(opened, torch.full((4, 1), 0.3), basis=statistics)
    vectors_KP = torch.stack([_flat(expert) for expert in experts]) - _flat(pretrained)
    phi_KP = statistics.phi(vectors_KP, 0)
    expected_P = _flat(pretrained) + 0.3 * phi_KP.sum(0)
    torch.testing.assert_close(merged_P, expected_P, rtol=0, atol=1e-6)
    changed = (merged_P != _flat(pretrained)).sum() / pretrained.layout.parameters
    assert 0.2 < changed < 0.8  # between one task's entries and all four disjoint


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("sign", [-1, 1])
def test_counting_the_signs_while_merging_changes_no_byte(resolved, opened, tmp_path, sign, mean):
    """Two experts that differ from θ₀ by opposite amounts in half of the columns, which then wait
    for the majority, and alike elsewhere, which decides it."""
    pretrained, _ = opened
    generator = torch.Generator().manual_seed(0)
    states = [dict(load_file(resolved.weights)) for _ in range(2)]
    for key in [f"visual.{name}" for name in pretrained.layout.names]:
        base = (states[0][key] * 1024).round() / 1024
        delta = sign * torch.randint(1, 9, base.shape, generator=generator) / 1024
        opposed = torch.rand(base.shape, generator=generator) < 0.5
        states[0][key], states[1][key] = base + delta, base + torch.where(opposed, -delta, delta)
    base = {k: (v * 1024).round() / 1024 for k, v in load_file(resolved.weights).items()}
    for name, state in zip(("base", "one", "two"), (base, *states), strict=True):
        save_file(state, tmp_path / name)
    pretrained, _ = open_pretrained(replace(resolved, weights=tmp_path / "base"))
    experts = [open_visual(str(tmp_path / name), pretrained.layout) for name in ("one", "two")]
    files, options = (pretrained, experts), {"density": 1.0, "scope": "visual", "mean": mean}
    counted = ties_statistics(*files, **options)
    later = ties_statistics(*files, **options, count_signs=False)
    assert counted.majority == sign
    assert later.majority is None
    half = torch.full((2, 1), 0.5)
    one = _write(tmp_path / "a", files, half, basis=counted)
    two = _write(tmp_path / "b", files, half, basis=later)
    assert two.read_bytes() == one.read_bytes()
    undecided = _write(tmp_path / "c", files, half, basis=replace(counted, majority=0.0))
    assert undecided.read_bytes() != one.read_bytes()


# --- other bases -------------------------------------------------------------------------------


def _write_rows(path: Path, opened, rows: int, scaling: float, basis) -> Tensor:
    """Return θ of the merge with one constant λ for all ``rows`` of the basis."""
    pretrained, experts = opened
    layers = pretrained.layout.layers("task")
    lambdas_JL = torch.full((rows, 1), scaling, dtype=torch.float64)
    write_merged(path, pretrained, experts, lambdas_JL, layers, basis)
    return _flat(open_visual(str(path), pretrained.layout))


@pytest.mark.parametrize(
    ("function", "separate"),
    [
        (tsv, True),
        (partial(iso_cts, common_fraction=0.5), True),
        (iso_c, False),
        (lambda matrices_KMN: matrices_KMN.amax(0), False),
    ],
)
def test_a_matrix_basis_is_the_function_of_whole_matrices_and_vectors_are_averaged(
    opened, tmp_path, function: Callable[[Tensor], Tensor], separate: bool
):
    """The merge adds λ times the sum of the rows; only tensors of two dimensions are matrices."""
    pretrained, experts = opened
    layout, scaling = pretrained.layout, 0.7
    basis = MatrixBasis(function, separate)
    merged_P = _write_rows(tmp_path / "w", opened, 4 if separate else 1, scaling, basis)
    merged, base = layout.views(merged_P), layout.views(_flat(pretrained))
    finetuned = [layout.views(_flat(expert)) for expert in experts]
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        vectors = torch.stack([expert[name] - base[name] for expert in finetuned])
        moved = vectors.mean(0)
        if len(shape) == 2:
            moved = function(vectors).sum(0) if separate else function(vectors)
        torch.testing.assert_close(merged[name], base[name] + scaling * moved, rtol=0, atol=1e-6)
    assert {len(shape) for shape in layout.shapes} == {1, 2, 4}


def test_small_blocks_do_not_cut_a_matrix(opened, tmp_path, monkeypatch):
    basis = MatrixBasis(tsv)
    whole_P = _write_rows(tmp_path / "a", opened, 4, 1.0, basis)
    monkeypatch.setattr(task_vectors, "_BLOCK_BYTES", 4 * 4 * CELL)
    monkeypatch.setattr(task_vectors, "_MIN_COLUMNS", CELL)
    assert torch.equal(_write_rows(tmp_path / "b", opened, 4, 1.0, basis), whole_P)


@pytest.mark.parametrize("elect_sign", [False, True])
def test_dare_writes_what_its_rows_sum_to_whatever_the_blocks(
    opened, tmp_path, monkeypatch, elect_sign
):
    pretrained, experts = opened
    dare = Dare(("a", "b", "c", "d"), seed=7, density=0.3, elect_sign=elect_sign)
    whole_P = _write_rows(tmp_path / "a", opened, 4, 0.3, dare)
    vectors_KP = torch.stack([_flat(expert) for expert in experts]) - _flat(pretrained)
    expected_P = _flat(pretrained) + 0.3 * dare.phi(vectors_KP, 0).sum(0)
    torch.testing.assert_close(whole_P, expected_P, rtol=0, atol=1e-6)
    monkeypatch.setattr(task_vectors, "_BLOCK_BYTES", 4 * 4 * CELL)
    monkeypatch.setattr(task_vectors, "_MIN_COLUMNS", CELL)
    assert torch.equal(_write_rows(tmp_path / "b", opened, 4, 0.3, dare), whole_P)


@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_a_fixed_vector_is_added_without_reading_an_expert(opened, tmp_path, scaling):
    pretrained, _ = opened
    delta_P = torch.zeros(pretrained.layout.columns)
    for view in pretrained.layout.views(delta_P).values():
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(0)))
    merged_P = _write_rows(tmp_path / "w", (pretrained, []), 1, scaling, ConstantRow(delta_P))
    expected_P = _flat(pretrained) + scaling * delta_P
    torch.testing.assert_close(merged_P, expected_P, rtol=0, atol=1e-6)


# --- the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block_cells", [1, 3])
def test_the_blocks_do_not_change_a_byte(opened, tmp_path, monkeypatch, block_cells):
    lambdas_KL = torch.full((4, 1), 0.3)
    whole = _write(tmp_path / "whole", opened, lambdas_KL)
    monkeypatch.setattr(task_vectors, "_BLOCK_BYTES", 4 * 4 * block_cells * CELL)
    monkeypatch.setattr(task_vectors, "_MIN_COLUMNS", CELL)
    assert _write(tmp_path / "parts", opened, lambdas_KL).read_bytes() == whole.read_bytes()


def _with(folder: Path, source: Path, key: str, value: float) -> Path:
    state = load_file(source)
    state[key].view(-1)[3] = value
    save_file(state, folder / "bad.safetensors")
    return folder / "bad.safetensors"


@pytest.mark.parametrize("k", [0, 3])
def test_a_nan_in_an_expert_is_refused_by_name(world, opened, tmp_path, k):
    pretrained, experts = opened
    path = _with(tmp_path, Path(world.config["tasks"][k]["checkpoint"]), "visual.proj", torch.nan)
    experts = [*experts[:k], open_visual(str(path), pretrained.layout), *experts[k + 1 :]]
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: visual\.proj holds 1 NaN"):
        _write(tmp_path / "out", (pretrained, experts), torch.zeros(4, 1))


def test_a_nan_in_the_text_tower_is_refused_by_name(resolved, opened, tmp_path):
    path = _with(tmp_path, resolved.weights, "text_projection", torch.inf)
    pretrained, _ = open_pretrained(replace(resolved, weights=path))
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: text_projection holds 1 NaN"):
        _write(tmp_path / "out", (pretrained, opened[1]), torch.zeros(4, 1))


def test_weights_that_overflow_are_refused(opened, tmp_path):
    with pytest.raises(UserError, match="overflow: the coefficients are too large"):
        _write(tmp_path / "out", opened, torch.full((4, 1), 1e39, dtype=torch.float64))


# --- the folder --------------------------------------------------------------------------------


def _write_folder(path: Path, resolved: ResolvedModel, opened) -> Path:
    folder = RunFolder(path)
    path.mkdir()
    _write(folder.weights, opened, torch.full((4, 1), 0.3))
    folder.write_model_config(resolved)
    return path


def test_open_clip_loads_the_folder_with_the_merged_tower_and_the_old_text(
    opened, resolved, world, tmp_path
):
    out = _write_folder(tmp_path / "out", resolved, opened)
    loaded, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    visual = loaded.visual.state_dict()
    experts = [load_file(task["checkpoint"]) for task in world.config["tasks"]]
    before, _, transform_before = open_clip.create_model_and_transforms(resolved.name)
    for name, base in before.visual.state_dict().items():
        moved = sum(0.3 * (expert[f"visual.{name}"] - base) for expert in experts)
        torch.testing.assert_close(visual[name], base + moved, rtol=0, atol=1e-6)

    text = {k: v for k, v in before.state_dict().items() if not k.startswith("visual.")}
    assert text
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in text.items())
    with Image.open(next((world.root / "data").rglob("*.png"))) as image:
        assert torch.equal(transform(image), transform_before(image))
    written = load_file(out / "open_clip_model.safetensors")
    assert written.keys() == before.state_dict().keys()


def test_integer_buffers_are_written_as_they_are_so_that_open_clip_loads_strictly(tmp_path):
    """A ResNet has integer buffers: it counts its batches."""
    model = write_model(tmp_path / "m", RESNET)
    state = {k: v.clone().contiguous() for k, v in model.state_dict().items()}
    state["visual.bn1.num_batches_tracked"] += 41
    save_file(state, tmp_path / "m" / "open_clip_model.safetensors")
    resolved = resolve_model(ModelConfig(arch=f"local-dir:{tmp_path / 'm'}"))
    pretrained, _ = open_pretrained(resolved)
    out = _write_folder(tmp_path / "out", resolved, (pretrained, [pretrained] * 4))
    loaded = open_clip.create_model(f"local-dir:{out}")
    loaded.load_state_dict(load_file(out / "open_clip_model.safetensors"), strict=True)
    assert loaded.visual.bn1.num_batches_tracked == 41
    assert torch.equal(loaded.visual.conv1.weight, model.visual.conv1.weight)


def test_writing_twice_gives_the_same_bytes(opened, resolved, tmp_path):
    one, two = (_write_folder(tmp_path / name, resolved, opened) for name in ("a", "b"))
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_a_pretrained_file_with_a_module_prefix_is_written_without_it(resolved, tmp_path):
    state = load_file(resolved.weights)
    save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "w.safetensors")
    pretrained, _ = open_pretrained(replace(resolved, weights=tmp_path / "w.safetensors"))
    written = load_file(_write(tmp_path / "out", (pretrained, [pretrained]), torch.zeros(1, 1)))
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)


def test_the_text_tower_keeps_its_stored_dtype_and_the_merged_one_is_float32(resolved, tmp_path):
    state = {key: value.half() for key, value in load_file(resolved.weights).items()}
    save_file(state, tmp_path / "w.safetensors")
    pretrained, _ = open_pretrained(replace(resolved, weights=tmp_path / "w.safetensors"))
    written = load_file(_write(tmp_path / "out", (pretrained, [pretrained]), torch.ones(1, 1)))
    for key, value in state.items():
        assert written[key].dtype == (torch.float32 if key.startswith("visual.") else torch.float16)
        assert torch.equal(written[key], value.to(written[key].dtype))
