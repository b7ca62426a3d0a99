"""The warnings about checkpoints: what a merge leaves out of them, and what to doubt.

Nothing here is an error: the merge goes on. Values are compared on samples of the files, which
costs milliseconds for each expert. The warnings also stand in the model card, which is published:
they name local files without their folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import torch
from torch import Tensor

from raymerge.errors import excerpt
from raymerge.files.urls import is_remote, redact_url
from raymerge.merging.layout import Piece
from raymerge.models.checkpoints.locate import split_part
from raymerge.models.checkpoints.recognise import is_training_state
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint, choice_of, listing
from raymerge.models.pretrained import unmerged_keys

_SAMPLE = 1 << 16
_TENSORS = 16
_START = 64  # numbers of each tensor that tell two models apart
_BLOCK = 1 << 20
_FOREIGN = 0.5
"""A task vector is suspect from this part of the pretrained model's norm on; of CLIPs fine-tuned
with the usual recipes it has a few hundredths."""


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint after it was opened and found to fit: a task's, or the pretrained model's."""

    owner: str
    reference: str
    visual: VisualCheckpoint

    @property
    def place(self) -> str:
        """The reference without what is private: folders of this machine, passwords."""
        reference = split_part(self.reference)[0]
        if is_remote(reference) or reference.startswith("hf-hub:"):
            return redact_url(reference)
        return PurePath(reference).name or reference


def expert_warnings(
    model: OpenedCheckpoint, experts: Sequence[OpenedCheckpoint], *, samples: bool = True
) -> tuple[str, ...]:
    """Return a sentence for whatever a user would want to know of these checkpoints.

    ``samples``: whether to compare numbers too, not only names.
    """
    pretrained = model.visual
    warnings = [choice_warning(model)]
    for expert in experts:
        warnings += [choice_warning(expert), _left_out(pretrained, expert)]
        if samples:
            warnings += [_text_tower(pretrained, expert), _distance(pretrained, expert)]
    if samples:
        warnings += _twice(experts)
    return tuple(warning for warning in warnings if warning)


def choice_warning(opened: OpenedCheckpoint) -> str:
    """Say which of several models in one file is taken."""
    choice = choice_of(opened.visual, opened.place)
    return f"{opened.owner}: {choice}" if choice else ""


# --- what is left out ----------------------------------------------------------------------------


