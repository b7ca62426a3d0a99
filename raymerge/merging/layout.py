"""The flat parameter vector: the place of each tensor, the layer of each λ, the columns of a shard.

Everything follows from the tensors' names and shapes; the values are left to others.

Legend: K tasks, T tensors, L layers (coefficient groups), P columns of the flat vector (the
parameters, each tensor padded to whole cells), C cells of one shard, N = C·CELL columns of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from raymerge.config.methods import Granularity

CELL = 2048
"""Columns in one cell of the grid over the flat vector. Every tensor starts a cell, so that a cell
belongs to one tensor: merge and inner products are one batched product over all cells. Shards are
whole cells, so what is summed together does not depend on how many shards there are."""

_BLOCK = re.compile(
    r"(?:^|.*?\.)(?:resblocks\.\d+|stages\.\d+\.blocks\.\d+|blocks\.\d+|layer\d+\.\d+)(?=\.)"
)
_HEAD = re.compile(r"^(?:trunk\.)?(?:proj|ln_post|norm|fc_norm|head|attnpool|attn_pool)(?:\.|$)")


@dataclass(frozen=True)
class ParameterLayout:
    """Names and shapes of the merged tensors, in order; their flat positions follow.

    Tensor t occupies ``offsets[t]:offsets[t] + sizes[t]`` of the flat vector; the rest of its last
    cell is padding, which is zero in every flat vector.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> ParameterLayout:
        """Return the layout of a state dict's floating-point tensors, in its order."""
        floats = {name: t for name, t in tensors.items() if t.is_floating_point()}
        return cls(tuple(floats), tuple(tuple(t.shape) for t in floats.values()))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of parameters of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """T + 1 flat positions, multiples of ``CELL``: where each tensor starts, and P."""
        return tuple(accumulate((-(-size // CELL) * CELL for size in self.sizes), initial=0))

    @property
    def parameters(self) -> int:
        """The number of parameters, without padding."""
        return sum(self.sizes)

    @property
    def columns(self) -> int:
        """P: the length of the flat vector."""
        return self.offsets[-1]

    def views(self, flat_P: Tensor) -> dict[str, Tensor]:
        """Return every tensor by name, as a view into ``flat_P`` (P or more elements)."""
        return {
            name: flat_P[start : start + size].view(shape)
            for name, shape, start, size in zip(
                self.names, self.shapes, self.offsets, self.sizes, strict=False
            )
        }

    def layers(self, granularity: Granularity) -> LayerMap:
        """Return the layers: one for all tensors, one for each block, or one for each tensor."""
        if granularity == "task":
            return LayerMap(("all",), (0,) * len(self.names))
        if granularity == "tensor":
            return LayerMap(self.names, tuple(range(len(self.names))))
        blocks = [block_of(name) for name in self.names]
        order = sorted(set(blocks), key=_block_order)
        return LayerMap(tuple(order), tuple(order.index(block) for block in blocks))

    def whole_piece(self, tensor: int) -> Piece:
        """Return all columns of one tensor."""
        start = self.offsets[tensor]
        return Piece(tensor, start, start + self.sizes[tensor])

    def shard(self, rank: int, shards: int) -> Shard:
        """Return shard ``rank`` of ``shards`` equal runs of cells (the last may pass P)."""
        return Shard(self, rank, shards, math.ceil(self.columns / CELL / shards))


@dataclass(frozen=True)
class LayerMap:
    """L coefficient groups over T tensors: ``layer_of_tensor[t]`` is the layer of tensor t."""

    names: tuple[str, ...]
    layer_of_tensor: tuple[int, ...]

    def expand(self, lambdas_KL: Tensor) -> Tensor:
        """Return each tensor's coefficient, (K, T), from those per layer (K, L)."""
        return lambdas_KL[:, list(self.layer_of_tensor)]

    def of_cells(self, shard: Shard) -> Tensor:
        """Return the layer of each of the shard's cells, (C,) int64."""
        return torch.tensor(self.layer_of_tensor)[shard.tensor_of_cell]


@dataclass(frozen=True)
class Piece:
    """The part of one tensor that lies in a shard: flat columns ``start:stop``, no padding."""

    tensor: int
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """One worker's ``cells`` cells of the flat vector: columns ``start:start + columns``."""

    layout: ParameterLayout
    rank: int
    shards: int
    cells: int

    @property
    def columns(self) -> int:
        """N: equal for all shards, which together fill ``padded_columns`` exactly."""
        return self.cells * CELL

    @property
    def start(self) -> int:
        return self.rank * self.columns

    @property
    def padded_columns(self) -> int:
        """The length ≥ P of a flat buffer that all shards together fill."""
        return self.shards * self.columns

    @cached_property
    def tensor_of_cell(self) -> Tensor:
        """The tensor of each cell, (C,) int64; cells past the end belong to the last tensor."""
        starts = torch.arange(self.cells) * CELL + self.start
        bounds = torch.tensor(self.layout.offsets[1:-1], dtype=torch.int64)
        return torch.searchsorted(bounds, starts, right=True)

    def pieces(self) -> list[Piece]:
        """Return the parts of tensors in this shard, in order, at absolute positions."""
        first, last = self.start, self.start + self.columns
        spans = [
            (t, max(start, first), min(start + size, last))
            for t, (start, size) in enumerate(
                zip(self.layout.offsets, self.layout.sizes, strict=False)
            )
        ]
        return [Piece(t, a, b) for t, a, b in spans if a < b]


def block_of(name: str) -> str:
    """Return the block of a visual tensor: its transformer block's path, ``stem`` or ``head``."""
    match = _BLOCK.match(name)
    if match:
        return match.group(0)
    return "head" if _HEAD.search(name) else "stem"


def _block_order(block: str) -> tuple[int, list[tuple[bool, int | str]]]:
    if block in ("stem", "head"):
        return (0 if block == "stem" else 2), []
    return 1, [(part.isdigit(), int(part) if part.isdigit() else part) for part in block.split(".")]
