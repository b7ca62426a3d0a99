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


def test_tensors_tile_the_flat_vector_without_gap_or_overlap(layout):
    assert layout.offsets[0] == 0
    assert layout.numel == sum(math.prod(shape) for shape in SHAPES)
    touched_P = torch.zeros(layout.numel)
    for view in layout.views(touched_P).values():
        view += 1
    assert torch.equal(touched_P, torch.ones(layout.numel))


def test_views_are_the_concatenation_of_the_flattened_tensors(layout):
    tensors = {name: torch.randn(shape) for name, shape in zip(NAMES, SHAPES, strict=True)}
    flat_P = torch.cat([t.reshape(-1) for t in tensors.values()])
    views = layout.views(flat_P)
    assert list(views) == list(NAMES)
    assert all(torch.equal(views[name], tensors[name]) for name in NAMES)


def test_views_alias_the_vector_and_tolerate_padding(layout):
    flat_P = torch.zeros(layout.numel + 100)
    layout.views(flat_P)["proj"][1, 2] = 5.0
    assert flat_P[7 + 1 * 3 + 2] == 5.0
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


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
def test_reduce_is_the_adjoint_of_expand(layout, granularity):
    torch.manual_seed(0)
    mapped = layout.layers(granularity)
    lambdas_KL = torch.randn(3, len(mapped.names), dtype=torch.float64)
    g_KT = torch.randn(3, len(NAMES), dtype=torch.float64)
    left = (mapped.expand(lambdas_KL) * g_KT).sum()
    right = (lambdas_KL * mapped.reduce(g_KT)).sum()
    torch.testing.assert_close(left, right, rtol=1e-13, atol=0)


def test_expand_gives_every_tensor_the_coefficient_of_its_layer():
    mapped = LayerMap(("x", "y"), (1, 0, 1))
    assert mapped.expand(torch.tensor([[10.0, 20.0]])).tolist() == [[20.0, 10.0, 20.0]]
    assert mapped.reduce(torch.tensor([[1.0, 2.0, 4.0]])).tolist() == [[2.0, 5.0]]


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5, 7, 8, 20])
def test_shards_partition_every_column_in_order(layout, shards):
    pieces = [p for rank in range(shards) for p in layout.shard(rank, shards).pieces()]
    columns = [c for p in pieces for c in range(p.start, p.stop)]
    assert columns == list(range(layout.numel))
    for p in pieces:
        assert layout.offsets[p.tensor] <= p.start < p.stop <= layout.offsets[p.tensor + 1]


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 20])
def test_shards_are_equal_runs_of_whole_cells_and_fill_the_padded_buffer(layout, shards):
    held = [layout.shard(rank, shards) for rank in range(shards)]
    assert {s.width for s in held} == {held[0].width}
    assert held[0].width % CELL == 0
    assert sum(s.columns for s in held) == layout.numel
    assert held[0].padded_numel == shards * held[0].width >= layout.numel
    for s in held:
        inside = [(p.start, p.stop) for p in s.pieces()]
        assert all(s.start <= a and b <= s.start + s.width for a, b in inside)
        assert s.columns == sum(b - a for a, b in inside)


def test_more_shards_than_cells_leaves_the_last_ones_empty(layout):
    cells = math.ceil(layout.numel / CELL)
    last = layout.shard(cells + 1, cells + 2)
    assert last.columns == 0
    assert last.pieces() == []


def test_the_maths_never_imports_ray_or_a_model():
    """Style habit 1. In a fresh interpreter, since this one may have imported them already."""
    code = (
        "import sys, pkgutil, importlib, raymerge.merging as m\n"
        "[importlib.import_module(f'raymerge.merging.{x.name}') for x in "
        "pkgutil.iter_modules(m.__path__)]\n"
        "print([n for n in ('ray', 'open_clip', 'transformers') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
