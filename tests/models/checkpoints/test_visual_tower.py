"""Matching a checkpoint to the visual tower: prefixes, names, shapes, dtypes, NaN."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from raymerge.errors import CheckpointError
from raymerge.merging.layout import CELL, ParameterLayout, Piece
from raymerge.models.checkpoints.visual_tower import (
    VisualCheckpoint,
    all_finite,
    open_visual,
)

SHAPES = {
    "conv1.weight": (4, 3, 2, 2),
    "big": (CELL + 100, 2),
    "ln_post.bias": (5,),
    "proj": (4, 6),
}
LAYOUT = ParameterLayout(tuple(SHAPES), tuple(SHAPES.values()))


def _state(prefix: str = "visual.", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        prefix + name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in SHAPES.items()
    }


def _open(tmp_path: Path, state: dict[str, Tensor]) -> VisualCheckpoint:
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)
    save_file(state, path)
    return open_visual(str(path), LAYOUT)


def _flat(state: dict[str, Tensor]) -> Tensor:
    flat_P = torch.zeros(LAYOUT.columns)
    for view, tensor in zip(LAYOUT.views(flat_P).values(), state.values(), strict=True):
        view.copy_(tensor)
    return flat_P


def _read(opened: VisualCheckpoint, tensor: int, dtype: torch.dtype = torch.float32) -> Tensor:
    start, size = LAYOUT.offsets[tensor], LAYOUT.sizes[tensor]
    out_n = torch.full((size,), torch.nan, dtype=dtype)
    opened.read(Piece(tensor, start, start + size), out_n)
    return out_n


def _read_all(opened: VisualCheckpoint, shards: int = 1) -> Tensor:
    read_P = torch.zeros(LAYOUT.columns)
    for rank in range(shards):
        for piece in LAYOUT.shard(rank, shards).pieces():
            opened.read(piece, read_P[piece.start : piece.stop])
    return read_P


@pytest.mark.parametrize(
    "prefix",
    [
        "visual.",
        "module.visual.",
        "model.visual.",
        "",
        "_orig_mod.visual.",
        "module._orig_mod.visual.",
        "net.",
        "model.clip.visual.",
        "a.very.deep.nest.of.wrappers.",
    ],
)
def test_a_tower_is_found_under_any_prefix(tmp_path, prefix):
    state = _state(prefix)
    opened = _open(tmp_path, state)
    assert opened.prefix == prefix
    assert torch.equal(_read_all(opened), _flat(state))


@pytest.mark.parametrize("prefix", ["visual.", "module.visual.", "model.visual."])
def test_tensors_outside_the_visual_tower_are_ignored(tmp_path, prefix):
    beside = prefix.removesuffix("visual.")
    text = {f"{beside}text_projection": torch.ones(2, 2), f"{beside}logit_scale": torch.ones(())}
    assert _open(tmp_path, {**_state(prefix), **text}).prefix == prefix


def test_integer_buffers_in_the_tower_are_not_unexpected(tmp_path):
    state = {**_state(), "visual.bn.num_batches_tracked": torch.tensor(3)}
    assert torch.equal(_read(_open(tmp_path, state), 3), state["visual.proj"].flatten())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_read_as_float32(tmp_path, dtype):
    state = _state(dtype=dtype)
    read = _read(_open(tmp_path, state), 0)
    assert torch.equal(read, state["visual.conv1.weight"].flatten().float())


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_columns_of_the_shards_are_the_flat_vector(tmp_path, shards, dtype):
    state = _state(dtype=dtype)
    assert torch.equal(_read_all(_open(tmp_path, state), shards), _flat(state))


def _message(tmp_path: Path, state: dict[str, Tensor]) -> str:
    with pytest.raises(CheckpointError) as raised:
        _open(tmp_path, state)
    message = str(raised.value)
    assert "x.safetensors" in message
    assert "\n" not in message
    return message


def test_missing_tensors_are_named_sorted_with_their_number(tmp_path):
    state = _state()
    del state["visual.proj"], state["visual.big"]
    assert "2 missing (visual.big, visual.proj)" in _message(tmp_path, state)


def test_unexpected_tensors_are_named_sorted_with_their_number(tmp_path):
    state = {**_state(), "visual.z": torch.zeros(1), "visual.lora_A": torch.zeros(1)}
    message = _message(tmp_path, state)
    assert "2 unexpected (visual.lora_A, visual.z)" in message
    assert "missing" not in message


def test_missing_and_unexpected_tensors_are_listed_together(tmp_path):
    state = _state()
    state["visual.projection"] = state.pop("visual.proj")
    message = _message(tmp_path, state)
    assert "1 missing (visual.proj)" in message
    assert "1 unexpected (visual.projection)" in message


def test_a_long_list_is_cut_and_counted(tmp_path):
    extra = {f"visual.x{i}": torch.zeros(1) for i in range(9)}
    assert "(visual.x0, visual.x1, visual.x2, visual.x3 and 5 more)" in _message(
        tmp_path, {**_state(), **extra}
    )


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path):
    state = {**_state(), "visual.proj": torch.zeros(4, 8)}
    message = _message(tmp_path, state)
    assert "visual.proj has shape [4, 8], the pretrained model has [4, 6]" in message


def test_a_transposed_tensor_of_the_same_size_is_misshapen(tmp_path):
    state = {**_state(), "visual.proj": torch.zeros(6, 4)}
    assert "visual.proj has shape [6, 4]" in _message(tmp_path, state)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint16, torch.bool, torch.complex64])
def test_an_integer_tensor_is_named_with_its_dtype(tmp_path, dtype):
    state = {**_state(), "visual.proj": torch.zeros(4, 6, dtype=dtype)}
    assert f"visual.proj is {dtype}, which cannot be merged; save it as float32" in _message(
        tmp_path, state
    )


def test_a_checkpoint_of_another_model_lists_its_keys(tmp_path):
    state = {"bert.embeddings": torch.zeros(1), "bert.pooler": torch.zeros(1)}
    message = _message(tmp_path, state)
    assert "none of the model's 4 visual tensors" in message
    assert "bert.embeddings" in message


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("count", [1, 3])
def test_nan_and_inf_are_refused_with_the_tensors_name_and_number(tmp_path, value, count):
    state = _state()
    state["visual.big"].view(-1)[CELL : CELL + count] = value
    opened = _open(tmp_path, state)  # headers are valid; values are checked when read
    pattern = rf"visual\.big holds {count} NaN or Inf value"
    with pytest.raises(CheckpointError, match=pattern):
        _read(opened, 1)
    out_n = torch.empty(LAYOUT.sizes[1])
    piece = Piece(1, LAYOUT.offsets[1], LAYOUT.offsets[1] + len(out_n))
    opened.fill(piece, out_n)  # does not check values
    with pytest.raises(CheckpointError, match=pattern):
        opened.require_finite(piece, out_n)
    before = Piece(1, LAYOUT.offsets[1], LAYOUT.offsets[1] + CELL)
    opened.read(before, out_n[:CELL])  # other columns of the same tensor are valid


def test_inf_and_minus_inf_do_not_hide_each_other(tmp_path):
    state = _state()
    state["visual.proj"][0, 0], state["visual.proj"][0, 1] = torch.inf, -torch.inf
    with pytest.raises(CheckpointError, match="holds 2 NaN or Inf values"):
        _read(_open(tmp_path, state), 3)


def test_large_finite_values_are_not_refused(tmp_path):
    """Only their sum overflows."""
    state = _state()
    state["visual.proj"].fill_(3e38)
    assert torch.equal(_read(_open(tmp_path, state), 3), torch.full((24,), 3e38))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_finite_equals_its_definition(dtype):
    largest = torch.finfo(dtype).max
    for values in ([], [0.0], [largest] * 3, [-largest, -largest], [largest, -largest]):
        assert all_finite(torch.tensor(values, dtype=dtype))
    for values in ([torch.nan], [1.0, torch.inf], [-torch.inf, torch.inf], [largest, torch.nan]):
        assert not all_finite(torch.tensor(values, dtype=dtype))
