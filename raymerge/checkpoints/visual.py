"""Match a checkpoint's keys to the visual tower's tensors, and read its columns as float32.

Legend: K tasks, N columns of a shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raymerge.checkpoints.reader import Checkpoint, open_checkpoint
from raymerge.errors import CheckpointError
from raymerge.merging.layout import ParameterLayout, Piece

# A whole CLIP, one saved under DataParallel, one wrapped in an ImageEncoder, the bare tower.
PREFIXES = ("visual.", "module.visual.", "model.visual.", "")


@dataclass(frozen=True)
class VisualCheckpoint:
    """A checkpoint whose visual tensors are known to fit ``layout`` in name, shape and dtype."""

    checkpoint: Checkpoint
    layout: ParameterLayout
    prefix: str

    def read(self, tensor: int) -> Tensor:
        """Tensor ``tensor`` of the layout, flat, float32. Raises for NaN and Inf."""
        name = self.layout.names[tensor]
        values = self.checkpoint.read(self.prefix + name).reshape(-1).float()
        return require_finite(values, self.checkpoint, self.prefix + name)

    def columns(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece with its values, flat float32; only the pieces' part of a file is read."""
        for piece in pieces:
            name = self.layout.names[piece.tensor]
            offset = self.layout.offsets[piece.tensor]
            stored = self.checkpoint.read(self.prefix + name).reshape(-1)
            values = stored[piece.start - offset : piece.stop - offset].float()
            yield piece, require_finite(values, self.checkpoint, self.prefix + name)


def require_finite(values: Tensor, checkpoint: Checkpoint, key: str) -> Tensor:
    """The values, or a :class:`CheckpointError` if one of them is NaN or Inf."""
    # A sum is finite unless an entry is not (or it overflows): one pass, no temporary.
    if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: {key} holds {bad} NaN or Inf "
            f"value{'s' if bad > 1 else ''}; it cannot be merged"
        )
    return values


def require_finite_text(pretrained: VisualCheckpoint) -> None:
    """The same for every tensor beside the visual ones: the text tower makes the heads."""
    checkpoint = pretrained.checkpoint
    for key, spec in checkpoint.specs.items():
        if not key.startswith(pretrained.prefix) and spec.dtype.is_floating_point:
            require_finite(checkpoint.read(key), checkpoint, key)


def open_visual(reference: str, layout: ParameterLayout) -> VisualCheckpoint:
    """Open and check against the pretrained model's layout, from headers alone."""
    return match_visual(open_checkpoint(reference), layout)


def match_visual(checkpoint: Checkpoint, layout: ParameterLayout) -> VisualCheckpoint:
    """Raises :class:`CheckpointError` naming missing, unexpected and misshapen tensors, sorted."""
    prefix = _best_prefix(checkpoint, layout)
    keys = {prefix + name for name in layout.names}
    _require_names(checkpoint, keys, prefix)
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        spec = checkpoint.specs[prefix + name]
        if spec.shape != shape:
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: {prefix}{name} has shape {list(spec.shape)}, "
                f"the pretrained model has {list(shape)}; is it another architecture?"
            )
        if not spec.dtype.is_floating_point:
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: {prefix}{name} is {spec.dtype}, not floating point"
            )
    return VisualCheckpoint(checkpoint, layout, prefix)


def _best_prefix(checkpoint: Checkpoint, layout: ParameterLayout) -> str:
    matches = {p: sum(p + n in checkpoint.specs for n in layout.names) for p in PREFIXES}
    prefix = max(matches, key=matches.__getitem__)
    if not matches[prefix]:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: none of the model's {len(layout.names)} visual tensors "
            f"(visual.{layout.names[0]}, …) is in it; its keys start with "
            f"{', '.join(sorted(checkpoint.specs)[:3])}"
        )
    return prefix


def _require_names(checkpoint: Checkpoint, keys: set[str], prefix: str) -> None:
    missing = sorted(keys - checkpoint.specs.keys())
    unexpected = sorted(
        key
        for key, spec in checkpoint.specs.items()
        if key.startswith(prefix) and key not in keys and spec.dtype.is_floating_point
    )
    if missing or unexpected:
        parts = [_listing("missing", missing), _listing("unexpected", unexpected)]
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: does not fit the pretrained model: "
            + "; ".join(part for part in parts if part)
        )


def _listing(word: str, names: Sequence[str], limit: int = 4) -> str:
    if not names:
        return ""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} {word} ({', '.join(names[:limit])}{more})"
