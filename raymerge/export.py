"""The merged model as a folder that open_clip loads, built tensor by tensor from the files.

Legend: K tasks, T tensors, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from raymerge.checkpoints.task_vectors import task_vector_pieces
from raymerge.checkpoints.visual import VisualCheckpoint
from raymerge.files import write_atomically, write_text
from raymerge.merging.layout import LayerMap
from raymerge.merging.merge import merge_into
from raymerge.merging.ties import TiesStatistics
from raymerge.models import CONFIG_FILE, WEIGHTS_FILE, ResolvedModel, whole_state_dict


def merged_visual(
    pretrained: VisualCheckpoint,
    experts: Sequence[VisualCheckpoint],
    lambdas_KL: Tensor,
    layers: LayerMap,
    ties: TiesStatistics | None,
) -> Tensor:
    """θ = θ₀ + Σ λ V as one flat float32 vector (P,), one tensor of each expert at a time."""
    pieces = pretrained.layout.shard(0, 1).pieces()
    lambdas_KT = layers.expand(lambdas_KL.float())
    theta_P = torch.empty(pretrained.layout.numel)
    for piece, base_n, vectors_Kn in task_vector_pieces(pretrained, experts, pieces):
        vectors_Kn = vectors_Kn if ties is None else ties.phi(vectors_Kn, piece.tensor)
        out_n = theta_P[piece.start : piece.stop]
        merge_into(out_n, base_n, vectors_Kn, lambdas_KT, [piece], piece.start)
    return theta_P


def write_model(
    folder: Path, resolved: ResolvedModel, pretrained: VisualCheckpoint, theta_P: Tensor
) -> None:
    """``open_clip_config.json`` and ``open_clip_model.safetensors``: merged visual, same text."""
    state = whole_state_dict(pretrained.checkpoint)
    for name, view in pretrained.layout.views(theta_P).items():
        state[f"visual.{name}"] = view
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    write_text(folder / CONFIG_FILE, resolved.config_json)
    write_atomically(
        folder / WEIGHTS_FILE, lambda path: save_file(state, path, metadata={"format": "pt"})
    )
