"""Match a checkpoint's keys to the tensors of the visual tower, and read its columns.

Every checkpoint that takes part in a merge goes through here: its names, shapes and dtypes are
checked against the pretrained model's from headers alone, before a tensor is read.

Legend: n columns of one piece.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raymerge.errors import CheckpointError, excerpt
from raymerge.merging.layout import ParameterLayout, Piece
from raymerge.models.checkpoints.checkpoint import (
    SAFETENSORS_DTYPES,
    Checkpoint,
    Partial,
    chosen_prefix,
    other_prefixes,
)
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.checkpoints.recognise import prefixes_of

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the tensors of a state dict by name, in its order."""


@dataclass(frozen=True)
class VisualCheckpoint:
    """A checkpoint whose visual tensors fit ``layout`` in name, shape and dtype."""

    checkpoint: Checkpoint
    layout: ParameterLayout
    prefix: str
    chosen: str = ""
    """The prefix of its keys in the file."""
    others: tuple[str, ...] = ()
    """The prefixes of other models in the file, which are not read."""

    def read(self, piece: Piece, out_n: Tensor) -> None:
        """Fill ``out_n`` (n,) with a piece's columns. Raises :class:`CheckpointError` for NaN and
        Inf."""
        self.fill(piece, out_n)
        self.require_finite(piece, out_n)

    def flat(self, columns: int | None = None) -> Tensor:
        """Return θ on the flat grid, zero-padded to ``columns`` (default P). Raises
        :class:`CheckpointError` for NaN and Inf."""
        theta_P = torch.zeros(self.layout.columns if columns is None else columns)
        for piece in self.layout.shard(0, 1).pieces():
            self.read(piece, theta_P[piece.start : piece.stop])
        return theta_P

    def fill(self, piece: Piece, out_n: Tensor) -> None:
        """Fill ``out_n`` (n,) with a piece's columns, without checking the values."""
        start = piece.start - self.layout.offsets[piece.tensor]
        self.checkpoint.fill(self._key(piece), start, out_n)

    def require_finite(self, piece: Piece, values_n: Tensor) -> None:
        """Raise :class:`CheckpointError` if one of the piece's values is NaN or Inf."""
        require_finite(values_n, self.checkpoint, self._key(piece))

    def _key(self, piece: Piece) -> str:
        return self.prefix + self.layout.names[piece.tensor]


def is_mergeable(dtype: torch.dtype) -> bool:
    """Return whether a dtype holds real numbers that a merge can read and write."""
    return dtype.is_floating_point and dtype in SAFETENSORS_DTYPES.values()


