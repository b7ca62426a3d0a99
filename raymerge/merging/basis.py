"""What λ multiplies: the rows V that a method makes of the task vectors.

Every method that needs the checkpoints alone is θ₀ + Σ_j λ_j V_j for some rows V: the task vectors
themselves, K transformed ones, or one row that has merged them already.

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
    """What a basis may depend on besides its options.

    ``names``: the models', in the order of the rows. ``ties``: computes the statistics of TIES over
    the checkpoints (``models.checkpoints.task_vectors.ties_statistics``, bound to the files).
    """

    names: tuple[str, ...]
    seed: int
    ties: Callable[..., TiesStatistics]


class Basis(Protocol):
    """``rows`` of the columns of one piece; equal however the vector is cut into pieces.

    ``whole_tensors``: a piece must be a whole tensor.
    """

    @property
    def whole_tensors(self) -> bool: ...

    def rows(self, vectors_Kn: Tensor, piece: Piece, shape: tuple[int, ...]) -> Tensor:
        """V (J, n) of the raw task vectors (K, n), which it may change; ``shape``: the tensor's."""
        ...


@dataclass(frozen=True)
class MatrixBasis:
    """A function of each matrix; tensors of other shapes are averaged.

    ``function``: (K, M, N) → (K, M, N) if its rows stay apart, (M, N) if it merges them. It must be
    picklable.
    """

    function: Callable[[Tensor], Tensor]
    separate: bool = True
    """Whether the tasks keep a row each."""
    whole_tensors: bool = True

    def rows(self, vectors_Kn: Tensor, piece: Piece, shape: tuple[int, ...]) -> Tensor:
        tasks = len(vectors_Kn)
        if len(shape) != 2:
            vectors_Kn = vectors_Kn.div_(tasks)
            return vectors_Kn if self.separate else vectors_Kn.sum(0, keepdim=True)
        rows_JMN = self.function(vectors_Kn.view(tasks, *shape))
        return rows_JMN.reshape(-1, vectors_Kn.shape[1])


@dataclass(frozen=True)
class Given:
    """One row, ``delta_P`` on the flat grid, that is there already whatever is merged."""

    delta_P: Tensor
    whole_tensors: bool = False

    def rows(self, vectors_Kn: Tensor, piece: Piece, shape: tuple[int, ...]) -> Tensor:
        return self.delta_P[piece.start : piece.stop].unsqueeze(0)
