"""Match a checkpoint's keys to the visual tower's tensors, and read its columns.

Legend: n columns of one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raymerge.errors import CheckpointError
from raymerge.merging.layout import ParameterLayout, Piece
from raymerge.models.checkpoints.checkpoint import Checkpoint, Partial
from raymerge.models.checkpoints.opening import open_checkpoint

# A whole CLIP, one saved under DataParallel, one wrapped in an ImageEncoder, the bare tower.
PREFIXES = ("visual.", "module.visual.", "model.visual.", "")


@dataclass(frozen=True)
class VisualCheckpoint:
    """A checkpoint whose visual tensors are known to fit ``layout`` in name, shape and dtype."""

    checkpoint: Checkpoint
    layout: ParameterLayout
    prefix: str

    def read(self, piece: Piece, out_n: Tensor) -> None:
        """Fill ``out_n`` (n,) with the piece's columns. Raises for NaN and Inf."""
        self.fill(piece, out_n)
        self.require_finite(piece, out_n)

    def flat(self, columns: int | None = None) -> Tensor:
        """θ on the flat grid, zero-padded to ``columns`` (default P). Raises for NaN and Inf."""
        theta_P = torch.zeros(self.layout.columns if columns is None else columns)
        for piece in self.layout.shard(0, 1).pieces():
            self.read(piece, theta_P[piece.start : piece.stop])
        return theta_P

    def fill(self, piece: Piece, out_n: Tensor) -> None:
        """The same without a look at the values."""
        start = piece.start - self.layout.offsets[piece.tensor]
        self.checkpoint.fill(self._key(piece), start, out_n)

    def require_finite(self, piece: Piece, values_n: Tensor) -> None:
        """Raise :class:`CheckpointError` if one of the piece's values is NaN or Inf."""
        require_finite(values_n, self.checkpoint, self._key(piece))

    def _key(self, piece: Piece) -> str:
        return self.prefix + self.layout.names[piece.tensor]


def require_finite(values: Tensor, checkpoint: Checkpoint, key: str) -> None:
    """Raise :class:`CheckpointError` if one of the values (of any dtype) is NaN or Inf."""
    if values.is_floating_point() and not all_finite(values):
        bad = int((~torch.isfinite(values)).sum())
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: {key} holds {bad} NaN or Inf "
            f"value{'s' if bad > 1 else ''}; it cannot be merged"
        )


def all_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or Inf."""
    # A sum is finite unless an entry is not (or it overflows): one pass, no temporary.
    return bool(torch.isfinite(values.sum()) or torch.isfinite(values).all())


def open_visual(
    reference: str, layout: ParameterLayout, pretrained: VisualCheckpoint | None = None
) -> VisualCheckpoint:
    """Open and check against the pretrained model's layout, from headers alone.

    ``pretrained`` gives what the file leaves to it: all that an adapter does not change, and the
    projection of a tower that has none.
    """
    return match_visual(open_checkpoint(reference), layout, pretrained)


def match_visual(
    checkpoint: Checkpoint, layout: ParameterLayout, pretrained: VisualCheckpoint | None = None
) -> VisualCheckpoint:
    """Raises :class:`CheckpointError` naming missing, unexpected and misshapen tensors, sorted."""
    if isinstance(checkpoint, Partial):
        if pretrained is not None:
            checkpoint = checkpoint.over(pretrained.checkpoint, pretrained.prefix)
        elif checkpoint.kind == "lora":
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: is a LoRA adapter, which changes a pretrained "
                "model and is none; give the whole model here"
            )
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
