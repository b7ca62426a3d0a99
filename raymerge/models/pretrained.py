"""The pretrained model's weights: opened, checked against its architecture, read by tensor.

Only the visual tower is merged; the rest of the model (its text tower, integer buffers) passes from
the pretrained file to the merged one as it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from raymerge.errors import CheckpointError
from raymerge.merging.layout import ParameterLayout
from raymerge.models.checkpoints.checkpoint import read_tensor
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.checkpoints.visual_tower import (
    PREFIXES,
    Shapes,
    VisualCheckpoint,
    match_visual,
    require_finite,
    require_shapes,
)
from raymerge.models.clip_shapes import clip_vit_shapes
from raymerge.models.resolve import ResolvedModel

# OpenAI's own state dicts carry these numbers beside the weights; open_clip drops them as well.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
_TEXT_PARAMETERS = (
    "positional_embedding",
    "text_projection",
    "logit_scale",
    "token_embedding",
    "ln_final",
)


def open_pretrained(resolved: ResolvedModel) -> tuple[VisualCheckpoint, int]:
    """Return θ₀, checked against the architecture, and the number of text parameters beside it.

    The text parameters counted are those that the official release leaves in its pickled encoders;
    ``trim_scope: full`` counts them as zero deltas. Raises :class:`CheckpointError`.
    """
    layout, expected = model_shapes(resolved)
    checkpoint = open_checkpoint(resolved.weights)
    specs = {key.removeprefix("module."): spec for key, spec in checkpoint.specs.items()}
    shapes = {key: spec.shape for key, spec in specs.items() if key not in _NOT_WEIGHTS}
    where = f"pretrained {checkpoint.path}"
    _require_text(shapes, expected, where)
    require_shapes(shapes, expected, where, "the architecture")
    text = (spec.numel for key, spec in specs.items() if key.split(".")[0] in _TEXT_PARAMETERS)
    return match_visual(checkpoint, layout), sum(text)


def model_shapes(resolved: ResolvedModel) -> tuple[ParameterLayout, Shapes]:
    """Return the layout of the visual tower, and the shapes of the whole model's state dict."""
    shapes = clip_vit_shapes(resolved.model_cfg)
    if shapes is not None:
        visual = {key: shape for key, shape in shapes.items() if key.startswith("visual.")}
        names = tuple(name.removeprefix("visual.") for name in visual)
        return ParameterLayout(names, tuple(visual.values())), shapes
    from raymerge.models.skeleton import build_skeleton

    skeleton = build_skeleton(resolved, "meta")
    shapes = {key: tuple(tensor.shape) for key, tensor in skeleton.state_dict().items()}
    return ParameterLayout.of(skeleton.visual.state_dict()), shapes


def _require_text(shapes: Shapes, expected: Shapes, where: str) -> None:
    """Raise for an image encoder alone, such as the released zeroshot.pt: it can be an expert, but
    not the pretrained model."""
    visual = [key.removeprefix("visual.") for key in expected if key.startswith("visual.")]
    text = [key for key in expected if key.startswith(("transformer.", "text."))]
    has_tower = any(all(prefix + name in shapes for name in visual) for prefix in PREFIXES)
    names = (key.removeprefix("model.") for key in shapes)
    if has_tower and text and not set(text) & set(names):
        raise CheckpointError(
            f"{where}: is an image encoder without its text tower ({text[0]} and {len(text) - 1} "
            "more tensors are missing), and the merged model is a whole CLIP; use a whole model, "
            "such as pretrained: openai, and this file as a task's checkpoint"
        )


# --- what is not merged --------------------------------------------------------------------------


def unmerged_keys(pretrained: VisualCheckpoint) -> dict[str, str]:
    """Return open_clip's name → the key in the file, of all tensors that are not merged."""
    skipped = {*_NOT_WEIGHTS, *(f"visual.{name}" for name in pretrained.layout.names)}
    names = {key.removeprefix("module."): key for key in pretrained.checkpoint.specs}
    return {name: key for name, key in names.items() if name not in skipped}


def unmerged_tensors(pretrained: VisualCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values of the tensors that are not merged, as they are stored.

    Raises :class:`CheckpointError` for NaN and Inf.
    """
    for name, key in unmerged_keys(pretrained).items():
        tensor = read_tensor(pretrained.checkpoint, key)
        require_finite(tensor, pretrained.checkpoint, key)
        yield name, tensor


def whole_bytes(pretrained: VisualCheckpoint) -> int:
    """Return the size of the merged model's file, about: merged tensors in float32, all others as
    they are stored."""
    specs = pretrained.checkpoint.specs
    unmerged = sum(specs[key].nbytes for key in unmerged_keys(pretrained).values())
    return 4 * pretrained.layout.parameters + unmerged
