"""Task vectors T_k = θ_k − θ₀ from files, column by column: never K whole models at once.

Legend: K tasks, T tensors, N columns of a shard, n columns of one piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from raymerge.checkpoints.visual import VisualCheckpoint
from raymerge.config import TrimScope
from raymerge.merging.layout import ParameterLayout, Piece, Shard
from raymerge.merging.ties import TiesStatistics, elect_sign, trim, trim_threshold


def task_vector_pieces(
    pretrained: VisualCheckpoint, experts: Sequence[VisualCheckpoint], pieces: Sequence[Piece]
) -> Iterator[tuple[Piece, Tensor, Tensor]]:
    """Per piece: θ₀ (n,) and the raw task vectors (K, n), float32. Raises for NaN and Inf."""
    columns = (expert.columns(pieces) for expert in experts)
    for (piece, base_n), *finetuned in zip(pretrained.columns(pieces), *columns, strict=True):
        vectors_Kn = torch.stack([values for _, values in finetuned])
        yield piece, base_n, vectors_Kn.sub_(base_n)


def read_shard(
    pretrained: VisualCheckpoint,
    experts: Sequence[VisualCheckpoint],
    shard: Shard,
    ties: TiesStatistics | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """θ₀ (N,) and V (K, N) of one shard on ``device``; V is Φ(T) when ``ties`` is given."""
    pretrained_N = torch.empty(shard.columns, device=device)
    vectors_KN = torch.empty(len(experts), shard.columns, device=device)
    for piece, base_n, vectors_Kn in task_vector_pieces(pretrained, experts, shard.pieces()):
        here = slice(piece.start - shard.start, piece.stop - shard.start)
        pretrained_N[here] = base_n
        vectors_KN[:, here] = vectors_Kn if ties is None else ties.phi(vectors_Kn, piece.tensor)
    return pretrained_N, vectors_KN


def ties_statistics(
    pretrained: VisualCheckpoint,
    experts: Sequence[VisualCheckpoint],
    *,
    density: float,
    scope: TrimScope,
    extra_zeros: int = 0,
    mean: bool = False,
) -> TiesStatistics:
    """Thresholds and the majority sign, streaming the files: one piece of each task at a time.

    ``scope``: one threshold over the visual vector; over that and ``extra_zeros`` zero deltas
    (``full``: the official code's vector, which includes leftover text parameters); or one per
    tensor (mergekit).
    """
    layout = pretrained.layout
    zeros = extra_zeros if scope == "full" else 0
    thresholds = []
    for expert in experts:
        if scope == "tensor":
            row = [_threshold(pretrained, expert, [p], density, 0) for p in _pieces(layout)]
        else:
            row = [_threshold(pretrained, expert, _pieces(layout), density, zeros)]
        thresholds.append(tuple(row * len(layout.names) if len(row) == 1 else row))
    statistics = TiesStatistics(tuple(thresholds), mean=mean)
    balance = sum(
        float(elect_sign(trim(vectors_Kn, statistics.column(piece.tensor, vectors_Kn)), 0.0).sum())
        for piece, _, vectors_Kn in task_vector_pieces(pretrained, experts, _pieces(layout))
    )
    majority = math.copysign(1.0, balance) if balance else 0.0
    return TiesStatistics(tuple(thresholds), majority, mean)


def _pieces(layout: ParameterLayout) -> list[Piece]:
    return layout.shard(0, 1).pieces()


def _threshold(
    pretrained: VisualCheckpoint,
    expert: VisualCheckpoint,
    pieces: Sequence[Piece],
    density: float,
    extra_zeros: int,
) -> float:
    numel = sum(piece.stop - piece.start for piece in pieces) + extra_zeros

    def parts() -> Iterator[Tensor]:
        if extra_zeros:
            yield torch.zeros(extra_zeros)
        for _, _, vectors_1n in task_vector_pieces(pretrained, [expert], pieces):
            yield vectors_1n

    return trim_threshold(parts, numel, density)
