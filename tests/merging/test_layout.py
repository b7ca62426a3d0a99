"""The flat vector: tensors tile it, layers partition the tensors, shards partition the columns."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from raymerge.merging.layout import CELL, LayerMap, ParameterLayout, block_of

NAMES = (
    "class_embedding",
    "proj",
    "conv1.weight",
    "transformer.resblocks.0.attn.in_proj_weight",
    "transformer.resblocks.0.mlp.c_proj.weight",
    "transformer.resblocks.1.ln_1.weight",
    "ln_post.bias",
)
SHAPES = ((7,), (5, 3), (4, 3, 2, 2), (2 * CELL + 11,), (CELL, 3), (), (9,))


@pytest.fixture
def layout() -> ParameterLayout:
    return ParameterLayout(NAMES, SHAPES)


def test_every_tensor_starts_a_cell_and_only_the_rest_of_its_last_cell_is_padding(layout):
    assert layout.parameters == sum(layout.sizes) == sum(math.prod(shape) for shape in SHAPES)
    touched_P = torch.zeros(layout.columns)
    for view in layout.views(touched_P).values():
        view += 1
    assert touched_P.max() == 1
    assert touched_P.sum() == layout.parameters
    cells = zip(layout.offsets, layout.offsets[1:], layout.sizes, strict=False)
    for start, stop, size in cells:
        assert start % CELL == 0
        assert 0 <= stop - (start + size) < CELL
        assert torch.equal(touched_P[start : start + size], torch.ones(size))


def test_views_are_the_tensors_laid_at_their_offsets(layout):
    tensors = {name: torch.randn(shape) for name, shape in zip(NAMES, SHAPES, strict=True)}
    flat_P = torch.zeros(layout.columns)
    for start, tensor in zip(layout.offsets, tensors.values(), strict=False):
        flat_P[start : start + tensor.numel()] = tensor.flatten()
    views = layout.views(flat_P)
    assert list(views) == list(NAMES)
    assert all(torch.equal(views[name], tensors[name]) for name in NAMES)


def test_views_alias_the_vector_and_tolerate_a_longer_one(layout):
    flat_P = torch.zeros(layout.columns + 100)
    layout.views(flat_P)["proj"][1, 2] = 5.0
    assert flat_P[CELL + 1 * 3 + 2] == 5.0
    assert flat_P.count_nonzero() == 1


def test_integer_buffers_are_not_merged_and_order_is_kept():
    state = {
        "b": torch.zeros(2),
        "num_batches_tracked": torch.zeros((), dtype=torch.int64),
        "mask": torch.zeros(3, dtype=torch.bool),
        "a": torch.zeros(2, 2, dtype=torch.float16),
    }
    assert ParameterLayout.of(state) == ParameterLayout(("b", "a"), ((2,), (2, 2)))


@pytest.mark.parametrize(
    ("granularity", "layers"),
    [
        ("task", ("all",)),
        ("tensor", NAMES),
        ("block", ("stem", "transformer.resblocks.0", "transformer.resblocks.1", "head")),
    ],
)
def test_every_tensor_belongs_to_one_layer(layout, granularity, layers):
    mapped = layout.layers(granularity)
    assert mapped.names == layers
    assert len(mapped.layer_of_tensor) == len(NAMES)
    assert set(mapped.layer_of_tensor) == set(range(len(layers)))


def test_block_granularity_puts_each_tensor_in_its_block(layout):
    mapped = layout.layers("block")
    by_name = {n: mapped.names[i] for n, i in zip(NAMES, mapped.layer_of_tensor, strict=True)}
    assert by_name == {
        "class_embedding": "stem",
        "conv1.weight": "stem",
        "transformer.resblocks.0.attn.in_proj_weight": "transformer.resblocks.0",
        "transformer.resblocks.0.mlp.c_proj.weight": "transformer.resblocks.0",
        "transformer.resblocks.1.ln_1.weight": "transformer.resblocks.1",
        "ln_post.bias": "head",
        "proj": "head",
    }


def test_blocks_are_ordered_by_number_not_by_spelling():
    names = tuple(f"transformer.resblocks.{i}.w" for i in (10, 2, 0, 11, 1))
    mapped = ParameterLayout(("proj", *names, "conv1"), ((1,),) * 7).layers("block")
    numbers = [name.rsplit(".", 1)[-1] for name in mapped.names]
    assert numbers == ["stem", "0", "1", "2", "10", "11", "head"]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("class_embedding", "stem"),
        ("positional_embedding", "stem"),
        ("ln_pre.weight", "stem"),
        ("proj", "head"),
        ("ln_post.weight", "head"),
        ("attn_pool.query", "head"),
        ("layer1.0.downsample.1.running_mean", "layer1.0"),
        ("layer4.2.conv3.weight", "layer4.2"),
        ("bn1.weight", "stem"),
        ("attnpool.c_proj.weight", "head"),
        ("trunk.blocks.11.attn.proj.weight", "trunk.blocks.11"),
        ("trunk.patch_embed.proj.weight", "stem"),
        ("trunk.patch_embed.norm.weight", "stem"),
        ("trunk.cls_token", "stem"),
        ("trunk.norm.weight", "head"),
        ("trunk.fc_norm.weight", "head"),
        ("trunk.attn_pool.q.weight", "head"),
        ("trunk.stages.2.blocks.26.gamma", "trunk.stages.2.blocks.26"),
        ("trunk.stem.0.weight", "stem"),
        ("trunk.head.norm.weight", "head"),
        ("head.proj.weight", "head"),
    ],
)
def test_block_of_visual_towers(name, block):
    assert block_of(name) == block


def test_expand_gives_every_tensor_the_coefficient_of_its_layer():
    mapped = LayerMap(("x", "y"), (1, 0, 1))
    assert mapped.expand(torch.tensor([[10.0, 20.0]])).tolist() == [[20.0, 10.0, 20.0]]


@pytest.mark.parametrize("shards", [1, 2, 3, 20])
@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
def test_every_cell_has_the_layer_of_its_tensor(layout, granularity, shards):
    mapped = layout.layers(granularity)
    for rank in range(shards):
        shard = layout.shard(rank, shards)
        layer_of_cell = mapped.of_cells(shard).tolist()
        assert len(layer_of_cell) == shard.cells
        for piece in shard.pieces():
            first = (piece.start - shard.start) // CELL
            last = (piece.stop - 1 - shard.start) // CELL
            layers = {*layer_of_cell[first : last + 1]}
            assert layers == {mapped.layer_of_tensor[piece.tensor]}


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5, 7, 8, 20])
def test_shards_partition_every_parameter_in_order(layout, shards):
    pieces = [p for rank in range(shards) for p in layout.shard(rank, shards).pieces()]
    columns = [c for p in pieces for c in range(p.start, p.stop)]
    spans = zip(layout.offsets, layout.sizes, strict=False)
    assert columns == [c for start, size in spans for c in range(start, start + size)]
    for p in pieces:
        assert layout.offsets[p.tensor] <= p.start < p.stop <= layout.offsets[p.tensor + 1]
        assert p.start % CELL == 0


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 20])
def test_shards_are_equal_runs_of_whole_cells_and_fill_the_padded_buffer(layout, shards):
    all_shards = [layout.shard(rank, shards) for rank in range(shards)]
    assert {(s.cells, s.columns) for s in all_shards} == {
        (all_shards[0].cells, all_shards[0].cells * CELL)
    }
    assert [s.start for s in all_shards] == [rank * all_shards[0].columns for rank in range(shards)]
    assert all_shards[0].padded_columns == shards * all_shards[0].columns >= layout.columns
    assert all_shards[0].padded_columns - layout.columns < shards * CELL
    for s in all_shards:
        assert all(s.start <= p.start and p.stop <= s.start + s.columns for p in s.pieces())


def test_cells_past_the_end_are_the_last_tensors_and_hold_nothing(layout):
    cells = layout.columns // CELL
    last = layout.shard(cells + 1, cells + 2)
    assert last.pieces() == []
    assert last.tensor_of_cell.tolist() == [len(NAMES) - 1]


def test_one_tensor_is_a_layout_too():
    layout = ParameterLayout(("w",), ((3,),))
    assert (layout.parameters, layout.columns) == (3, CELL)
    assert layout.shard(0, 1).tensor_of_cell.tolist() == [0]


def test_the_maths_never_imports_ray_or_a_model():
    """The check needs a fresh interpreter, since this one may have imported them already."""
    code = (
        "import sys, pkgutil, importlib, raymerge.merging as m\n"
        "[importlib.import_module(f'raymerge.merging.{x.name}') for x in "
        "pkgutil.iter_modules(m.__path__)]\n"
        "print([n for n in ('ray', 'open_clip', 'transformers') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
