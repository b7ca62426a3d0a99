"""The flat parameter vector: which tensor lies where, what one λ covers, who holds which columns.

Legend: K tasks, T tensors, L layers (coefficient groups), P parameters, N columns of one shard.
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

from raymerge.config import Granularity

CELL = 16384
"""Columns in one cell of the fixed grid over the flat vector. Shards are whole cells, and inner
products are summed cell by cell, so that the partial sums do not depend on the shard count."""

_BLOCK = re.compile(
    r"(?:^|.*?\.)(?:resblocks\.\d+|stages\.\d+\.blocks\.\d+|blocks\.\d+|layer\d+\.\d+)(?=\.)"
)
_HEAD = re.compile(r"^(?:trunk\.)?(?:proj|ln_post|norm|fc_norm|head|attnpool|attn_pool)(?:\.|$)")


@dataclass(frozen=True)
class ParameterLayout:
    """Names and shapes of the merged tensors, in order; their flat positions follow."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> ParameterLayout:
        """The floating-point tensors of a state dict, in its order; no integer buffers."""
        kept = {name: t for name, t in tensors.items() if t.is_floating_point()}
        return cls(tuple(kept), tuple(tuple(t.shape) for t in kept.values()))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """T + 1 flat positions: tensor t occupies ``offsets[t]:offsets[t + 1]``."""
        return tuple(accumulate((math.prod(shape) for shape in self.shapes), initial=0))

    @property
    def numel(self) -> int:
        return self.offsets[-1]

    def views(self, flat_P: Tensor) -> dict[str, Tensor]:
        """Every tensor as a view into ``flat_P`` (P or more elements), by name."""
        return {
            name: flat_P[start:stop].view(shape)
            for name, shape, start, stop in zip(
                self.names, self.shapes, self.offsets, self.offsets[1:], strict=False
            )
        }

    def layers(self, granularity: Granularity) -> LayerMap:
        """What one coefficient covers: everything, a transformer block, or one tensor."""
        if granularity == "task":
            return LayerMap(("all",), (0,) * len(self.names))
        if granularity == "tensor":
            return LayerMap(self.names, tuple(range(len(self.names))))
        blocks = [block_of(name) for name in self.names]
        order = sorted(set(blocks), key=_block_order)
        return LayerMap(tuple(order), tuple(order.index(block) for block in blocks))

    def shard(self, rank: int, shards: int) -> Shard:
        """Columns of ``rank`` among ``shards`` equal runs of cells (the last may pass P)."""
        cells = math.ceil(math.ceil(self.numel / CELL) / shards)
        return Shard(self, rank, shards, cells * CELL)


@dataclass(frozen=True)
class LayerMap:
    """L coefficient groups over T tensors: ``layer_of_tensor[t]`` is the layer of tensor t."""

    names: tuple[str, ...]
    layer_of_tensor: tuple[int, ...]

    def expand(self, lambdas_KL: Tensor) -> Tensor:
        """Coefficients per layer (K, L) → per tensor (K, T)."""
        return lambdas_KL[:, list(self.layer_of_tensor)]

    def reduce(self, per_tensor_KT: Tensor) -> Tensor:
        """Gradients per tensor (K, T) → per layer (K, L), the adjoint of ``expand``."""
        out_KL = per_tensor_KT.new_zeros(per_tensor_KT.shape[0], len(self.names))
        index = torch.tensor(self.layer_of_tensor, device=per_tensor_KT.device)
        return out_KL.index_add_(1, index, per_tensor_KT)


@dataclass(frozen=True)
class Piece:
    """The part of one tensor that lies in a shard: flat columns ``start:stop``."""

    tensor: int
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """One worker's columns of the flat vector: ``start:stop``, all shards equally wide."""

    layout: ParameterLayout
    rank: int
    shards: int
    width: int

    @property
    def start(self) -> int:
        return self.rank * self.width

    @property
    def padded_numel(self) -> int:
        """Length of a flat buffer that all shards together fill exactly: ≥ P."""
        return self.shards * self.width

    @property
    def columns(self) -> int:
        """N: the columns of this shard that hold parameters, not padding."""
        return max(0, min(self.width, self.layout.numel - self.start))

    def pieces(self) -> list[Piece]:
        """The tensors, or parts of tensors, in this shard, in order, at absolute positions."""
        first, last = self.start, self.start + self.columns
        bounds = zip(self.layout.offsets, self.layout.offsets[1:], strict=False)
        spans = [(t, max(a, first), min(b, last)) for t, (a, b) in enumerate(bounds)]
        return [Piece(t, a, b) for t, a, b in spans if a < b]


def block_of(name: str) -> str:
    """The block of a visual tensor: its transformer block's path, ``stem`` or ``head``."""
    match = _BLOCK.match(name)
    if match:
        return match.group(0)
    return "head" if _HEAD.search(name) else "stem"


def _block_order(block: str) -> tuple[int, list[tuple[bool, int | str]]]:
    if block in ("stem", "head"):
        return (0 if block == "stem" else 2), []
    return 1, [(part.isdigit(), int(part) if part.isdigit() else part) for part in block.split(".")]
