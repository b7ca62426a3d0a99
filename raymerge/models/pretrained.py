"""The pretrained model's weights: opened, checked against its architecture, read by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from raymerge.errors import CheckpointError
from raymerge.merging.layout import ParameterLayout
from raymerge.models.checkpoints.checkpoint import read_tensor
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.checkpoints.visual_tower import (
    PREFIXES,
    VisualCheckpoint,
    match_visual,
    require_finite,
)
from raymerge.models.clip_shapes import clip_vit_shapes
from raymerge.models.resolve import ResolvedModel

# OpenAI's own state dicts carry these numbers beside the weights; open_clip drops them as well.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


Shapes = Mapping[str, tuple[int, ...]]
"""The state dict of a model by name, in its order."""


def unmerged_keys(pretrained: VisualCheckpoint) -> dict[str, str]:
    """What is stored beside the merged tensors (the text tower, integer buffers): open_clip's own
    name → the key in the file."""
    skipped = {*_NOT_WEIGHTS, *(f"visual.{name}" for name in pretrained.layout.names)}
    names = {key.removeprefix("module."): key for key in pretrained.checkpoint.specs}
    return {name: key for name, key in names.items() if name not in skipped}


def whole_bytes(pretrained: VisualCheckpoint) -> int:
    """Of the merged model's file, about: float32 merged tensors, all else as it is stored."""
    specs = pretrained.checkpoint.specs
    rest = [specs[key] for key in unmerged_keys(pretrained).values()]
    stored = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in rest)
    return 4 * pretrained.layout.parameters + stored


def unmerged_tensors(pretrained: VisualCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """Their names and values, as they are stored, one at a time. Raises :class:`CheckpointError`
    for NaN and Inf."""
    for name, key in unmerged_keys(pretrained).items():
        tensor = read_tensor(pretrained.checkpoint, key)
        require_finite(tensor, pretrained.checkpoint, key)
        yield name, tensor


def open_pretrained(resolved: ResolvedModel) -> tuple[VisualCheckpoint, int]:
    """θ₀, checked against the architecture, and the size of the text parameters beside it.

    The text parameters counted are those that the official release leaves in its pickled encoders;
    ``trim_scope: full`` counts them as zero deltas. Raises :class:`CheckpointError`.
    """
    layout, expected = model_shapes(resolved)
    checkpoint = open_checkpoint(resolved.weights)
    stored = {k.removeprefix("module."): s for k, s in checkpoint.specs.items()}
    _require_whole(checkpoint.path, {k: s.shape for k, s in stored.items()}, expected)
    leftovers = sum(
        math.prod(spec.shape)
        for key, spec in stored.items()
        if key.split(".")[0]
        in ("positional_embedding", "text_projection", "logit_scale", "token_embedding", "ln_final")
    )
    return match_visual(checkpoint, layout), leftovers


def model_shapes(resolved: ResolvedModel) -> tuple[ParameterLayout, Shapes]:
    """The layout of the visual tower, and the shapes of the whole model's state dict."""
    expected = clip_vit_shapes(resolved.model_cfg)
    if expected is not None:
        visual = {k: s for k, s in expected.items() if k.startswith("visual.")}
        names = tuple(name.removeprefix("visual.") for name in visual)
        return ParameterLayout(names, tuple(visual.values())), expected
    from raymerge.models.skeleton import build_skeleton

    skeleton = build_skeleton(resolved, "meta")
    expected = {k: tuple(t.shape) for k, t in skeleton.state_dict().items()}
    return ParameterLayout.of(skeleton.visual.state_dict()), expected


def _require_whole(
    path: Path, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    _require_text(path, stored, expected)
    missing = sorted(expected.keys() - stored.keys())
    unexpected = sorted(stored.keys() - expected.keys() - set(_NOT_WEIGHTS))
    if missing or unexpected:
        first = f"missing {missing[0]}" if missing else f"unexpected {unexpected[0]}"
        raise CheckpointError(
            f"pretrained {path}: does not fit the architecture: {len(missing)} tensors missing, "
            f"{len(unexpected)} unexpected ({first}); it must be a whole open_clip model"
        )
    for key, shape in expected.items():
        if stored[key] != shape:
            raise CheckpointError(
                f"pretrained {path}: {key} has shape {list(stored[key])}, the architecture "
                f"wants {list(shape)}"
            )


def _require_text(
    path: Path, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Image encoders alone, such as the released zeroshot.pt, are experts and no whole model."""
    visual = [key.removeprefix("visual.") for key in expected if key.startswith("visual.")]
    text = [key for key in expected if key.startswith(("transformer.", "text."))]
    towers = [prefix for prefix in PREFIXES if all(prefix + name in stored for name in visual)]
    endings = (key.removeprefix("model.") for key in stored)
    if towers and text and not set(text) & set(endings):
        raise CheckpointError(
            f"pretrained {path}: is an image encoder without its text tower ({text[0]} and "
            f"{len(text) - 1} more tensors are missing), and the merged model is a whole CLIP; use "
            "a whole model, such as pretrained: openai, and this file as a task's checkpoint"
        )
