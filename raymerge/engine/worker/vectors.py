"""The task-vector store: a worker's columns of θ₀ and V, pinned or streamed from the files.

Pinned vectors are in float32 or bfloat16, on the device, in RAM, or in a mapped file; streamed ones
are read anew in every step. Choosing between them is left to ``engine.memory``.

Legend: K models, L layers, C cells of a shard, n = CELL columns of each, N = C·CELL columns.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from raymerge.engine.messages import VectorStorage
from raymerge.errors import RunError
from raymerge.files.atomic import reserve_space
from raymerge.merging.basis import Basis
from raymerge.merging.layout import CELL, LayerMap, Piece, Shard
from raymerge.merging.merge import cell_products, combine, inner_products, merge_into
from raymerge.models.checkpoints.task_vectors import store, stream_rows
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TaskVectorStore(Protocol):
    """θ = θ₀ + Σ λ V and ⟨∂ℒ/∂θ, V⟩ on one shard; construction reads the vectors to pin."""

    nbytes: int
    """The size of V in memory or in a mapped file."""

    def merge(self, lambdas_KL: Tensor, theta_N: Tensor) -> None:
        """Write θ into ``theta_N``, except padding at the end."""
        ...

    def inner_products(self, gradient_N: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Return ⟨∂ℒ/∂θ, V_k⟩ per cell, (C, K); it may be 0 for models that are not in ``rows``."""
        ...

    def base_products(self, other_N: Tensor) -> Tensor:
        """Return ⟨θ₀, other⟩ per cell, (C, 1)."""
        ...


def open_task_vector_store(
    storage: VectorStorage,
    base: VisualCheckpoint,
    experts: Sequence[VisualCheckpoint],
    basis: Basis | None,
    shard: Shard,
    layers: LayerMap,
    device: torch.device,
) -> TaskVectorStore:
    """Open the store that ``storage`` names for one shard."""
    inputs = base, experts, basis, shard, layers
    if storage.location == "files":
        return StreamedTaskVectorStore(*inputs)
    return PinnedTaskVectorStore(storage, *inputs, device)


