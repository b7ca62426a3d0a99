"""The pretrained model's weights: opened, checked against its architecture, read by tensor.

Only the visual tower is merged; the rest of the model (its text tower, integer buffers) passes from
the pretrained file to the merged one as it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from raymerge.errors import CheckpointError, excerpt
from raymerge.merging.layout import ParameterLayout
from raymerge.models.as_open_clip import as_open_clip
from raymerge.models.checkpoints.checkpoint import SAFETENSORS_DTYPES, Checkpoint, read_tensor
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.checkpoints.recognise import prefixes_of
from raymerge.models.checkpoints.visual_tower import (
    Shapes,
    VisualCheckpoint,
    match_visual,
    require_finite,
    require_shapes,
)
from raymerge.models.clip_shapes import clip_vit_shapes
from raymerge.models.resolve import ResolvedModel

_TEXT_PARAMETERS = (
    "positional_embedding",
    "text_projection",
    "logit_scale",
    "token_embedding",
    "ln_final",
)


def open_pretrained(resolved: ResolvedModel) -> tuple[VisualCheckpoint, int]:
    """Return θ₀, checked against the architecture, and the number of text parameters beside it.

    What open_clip mends when it loads a file is mended here (``as_open_clip``). The text parameters
    counted are those that the official release leaves in its pickled encoders; ``trim_scope: full``
    counts them as zero deltas. Raises :class:`CheckpointError`.
    """
    layout, expected = model_shapes(resolved)
    checkpoint = as_open_clip(
        open_checkpoint(resolved.weights_reference), expected, resolved.model_cfg
    )
    where = f"pretrained {checkpoint.path}"
    _require_text(checkpoint, layout, expected, where)
    shapes = {key: spec.shape for key, spec in checkpoint.specs.items()}
    require_shapes(shapes, expected, where, "the architecture")
    _require_writable(checkpoint, where)
    names = checkpoint.specs.items()
    text = (spec.numel for key, spec in names if key.split(".")[0] in _TEXT_PARAMETERS)
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


def _require_text(
    checkpoint: Checkpoint, layout: ParameterLayout, expected: Shapes, where: str
) -> None:
    """Raise for an image encoder alone, such as the released zeroshot.pt: it can be an expert, but
    not the pretrained model."""
    keys = checkpoint.specs
    text = [key for key in expected if key.startswith(("transformer.", "text."))]
    for prefix in prefixes_of(keys, layout.names):
        if not text or not all(prefix + name in keys for name in layout.names):
            continue  # first, as a file may have very many prefixes
        others = [key for key in keys if not key.startswith(prefix)]
        if not prefixes_of(others, text):
            raise CheckpointError(
                f"{where}: is an image encoder without its text tower ({text[0]} and "
                f"{len(text) - 1} more tensors are missing), and the merged model is a whole CLIP; "
                "use a whole model, such as pretrained: openai, and this file as a task's "
                "checkpoint"
            )


def _require_writable(checkpoint: Checkpoint, where: str) -> None:
    """Raise for a tensor that the merged model's file could not hold."""
    for key, spec in checkpoint.specs.items():
        if spec.dtype not in SAFETENSORS_DTYPES.values():
            raise CheckpointError(
                f"{where}: {excerpt(key)} is {spec.dtype}, which safetensors does not hold; save "
                "it as float32"
            )


# --- what is not merged --------------------------------------------------------------------------


def unmerged_keys(pretrained: VisualCheckpoint) -> dict[str, str]:
    """Return open_clip's name → the key in the file, of all tensors that are not merged."""
    merged = {f"visual.{name}" for name in pretrained.layout.names}
    return {name: name for name in pretrained.checkpoint.specs if name not in merged}


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
