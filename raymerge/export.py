"""The merged model as a folder that open_clip loads, streamed from the files into the file.

Legend: K tasks, T tensors, L layers, n columns of one part of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from raymerge.architecture import unmerged_keys, unmerged_tensors
from raymerge.checkpoints.reader import TensorSpec
from raymerge.checkpoints.task_vectors import stream
from raymerge.checkpoints.visual import VisualCheckpoint, all_finite
from raymerge.checkpoints.writer import SafetensorsWriter
from raymerge.errors import UserError
from raymerge.merging.layout import LayerMap, Piece
from raymerge.merging.merge import combine
from raymerge.merging.ties import TiesStatistics


def write_merged(
    path: Path,
    pretrained: VisualCheckpoint,
    experts: Sequence[VisualCheckpoint],
    lambdas_KL: Tensor,
    layers: LayerMap,
    ties: TiesStatistics | None,
) -> None:
    """Write the whole model: θ = θ₀ + Σ λ V in float32 as ``visual.*``, all else as it is stored.

    Only a block of each model is held at a time. Raises :class:`UserError` where a number is not
    finite, and :class:`OSError` when the disk is full; then ``path`` is of no use.
    """
    layout, stored = pretrained.layout, pretrained.checkpoint.specs
    specs = {name: stored[key] for name, key in unmerged_keys(pretrained).items()}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        specs[f"visual.{name}"] = TensorSpec(shape, torch.float32)
    lambdas_KT = layers.expand(lambdas_KL.float())
    with SafetensorsWriter(path, specs) as writer:
        for name, tensor in unmerged_tensors(pretrained):
            writer.write(name, 0, tensor)

        def merge(piece: Piece, base_n: Tensor, vectors_Kn: Tensor) -> None:
            t = piece.tensor
            vectors_Kn = vectors_Kn if ties is None else ties.phi(vectors_Kn, t)
            theta_n = combine(base_n, vectors_Kn, lambdas_KT[:, t])
            if not all_finite(theta_n):
                raise UserError("the merged weights overflow: the coefficients are too large")
            writer.write(f"visual.{layout.names[t]}", piece.start - layout.offsets[t], theta_n)

        for _ in stream(merge, pretrained, experts, layout.shard(0, 1).pieces()):
            pass
