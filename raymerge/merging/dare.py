"""DARE (Yu et al., ICML 2024): drop entries of the task vectors at random, rescale the rest.

The random number of an entry is a function of the seed, the task's name and the entry's position
in the flat vector: Philox counts positions. Any slice of the vector draws exactly its own numbers,
so the masks do not depend on how the vector is cut.

Legend: K tasks, N columns (any slice of the flat vector that starts a cell).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raymerge.merging.layout import CELL, Piece
from raymerge.merging.ties import disjoint, elect_sign

_PER_COUNT = 8
"""32-bit numbers, one for each column, that Philox makes of one value of its counter."""

_BLOCK = 64 * CELL
"""Columns in one block: their numbers and their entries stay in the processor's cache."""


@dataclass(frozen=True)
class Dare:
    """DARE of K tasks, ``names`` in their order, each entry kept with probability ``density``.

    ``elect_sign``: keep only entries that have the sign of the column's sum, which is TIES after
    DARE without trimming by magnitude (mergekit's ``dare_ties``). A column that sums to zero keeps
    nothing; mergekit keeps its positive entries.
    """

    names: tuple[str, ...]
    seed: int
    density: float
    elect_sign: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {self.density}")
        if len(set(self.names)) < len(self.names):
            raise ValueError(
                f"task names must differ to give different masks, got {', '.join(self.names)}"
            )

    @property
    def whole_tensors(self) -> bool:
        return False

    def rows(self, vectors_Kn: Tensor, piece: Piece, shape: tuple[int, ...]) -> Tensor:
        return self.phi(vectors_Kn, piece.start)

    def phi(self, vectors_KN: Tensor, start: int) -> Tensor:
        """Return the K separate vectors, (K, N), of the columns from ``start``."""
        kept_KN = drop_and_rescale(vectors_KN, self.names, self.seed, start, self.density)
        return disjoint(kept_KN, elect_sign(kept_KN, 0.0)) if self.elect_sign else kept_KN


def drop_and_rescale(
    vectors_KN: Tensor, names: Sequence[str], seed: int, start: int, density: float
) -> Tensor:
    """Return x / ``density`` of each entry x with that probability, else 0 (§3.1): (K, N).

    ``start``: flat position of the first column, a multiple of ``CELL``.
    """
    if start % CELL:
        raise ValueError(f"columns from {start} do not start a cell of {CELL}")
    kept_KN = torch.empty_like(vectors_KN)
    for name, vector_N, out_N in zip(names, vectors_KN, kept_KN, strict=True):
        random = _generator(seed, name, start)
        for vector_n, out_n in zip(vector_N.split(_BLOCK), out_N.split(_BLOCK), strict=True):
            dropped_n = _dropped(random, len(vector_n), density).to(out_n.device)
            torch.div(vector_n, density, out=out_n).masked_fill_(dropped_n, 0.0)
    return kept_KN


def dropped(seed: int, name: str, start: int, columns: int, density: float) -> Tensor:
    """Return which entries of the vector ``name`` are dropped, (n,) bool, from a cell's start."""
    if start % CELL:
        raise ValueError(f"columns from {start} do not start a cell of {CELL}")
    return _dropped(_generator(seed, name, start), columns, density)


def _generator(seed: int, name: str, start: int) -> np.random.Philox:
    """Return the random bits of one task from flat position ``start`` on."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"), counter=start // _PER_COUNT)


def _dropped(random: np.random.Philox, columns: int, density: float) -> Tensor:
    """Return which of the next columns are dropped, (n,) bool, from 32 bits for each."""
    bits_n = random.random_raw(-(-columns // 2)).view(np.uint32)[:columns]
    return torch.from_numpy(bits_n >= round(density * 2**32))
