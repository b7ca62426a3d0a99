"""Write the merged model's weights, streamed from the checkpoints' files into one file.

Only a block of each model is in memory at a time. The maths of a block is left to ``merging``.

Legend: K tasks, J rows, T tensors, L layers, n columns of one part of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from raymerge.errors import UserError
from raymerge.merging.basis import Basis
from raymerge.merging.layout import CELL, LayerMap, Piece
from raymerge.merging.merge import combine
from raymerge.merging.ties import TiesStatistics
from raymerge.models.checkpoints.checkpoint import TensorSpec
from raymerge.models.checkpoints.safetensors_file import SafetensorsWriter
from raymerge.models.checkpoints.task_vectors import stream, stream_rows
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint, all_finite
from raymerge.models.pretrained import unmerged_keys, unmerged_tensors

_Write = Callable[[Piece, Tensor, Tensor], None]


def write_merged(
    path: Path,
    pretrained: VisualCheckpoint,
    experts: Sequence[VisualCheckpoint],
    lambdas_JL: Tensor,
    layers: LayerMap,
    basis: Basis | None,
) -> None:
    """Write the whole model: θ = θ₀ + Σ λ V in float32 as ``visual.*``, all else as it is stored.

    V: the J rows of ``basis``, or the K task vectors. Raises :class:`UserError` where a number is
    not finite, and :class:`OSError` if the disk is full; ``path`` is then incomplete.
    """
    # The header: merged tensors in float32, all others as they are stored.
    layout, stored = pretrained.layout, pretrained.checkpoint.specs
    specs = {name: stored[key] for name, key in unmerged_keys(pretrained).items()}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        specs[f"visual.{name}"] = TensorSpec(shape, torch.float32)
    lambdas_JT = layers.expand(lambdas_JL.float())
    with SafetensorsWriter(path, specs) as writer:
        for name, tensor in unmerged_tensors(pretrained):
            writer.write(name, 0, tensor)

        def write(piece: Piece, base_n: Tensor, rows_Jn: Tensor) -> None:
            t = piece.tensor
            theta_n = combine(base_n, rows_Jn, lambdas_JT[:, t])
            if not all_finite(theta_n):
                raise UserError(
                    "the merged weights overflow: the coefficients are too large; use smaller ones"
                )
            writer.write(f"visual.{layout.names[t]}", piece.start - layout.offsets[t], theta_n)

        # The merged tensors; TIES counts its signs while it merges, to read every file once.
        shard = layout.shard(0, 1)
        if isinstance(basis, TiesStatistics) and basis.majority is None:
            basis, cells = _vote(basis, write, pretrained, experts, shard.pieces())
            blocks = stream(_ties_again(basis, write), pretrained, experts, cells)
        else:
            blocks = stream_rows(write, pretrained, experts, basis, shard)
        for _ in blocks:  # a stream does its work as it is read
            pass


def _vote(
    ties: TiesStatistics,
    write: _Write,
    pretrained: VisualCheckpoint,
    experts: Sequence[VisualCheckpoint],
    pieces: Sequence[Piece],
) -> tuple[TiesStatistics, list[Piece]]:
    """Merge and count the signs in one reading of every file.

    Returns the statistics with the majority sign, and the few cells to merge again: they have
    columns whose result depends on the majority.
    """

    def merge(piece: Piece, base_n: Tensor, vectors_Kn: Tensor) -> tuple[float, list[Piece]]:
        vote = ties.vote(vectors_Kn, piece.tensor)
        write(piece, base_n, vote.phi)
        return vote.balance, _cells(piece, vote.waiting)

    votes = list(stream(merge, pretrained, experts, pieces))
    counted = ties.counted(sum(balance for balance, _ in votes))
    return counted, [cell for _, cells in votes for cell in cells if counted.majority]


def _ties_again(ties: TiesStatistics, write: _Write) -> _Write:
    def merge(piece: Piece, base_n: Tensor, vectors_Kn: Tensor) -> None:
        write(piece, base_n, ties.phi(vectors_Kn, piece.tensor))

    return merge


def _cells(piece: Piece, marked_n: Tensor) -> list[Piece]:
    """Return the runs of a piece's cells that hold a marked column.

    A piece starts where a cell does.
    """
    runs: list[Piece] = []
    for cell in (marked_n.nonzero() // CELL).unique().tolist():
        start = piece.start + cell * CELL
        stop = min(start + CELL, piece.stop)
        if runs and runs[-1].stop == start:
            start = runs.pop().start
        runs.append(Piece(piece.tensor, start, stop))
    return runs
