"""Task vectors T_k = θ_k − θ₀ from files, column by column: never K whole models at once.

A function of one piece is mapped over all pieces, on all cores; the maths of a piece is left to
``merging``.

Legend: K tasks, T tensors, C cells and N columns of a shard, n columns of one piece or cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from raymerge.config.methods import TrimScope
from raymerge.files.threads import parallel_map
from raymerge.merging.basis import Basis
from raymerge.merging.layout import CELL, Piece, Shard
from raymerge.merging.ties import TiesStatistics, elect_sign, trim, trim_threshold
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint, all_finite

_BLOCK_BYTES = 4 << 20  # of K task vectors: fits a core's cache
_MIN_COLUMNS = 8 * CELL  # with very many tasks, shorter reads cost more than they save
_SAMPLED_CELLS = 512
_SORTED_AT_ONCE = 1 << 22  # up to so many entries, a threshold is found without a sample
STREAM_BYTES = 16 * _BLOCK_BYTES
"""The memory that streaming takes, about."""

_Result = TypeVar("_Result")


def stream(
    function: Callable[[Piece, Tensor, Tensor], _Result],
    pretrained: VisualCheckpoint,
    experts: Sequence[VisualCheckpoint],
    pieces: Sequence[Piece],
    *,
    whole: bool = False,
) -> Iterator[_Result]:
    """Yield ``function(piece, θ₀ (n,), raw task vectors (K, n))`` in order of the pieces; float32.

    Pieces are cut into parts between cells, so that memory does not grow with the tasks, and every
    core works on parts of its own (``whole``: on whole pieces). ``function`` may change its
    arguments. Raises :class:`CheckpointError` for NaN and Inf.
    """

    def work(piece: Piece) -> _Result:
        return function(piece, *_read(pretrained, experts, piece))

    return parallel_map(work, pieces if whole else _blocks(pieces, len(experts)))


def _read(
    pretrained: VisualCheckpoint, experts: Sequence[VisualCheckpoint], piece: Piece
) -> tuple[Tensor, Tensor]:
    """Return θ₀ (n,) and the raw task vectors (K, n) of one piece."""
    models_n = torch.empty(len(experts) + 1, piece.stop - piece.start)
    for checkpoint, out_n in zip((pretrained, *experts), models_n, strict=True):
        checkpoint.fill(piece, out_n)
    if not all_finite(models_n):
        for checkpoint, values_n in zip((pretrained, *experts), models_n, strict=True):
            checkpoint.require_finite(piece, values_n)
    base_n, finetuned_Kn = models_n[0], models_n[1:]
    return base_n, finetuned_Kn.sub_(base_n)


def _blocks(pieces: Sequence[Piece], tasks: int) -> Iterator[Piece]:
    """Yield the pieces in parts of a block each."""
    return _cut(pieces, max(_MIN_COLUMNS, _BLOCK_BYTES // (4 * max(4, tasks)) // CELL * CELL))


def _cut(pieces: Sequence[Piece], size: int) -> Iterator[Piece]:
    """Yield the pieces in parts of at most ``size`` columns each."""
    for piece in pieces:
        for start in range(piece.start, piece.stop, size):
            yield Piece(piece.tensor, start, min(start + size, piece.stop))


def stream_rows(
    function: Callable[[Piece, Tensor, Tensor], _Result],
    pretrained: VisualCheckpoint,
    experts: Sequence[VisualCheckpoint],
    basis: Basis | None,
    shard: Shard,
) -> Iterator[_Result]:
    """Stream a shard, with the rows V (J, n) of ``basis`` in place of the task vectors."""
    if basis is None:
        return stream(function, pretrained, experts, shard.pieces())
    layout, whole = shard.layout, basis.whole_tensors

    def work(piece: Piece, base_n: Tensor, vectors_Kn: Tensor) -> _Result:
        rows_Jn = basis.rows(vectors_Kn, piece, layout.shapes[piece.tensor])
        # A basis of whole tensors needs more columns than the shard has.
        inside = _inside(piece, shard)
        cut = slice(inside.start - piece.start, inside.stop - piece.start)
        return function(inside, base_n[cut], rows_Jn[:, cut])

    pieces = shard.pieces()
    if whole:
        pieces = [layout.whole_piece(piece.tensor) for piece in pieces]
    return stream(work, pretrained, experts, pieces, whole=whole)


def _inside(piece: Piece, shard: Shard) -> Piece:
    """Return the part of a piece that lies in the shard."""
    start, stop = max(piece.start, shard.start), min(piece.stop, shard.start + shard.columns)
    return Piece(piece.tensor, start, stop)


def store(out_CKn: Tensor, values_Kn: Tensor) -> None:
    """Write columns (K, n) into the first cells of ``out_CKn`` (C, K, CELL)."""
    tasks, count = values_Kn.shape
    whole = count // CELL
    cells_KCn = values_Kn[:, : whole * CELL].view(tasks, whole, CELL)
    out_CKn[:whole] = cells_KCn.transpose(0, 1)
    if count % CELL:
        out_CKn[whole, :, : count % CELL] = values_Kn[:, whole * CELL :]


def ties_statistics(
    pretrained: VisualCheckpoint,
    experts: Sequence[VisualCheckpoint],
    *,
    density: float,
    scope: TrimScope,
    extra_zeros: int = 0,
    mean: bool = False,
    count_signs: bool = True,
) -> TiesStatistics:
    """Return the trim thresholds and the majority sign, streaming the files.

    Without ``count_signs`` the majority is left open, which saves one reading of every file.
    ``scope``: one threshold over the visual vector; over that and ``extra_zeros`` zero deltas
    (``full``: the official code's vector, which includes leftover text parameters); or one per
    tensor (mergekit).
    """
    layout, pieces = pretrained.layout, pretrained.layout.shard(0, 1).pieces()
    zeros = extra_zeros if scope == "full" else 0

    # Thresholds first: the experts are independent of each other.
    def thresholds_of(expert: VisualCheckpoint) -> tuple[float, ...]:
        if scope == "tensor":
            return tuple(_threshold(pretrained, expert, [p], density, 0) for p in pieces)
        whole = _threshold(pretrained, expert, pieces, density, zeros)
        return (whole,) * len(layout.names)

    thresholds = tuple(parallel_map(thresholds_of, experts))
    statistics = TiesStatistics(thresholds, None, mean)
    if not count_signs:
        return statistics

    # Then the majority: the signs of all trimmed columns are summed.
    def balance(piece: Piece, base_n: Tensor, vectors_Kn: Tensor) -> float:
        trimmed_Kn = trim(vectors_Kn, statistics.column(piece.tensor, vectors_Kn))
        return float(elect_sign(trimmed_Kn, 0.0).sum())

    return statistics.counted(sum(stream(balance, pretrained, experts, pieces)))


def _threshold(
    pretrained: VisualCheckpoint,
    expert: VisualCheckpoint,
    pieces: Sequence[Piece],
    density: float,
    extra_zeros: int,
) -> float:
    """Return one expert's threshold over the pieces and ``extra_zeros`` zero deltas."""
    numel = sum(piece.stop - piece.start for piece in pieces) + extra_zeros

    def parts() -> Iterator[Tensor]:
        zeros = torch.zeros(min(extra_zeros, _BLOCK_BYTES // 4))
        for start in range(0, extra_zeros, max(1, len(zeros))):
            yield zeros[: extra_zeros - start]
        for part in _blocks(pieces, 1):
            yield _read(pretrained, [expert], part)[1]

    sample = None
    if numel > _SORTED_AT_ONCE:
        sample = _sample(pretrained, expert, pieces, extra_zeros)
    return trim_threshold(parts, numel, density, sample)


def _sample(
    pretrained: VisualCheckpoint,
    expert: VisualCheckpoint,
    pieces: Sequence[Piece],
    extra_zeros: int,
) -> Tensor:
    """Return a sample of the vector: a quarter of one cell in every so many, evenly spread."""
    cells = sum(-(-(piece.stop - piece.start) // CELL) for piece in pieces)
    every = cells // _SAMPLED_CELLS + 1
    sampled = [torch.zeros(extra_zeros // (4 * every))]
    for cell in islice(_cut(pieces, CELL), 0, None, every):
        quarter = Piece(cell.tensor, cell.start, cell.start + -(-(cell.stop - cell.start) // 4))
        base_n, finetuned_n = torch.empty(2, quarter.stop - quarter.start)
        pretrained.fill(quarter, base_n)
        expert.fill(quarter, finetuned_n)
        sampled.append(finetuned_n.sub_(base_n))
    return torch.cat(sampled)