def require_finite(values: Tensor, checkpoint: Checkpoint, key: str) -> None:
    """Raise :class:`CheckpointError` if one of the values (of any dtype) is NaN or Inf."""
    if values.dtype.itemsize < 2:
        values = values.float()  # torch sums no float8
    if values.is_floating_point() and not all_finite(values):
        count = int((~torch.isfinite(values)).sum())
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: {key} holds {count} NaN or Inf "
            f"value{'s' if count > 1 else ''}; it cannot be merged: fine-tune it again"
        )


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or Inf."""
    # A sum is finite unless a value is not (or it overflows): one pass, no temporary.
    return bool(torch.isfinite(values.sum()) or torch.isfinite(values).all())


def open_visual(
    reference: str, layout: ParameterLayout, pretrained: VisualCheckpoint | None = None
) -> VisualCheckpoint:
    """Open a checkpoint and check it against the pretrained model's layout, from headers alone.

    ``pretrained`` provides what a partial checkpoint lacks: all that an adapter does not change,
    and the projection of a tower that has none. Raises :class:`CheckpointError`.
    """
    return match_visual(open_checkpoint(reference), layout, pretrained)


def match_visual(
    checkpoint: Checkpoint, layout: ParameterLayout, pretrained: VisualCheckpoint | None = None
) -> VisualCheckpoint:
    """Check an open checkpoint as :func:`open_visual` does."""
    if isinstance(checkpoint, Partial):
        if pretrained is not None:
            checkpoint = checkpoint.complete(pretrained.checkpoint, pretrained.prefix)
        elif checkpoint.kind == "lora":
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: is a LoRA adapter, which changes a pretrained "
                "model and is none; give the whole model here"
            )
    # Integer buffers may come and go between versions; they are not merged.
    prefix, *others = _prefixes(checkpoint, layout)
    expected = {prefix + name: s for name, s in zip(layout.names, layout.shapes, strict=True)}
    shapes = {
        key: spec.shape
        for key, spec in checkpoint.specs.items()
        if key in expected or (key.startswith(prefix) and spec.dtype.is_floating_point)
    }
    require_shapes(shapes, expected, f"checkpoint {checkpoint.path}", "the pretrained model")
    for key in expected:
        dtype = checkpoint.specs[key].dtype
        if not is_mergeable(dtype):
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: {key} is {dtype}, which cannot be merged; save it "
                "as float32, float16 or bfloat16"
            )
    chosen = chosen_prefix(checkpoint) or prefix
    return VisualCheckpoint(
        checkpoint, layout, prefix, chosen, (*others, *other_prefixes(checkpoint))
    )


def choice_of(visual: VisualCheckpoint, place: str) -> str:
    """Return which of several models in a file was taken; empty where it holds only one.

    ``place``: the file, as the sentence is to name it.
    """
    if not visual.others:
        return ""
    part = re.sub(r"(?:^|\.)(?:visual|vision_model)\.$|\.$", "", visual.others[0])
    more = [f"{_shortened(prefix)}*" for prefix in visual.others]
    remedy = f" (to take the other one write {place}#{part})" if part else ""
    return (
        f"of {place} the model under {_shortened(visual.chosen)}* is taken; it also holds "
        f"{listing(more)}{remedy}"
    )


def _shortened(prefix: str) -> str:
    return prefix if len(prefix) <= 60 else f"{prefix[:28]}…{prefix[-28:]}"


def listing(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"


def _prefixes(checkpoint: Checkpoint, layout: ParameterLayout) -> list[str]:
    """Return the prefixes under which the most tensors are present, the one to take first."""
    prefixes = prefixes_of(checkpoint.specs, layout.names)
    if not prefixes:
        keys = ", ".join(excerpt(key) for key in sorted(checkpoint.specs)[:3])
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: none of the model's {len(layout.names)} visual tensors "
            f"(visual.{layout.names[0]}, …) is in it (it holds {keys}, …); give the state dict of "
            "a model that was fine-tuned from the pretrained one"
        )
    return prefixes


def require_shapes(shapes: Shapes, expected: Shapes, where: str, owner: str) -> None:
    """Raise :class:`CheckpointError` unless the names and shapes are the expected ones.

    ``where``: what an error starts with. ``owner``: whose the expected shapes are.
    """
    missing = _listing("missing", sorted(expected.keys() - shapes.keys()))
    unexpected = _listing("unexpected", sorted(shapes.keys() - expected.keys()))
    if missing or unexpected:
        difference = "; ".join(part for part in (missing, unexpected) if part)
        raise CheckpointError(
            f"{where}: does not fit {owner}: {difference}; is it of another model?"
        )
    for key, shape in expected.items():
        if shapes[key] != shape:
            raise CheckpointError(
                f"{where}: {key} has shape {list(shapes[key])}, {owner} has {list(shape)}; "
                f"{_shape_hint(key, shapes[key], shape)}"
            )


def _shape_hint(key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Return the probable reason of a shape that does not fit, and the remedy."""
    if key.endswith("visual.positional_embedding") and shape[1:] == expected[1:]:
        sides = [math.isqrt(max(0, count - 1)) for count in (shape[0], expected[0])]
        return (
            f"its weights are for images of {sides[0]} x {sides[0]} patches and the model's are "
            f"{sides[1]} x {sides[1]}: fine-tune at the model's resolution, or choose the "
            "architecture of that one"
        )
    return "is it another architecture? choose the one that it was fine-tuned from"


def _listing(word: str, names: Sequence[str]) -> str:
    return f"{len(names)} {word} ({listing(names, 4)})" if names else ""
