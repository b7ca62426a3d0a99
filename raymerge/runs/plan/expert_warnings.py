"""The warnings about experts: what a merge leaves out of them, and what to doubt.

Nothing here is an error: the merge goes on. Values are compared on samples of the files, which
costs milliseconds for each expert.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raymerge.errors import excerpt
from raymerge.merging.layout import Piece
from raymerge.models.checkpoints.locate import files_of
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint
from raymerge.models.pretrained import unmerged_keys

_SAMPLE = 1 << 16
_TENSORS = 16
_FILE_SAMPLES = 64
_FILE_SAMPLE_BYTES = 4096
_FOREIGN = 0.5
"""A task vector is suspect from this part of the pretrained model's norm on; of CLIPs fine-tuned
with the usual recipes it has a few hundredths."""


@dataclass(frozen=True)
class OpenedExpert:
    """A task's expert after it was opened and found to fit."""

    task: str
    reference: str
    visual: VisualCheckpoint


def expert_warnings(
    pretrained: VisualCheckpoint, experts: Sequence[OpenedExpert], *, samples: bool = True
) -> tuple[str, ...]:
    """Return a sentence for whatever a user would want to know of these experts.

    ``samples``: whether to compare numbers too, not only names.
    """
    warnings = []
    for expert in experts:
        warnings += [_choice(expert), _left_out(pretrained, expert)]
        if samples:
            warnings += [_text_tower(pretrained, expert), _distance(pretrained, expert)]
    if samples:
        warnings += _twice(experts)
    return tuple(warning for warning in warnings if warning)


def _choice(expert: OpenedExpert) -> str:
    """Say which of several models in one file is merged."""
    visual = expert.visual
    if not visual.others:
        return ""
    parts = [prefix.removesuffix("visual.").rstrip(".") for prefix in visual.others]
    place = expert.reference.partition("#")[0]
    return (
        f"{expert.task}: of {place} the model under {visual.prefix}* is merged; it also holds "
        f"{', '.join(f'{prefix}*' for prefix in visual.others)} (to take that one write "
        f"{place}#{parts[0]})"
    )


def _text_tower(pretrained: VisualCheckpoint, expert: OpenedExpert) -> str:
    """Say that an expert's text tower was fine-tuned as well, which a merge leaves out."""
    stored, root = expert.visual.checkpoint, expert.visual.prefix.removesuffix("visual.")
    base, changed, compared = pretrained.checkpoint, 0, 0
    for name, key in unmerged_keys(pretrained).items():
        own, theirs = stored.specs.get(root + name), base.specs[key]
        if own is None or own.shape != theirs.shape or not own.dtype.is_floating_point:
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
        f"{expert.task}: the text tower in {expert.reference} was fine-tuned too ({changed} of "
        f"{compared} tensors differ from the pretrained model's); only the image encoder is merged "
        "and the text tower stays the pretrained one. Give the expert's own head in "
        "tasks[].head if its scores fall"
    )


def _left_out(pretrained: VisualCheckpoint, expert: OpenedExpert) -> str:
    """Say which tensors beside the two towers are not merged, such as a trained classifier."""
    stored, tower = expert.visual.checkpoint, expert.visual.prefix
    root = tower.removesuffix("visual.")
    if stored.kind == "lora" or not tower:
        return ""
    known = {root + name for name in unmerged_keys(pretrained)}
    left = [
        key
        for key, spec in stored.specs.items()
        if key.startswith(root) and not key.startswith(tower) and key not in known
        if spec.dtype.is_floating_point and spec.numel > 1
    ]
    if not left or any(other.startswith(root) for other in expert.visual.others):
        return ""
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return (
        f"{expert.task}: {len(left)} tensors of {expert.reference} belong to no tower and are left "
        f"out ({', '.join(map(excerpt, left[:3]))}{more})"
    )


def _distance(pretrained: VisualCheckpoint, expert: OpenedExpert) -> str:
    """Say that an expert is so far from the pretrained model that it had another base."""
    pieces = _samples(pretrained)
    base_n, own_n = _read(pretrained, pieces), _read(expert.visual, pieces)
    norm = float(torch.linalg.vector_norm(base_n))
    ratio = float(torch.linalg.vector_norm(own_n - base_n)) / norm if norm else 0.0
    if not ratio > _FOREIGN:
        return ""
    return (
        f"{expert.task}: {expert.reference} differs from the pretrained model by {ratio:.0%} of "
        "its norm, where fine-tuning moves a few per cent: it was probably fine-tuned from other "
        "weights; check model.pretrained"
    )


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


# --- files given twice ---------------------------------------------------------------------------


def _twice(experts: Sequence[OpenedExpert]) -> Iterator[str]:
    """Say which tasks have the same weights: the task would count twice."""
    first: dict[object, OpenedExpert] = {}
    for expert in experts:
        identity = _identity(expert.visual)
        other = first.setdefault(identity, expert)
        if other is not expert:
            yield (
                f"{other.task} and {expert.task} have the same checkpoint ({other.reference} and "
                f"{expert.reference}), so it counts twice in the merge; check tasks[].checkpoint"
            )


def _identity(visual: VisualCheckpoint) -> object:
    """Return what two opened experts share only if their weights are the same."""
    files = files_of(visual.checkpoint.path)
    return visual.prefix, tuple((file.stat().st_size, _sample_digest(file)) for file in files)


def _sample_digest(file: Path) -> str:
    """Return a digest of blocks that are spread over a file; a fine-tuning changes every block."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        for i in range(_FILE_SAMPLES):
            stream.seek(max(0, size - _FILE_SAMPLE_BYTES) * i // max(1, _FILE_SAMPLES - 1))
            digest.update(stream.read(_FILE_SAMPLE_BYTES))
    return digest.hexdigest()