class PinnedTaskVectorStore:
    """Vectors that are read from the files once.

    A step reads them twice, at the speed of the memory that they are in.
    """

    def __init__(
        self,
        storage: VectorStorage,
        base: VisualCheckpoint,
        experts: Sequence[VisualCheckpoint],
        basis: Basis | None,
        shard: Shard,
        layers: LayerMap,
        device: torch.device,
    ) -> None:
        self.vectors_CKn = allocate(storage, shard.cells, len(experts), device)
        self.nbytes = self.vectors_CKn.numel() * self.vectors_CKn.element_size()
        self._layer_of_cell = layers.of_cells(shard)
        base_N = torch.zeros(shard.columns)

        def pin(piece: Piece, base_n: Tensor, rows_Kn: Tensor) -> None:
            first = piece.start - shard.start
            base_N[first : first + len(base_n)] = base_n
            store(self.vectors_CKn[first // CELL :], rows_Kn)

        for _ in stream_rows(pin, base, experts, basis, shard):
            pass
        self._base_N = base_N.to(device)

    def merge(self, lambdas_KL: Tensor, theta_N: Tensor) -> None:
        lambdas_KC = lambdas_KL.to(theta_N)[:, self._layer_of_cell]
        merge_into(theta_N, self._base_N, self.vectors_CKn, lambdas_KC)

    def inner_products(self, gradient_N: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        return inner_products(gradient_N, self.vectors_CKn)

    def base_products(self, other_N: Tensor) -> Tensor:
        return cell_products(self._base_N, other_N)


class StreamedTaskVectorStore:
    """Vectors that every step reads from the files twice, so that memory does not grow with K.

    The merge reads only the checkpoints with a coefficient.
    """

    def __init__(
        self,
        base: VisualCheckpoint,
        experts: Sequence[VisualCheckpoint],
        basis: Basis | None,
        shard: Shard,
        layers: LayerMap,
    ) -> None:
        self.nbytes = 0
        self._base, self._experts, self._basis = base, experts, basis
        self._shard, self._layers = shard, layers

    def merge(self, lambdas_KL: Tensor, theta_N: Tensor) -> None:
        experts, lambdas_KT = self._experts, self._layers.expand(lambdas_KL.float())
        if self._basis is None:
            models = lambdas_KL.any(1).nonzero().flatten().tolist()
            experts, lambdas_KT = [experts[k] for k in models], lambdas_KT[models]

        def write(piece: Piece, base_n: Tensor, rows_Kn: Tensor) -> None:
            first = piece.start - self._shard.start
            theta_n = combine(base_n, rows_Kn, lambdas_KT[:, piece.tensor])
            theta_N[first : first + len(theta_n)].copy_(theta_n)

        self._stream(write, experts)

    def inner_products(self, gradient_N: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        out_CK = torch.zeros(self._shard.cells, len(self._experts))
        # A row of a basis may depend on every model, so only raw vectors may be left out.
        models = list(range(len(self._experts)))
        if rows is not None and self._basis is None:
            models = list(rows)

        def multiply(piece: Piece, base_n: Tensor, rows_Kn: Tensor) -> None:
            cells, products_CK = self._products(piece, gradient_N, rows_Kn)
            out_CK[cells, models] = products_CK

        self._stream(multiply, [self._experts[k] for k in models])
        return out_CK

    def base_products(self, other_N: Tensor) -> Tensor:
        out_C1 = torch.zeros(self._shard.cells, 1)

        def multiply(piece: Piece, base_n: Tensor, rows_Kn: Tensor) -> None:
            cells, products_C1 = self._products(piece, other_N, base_n.unsqueeze(0))
            out_C1[cells] = products_C1

        self._stream(multiply, [])
        return out_C1

    def _stream(
        self,
        function: Callable[[Piece, Tensor, Tensor], None],
        experts: Sequence[VisualCheckpoint],
    ) -> None:
        basis = self._basis if experts else None
        for _ in stream_rows(function, self._base, experts, basis, self._shard):
            pass

    def _products(self, piece: Piece, other_N: Tensor, rows_Kn: Tensor) -> tuple[slice, Tensor]:
        """Return the cells of the shard that the piece covers, and their ⟨row, other⟩ (C, K)."""
        first = piece.start - self._shard.start
        cells = slice(first // CELL, -(-(first + rows_Kn.shape[1]) // CELL))
        rows_CKn = rows_Kn.new_zeros(cells.stop - cells.start, len(rows_Kn), CELL)
        store(rows_CKn, rows_Kn)
        other_n = other_N[cells.start * CELL : cells.stop * CELL].cpu()
        return cells, inner_products(other_n, rows_CKn)


def allocate(storage: VectorStorage, cells: int, tasks: int, device: torch.device) -> Tensor:
    """Return zeros (C, K, CELL). Raises :class:`RunError` if the disk has no room for them."""
    shape, dtype = (cells, tasks, CELL), DTYPES[storage.dtype]
    if storage.location == "disk":
        return _map_file(storage.folder, cells * tasks * CELL, dtype).view(shape)
    if storage.location == "host" and device.type == "cuda":
        return torch.zeros(shape, dtype=dtype, pin_memory=True)
    return torch.zeros(shape, dtype=dtype, device=device)


def _map_file(folder: str | None, count: int, dtype: torch.dtype) -> Tensor:
    """Return a shared mapping of an unlinked file, which the system frees with this process."""
    try:
        handle, name = tempfile.mkstemp(prefix="raymerge-vectors-", dir=folder)
    except OSError as error:
        raise RunError(
            f"vectors.folder {folder}: cannot be written: {error.strerror}; "
            "free space, or choose another folder"
        ) from error
    try:
        # Reserved now: a mapping that later finds the disk full kills the process.
        reserve_space(handle, count * dtype.itemsize)
        return torch.from_file(name, shared=True, size=count, dtype=dtype)
    except OSError as error:
        raise RunError(
            f"vectors.folder {folder or tempfile.gettempdir()}: no room for "
            f"{count * dtype.itemsize / 1e9:.1f} GB of task vectors ({error.strerror}); name "
            "another folder"
        ) from error
    finally:
        os.close(handle)
        Path(name).unlink()
