"""Bases: the rows V that a method makes of the task vectors, and that λ multiplies.

Every method that needs only the checkpoints is θ₀ + Σ_j λ_j V_j for some rows V: the task vectors
themselves, K transformed ones, or one row that has merged them already. Reading the task vectors is
left to ``models.checkpoints``.

Legend: K tasks, J rows, n columns of one piece, M × N one matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from raymerge.merging.layout import Piece
from raymerge.merging.ties import TiesStatistics


@dataclass(frozen=True)
class BasisInputs:
    """The inputs of a basis besides its options.

    ``names``: the models' names in the order of the rows. ``ties``: computes the statistics of TIES
    over the checkpoints (``models.checkpoints.task_vectors.ties_statistics``, bound to the files).
    """

    names: tuple[str, ...]
    seed: int
    ties: Callable[..., TiesStatistics]


class Basis(Protocol):
    """Makes the rows of one piece's columns, equal however the vector is cut into pieces.

    ``whole_tensors``: True if a piece must be a whole tensor.
    """

    @property
    def whole_tensors(self) -> bool: ...

    def rows(self, vectors_Kn: Tensor, piece: Piece, shape: tuple[int, ...]) -> Tensor:
        """Return V (J, n) of the task vectors (K, n), which may be overwritten.

        ``shape``: the shape of the whole tensor.
        """
        ...


@dataclass(frozen=True)
class MatrixBasis:
    """Applies a function to each matrix and averages tensors of other shapes.

    ``function``: (K, M, N) → (K, M, N) if its rows stay apart, (M, N) if it merges them. It must be
    picklable.
    """

    function: Callable[[Tensor], Tensor]
    separate: bool = True
    """True if each task keeps a row of its own."""
    whole_tensors: bool = True

    def rows(self, vectors_Kn: Tensor, piece: Piece, shape: tuple[int, ...]) -> Tensor:
        tasks = len(vectors_Kn)
        if len(shape) != 2:
            vectors_Kn = vectors_Kn.div_(tasks)
            return vectors_Kn if self.separate else vectors_Kn.sum(0, keepdim=True)
        rows_JMN = self.function(vectors_Kn.view(tasks, *shape))
        return rows_JMN.reshape(-1, vectors_Kn.shape[1])


@dataclass(frozen=True)
class ConstantRow:
    """One row that is known already: ``delta_P`` on the flat grid, whatever is merged."""

    delta_P: Tensor
    whole_tensors: bool = False

    def rows(self, vectors_Kn: Tensor, piece: Piece, shape: tuple[int, ...]) -> Tensor:
        return self.delta_P[piece.start : piece.stop].unsqueeze(0)