def _text_tower(pretrained: VisualCheckpoint, expert: OpenedCheckpoint) -> str:
    """Say that an expert's text tower was fine-tuned as well, which a merge leaves out."""
    stored, root = expert.visual.checkpoint, expert.visual.prefix.removesuffix("visual.")
    base, changed, compared = pretrained.checkpoint, 0, 0
    for name, key in unmerged_keys(pretrained).items():
        own, theirs = stored.specs.get(root + name), base.specs[key]
        is_scale = name in ("logit_scale", "logit_bias")
        if own is None or own.shape != theirs.shape or not own.dtype.is_floating_point or is_scale:
            continue
        count, compared = min(_SAMPLE, own.numel), compared + 1
        ours_n, theirs_n = torch.empty(count, dtype=own.dtype), torch.empty(count)
        stored.fill(root + name, 0, ours_n)
        base.fill(key, 0, theirs_n)
        # In the coarser of the two number types, storing alone is no change.
        coarse = min(own.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        changed += not torch.equal(ours_n.to(coarse), theirs_n.to(own.dtype).to(coarse))
    if not changed:
        return ""
    return (
        f"{expert.owner}: the text tower in {expert.place} was fine-tuned too ({changed} of "
        f"{compared} tensors differ from the pretrained model's); only the image encoder is merged "
        "and the text tower stays the pretrained one. Give the expert's own head in "
        "tasks[].head if its scores fall"
    )


def _left_out(pretrained: VisualCheckpoint, expert: OpenedCheckpoint) -> str:
    """Say which tensors beside the two towers are not merged, such as a trained classifier."""
    stored, tower = expert.visual.checkpoint, expert.visual.prefix
    if stored.kind == "lora":
        return ""
    root = tower.removesuffix("visual.")
    known = {root + name for name in unmerged_keys(pretrained)}
    other_models = tuple(
        prefix.removesuffix("visual.").removesuffix("vision_model.")
        for prefix in expert.visual.others
    )
    left = [
        key
        for key, spec in {**stored.specs, **getattr(stored, "outside", {})}.items()
        if not key.startswith(tower) and key not in known
        if not any(model and key.startswith(model) for model in other_models)
        if spec.dtype.is_floating_point and not is_training_state(key)
    ]
    if not left:
        return ""
    return (
        f"{expert.owner}: {expert.place} also holds {listing([excerpt(key) for key in left])}: not "
        "in the image encoder and not in the pretrained model, so left out"
    )


# --- what to doubt -------------------------------------------------------------------------------


def _distance(pretrained: VisualCheckpoint, expert: OpenedCheckpoint) -> str:
    """Say that an expert is the pretrained model itself, or so far from it that it had another
    base."""
    pieces = _samples(pretrained)
    base_n, own_n = _read(pretrained, pieces), _read(expert.visual, pieces)
    norm = float(torch.linalg.vector_norm(base_n))
    ratio = float(torch.linalg.vector_norm(own_n - base_n)) / norm if norm else 0.0
    if not ratio and _is_same(pretrained, expert.visual):
        return (
            f"{expert.owner}: {expert.place} holds the pretrained model's own weights, so its "
            "task vector is zero; check tasks[].checkpoint"
        )
    if not ratio > _FOREIGN:
        return ""
    return (
        f"{expert.owner}: {expert.place} differs from the pretrained model by {ratio:.0%} of "
        "its norm, where fine-tuning moves a few per cent: it was probably fine-tuned from other "
        "weights; check model.pretrained"
    )


def _twice(experts: Sequence[OpenedCheckpoint]) -> Iterator[str]:
    """Say which tasks have the same weights, by whatever file: they would count twice."""
    first: dict[bytes, OpenedCheckpoint] = {}
    for expert in experts:
        starts = [
            Piece(piece.tensor, piece.start, min(piece.stop, piece.start + _START))
            for piece in expert.visual.layout.shard(0, 1).pieces()
        ]
        identity = _read(expert.visual, starts).numpy().tobytes()
        other = first.setdefault(identity, expert)
        if other is not expert and _is_same(other.visual, expert.visual):
            places = dict.fromkeys((other.place, expert.place))
            yield (
                f"{other.owner} and {expert.owner} have the same weights ({' and '.join(places)}), "
                "which count twice in the merge; check tasks[].checkpoint"
            )


def _is_same(one: VisualCheckpoint, other: VisualCheckpoint) -> bool:
    """Return whether two towers are equal in every number; both are read until they differ."""
    for piece in one.layout.shard(0, 1).pieces():
        for start in range(piece.start, piece.stop, _BLOCK):
            part = [Piece(piece.tensor, start, min(piece.stop, start + _BLOCK))]
            if not torch.equal(_read(one, part), _read(other, part)):
                return False
    return True


def _samples(pretrained: VisualCheckpoint) -> list[Piece]:
    """Return the first numbers of tensors that are spread over the tower."""
    pieces = pretrained.layout.shard(0, 1).pieces()
    every = max(1, len(pieces) // _TENSORS)
    return [
        Piece(piece.tensor, piece.start, min(piece.stop, piece.start + _SAMPLE))
        for piece in pieces[::every]
    ]


def _read(visual: VisualCheckpoint, pieces: Sequence[Piece]) -> Tensor:
    parts = [torch.empty(piece.stop - piece.start) for piece in pieces]
    for piece, part_n in zip(pieces, parts, strict=True):
        visual.fill(piece, part_n)
    return torch.cat(parts)
