"""A pretrained model's weights as open_clip loads them: what it mends is mended here.

open_clip 3.3 (``load_checkpoint``) takes weights that differ from the model in small ways: wrapped
names, text names of before its ``CustomTextCLIP``, a scale of shape [1], positions of another
resolution. A base that it accepts is a base here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from raymerge.errors import CheckpointError
from raymerge.models.checkpoints.checkpoint import (
    Checkpoint,
    TensorSpec,
    ViewCheckpoint,
    chosen_prefix,
    other_prefixes,
    read_tensor,
)
from raymerge.models.checkpoints.recognise import prefixes_of
from raymerge.models.checkpoints.visual_tower import Shapes

# OpenAI's own state dicts carry these numbers beside the weights; open_clip drops them as well.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
_TEXT = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
_SCALES = ("logit_scale", "logit_bias")
_POSITIONS = ("visual.positional_embedding", "positional_embedding", "text.positional_embedding")
_MAX_NUMBERS = 1 << 26  # of interpolated positions; 4096 px in patches of 16 and width 1024


def as_open_clip(
    checkpoint: Checkpoint, expected: Shapes, model_cfg: Mapping[str, Any]
) -> Checkpoint:
    """Return a view of the checkpoint under the names and shapes of ``expected``, as far as
    open_clip would mend it; the checkpoint itself where nothing is to be mended.

    ``model_cfg``: says how many patches an image has, in each direction.
    """
    prefix, *others = prefixes_of(checkpoint.specs, expected) or [""]
    # Names: without the prefix, and as the model's text tower has them.
    is_custom_text = "positional_embedding" not in expected and "text.ln_final.weight" in expected
    keys = {}
    for key in checkpoint.specs:
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or _is_dropped(name, expected):
            continue
        is_moved = is_custom_text and name not in expected and name.startswith(_TEXT)
        keys[f"text.{name}" if is_moved else name] = key
    # Shapes; a checkpoint that needs neither stays as it is.
    made = _mended(checkpoint, keys, expected, _grid(model_cfg))
    if not made and keys == {key: key for key in checkpoint.specs}:
        return checkpoint
    mended = _MendedCheckpoint(checkpoint, keys, made)
    mended.chosen = prefix or chosen_prefix(checkpoint)
    mended.others = tuple(others) or other_prefixes(checkpoint)
    return mended


def _is_dropped(name: str, expected: Shapes) -> bool:
    """Return whether open_clip drops a tensor that the model does not have."""
    return name not in expected and (name in _NOT_WEIGHTS or name.endswith("position_ids"))


def _grid(model_cfg: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of an image's patches; None where the model has no such grid."""
    vision = model_cfg.get("vision_cfg")
    sizes = [vision.get(key) for key in ("image_size", "patch_size")] if vision else []
    pairs = [size if isinstance(size, list | tuple) else (size, size) for size in sizes]
    if not all(len(pair) == 2 and all(type(n) is int and n > 0 for n in pair) for pair in pairs):
        return None
    (height, width), (rows, columns) = pairs
    return height // rows, width // columns


def _mended(
    checkpoint: Checkpoint,
    keys: Mapping[str, str],
    expected: Shapes,
    grid: tuple[int, int] | None,
) -> dict[str, Tensor]:
    """Return the tensors that are made of the stored ones: scales, and positions."""
    made = {}
    for name in expected:
        key = keys.get(name)
        if key is None:
            if name == "logit_bias":
                made[name] = torch.zeros(expected[name])
            continue
        shape, wanted = checkpoint.specs[key].shape, expected[name]
        if shape == wanted:
            continue
        # What fits neither way is refused by the comparison of shapes that follows.
        if name in _SCALES and math.prod(shape) == math.prod(wanted) == 1:
            made[name] = read_tensor(checkpoint, key).reshape(wanted)
        elif name in _POSITIONS and _is_resizable(shape, wanted):
            positions = read_tensor(checkpoint, key)
            resized = (
                _resized_grid(positions.float(), wanted[0], grid, checkpoint)
                if name.startswith("visual.")
                else _resized_line(positions.float(), wanted[0])
            )
            made[name] = resized.to(positions.dtype)
    return made


def _is_resizable(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Return whether positions can be interpolated; a config may ask for more than any memory."""
    is_table = len(shape) == 2 and shape[1:] == wanted[1:] and shape[0] > 1
    return is_table and max(math.prod(shape), math.prod(wanted)) <= _MAX_NUMBERS


def _resized_grid(
    positions: Tensor, count: int, grid: tuple[int, int] | None, checkpoint: Checkpoint
) -> Tensor:
    """Return an image's positions (a class token's, then a square grid's) for ``count`` tokens."""
    side = math.isqrt(len(positions) - 1)
    if side * side != len(positions) - 1 or grid is None or grid[0] * grid[1] != count - 1:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: visual.positional_embedding has {len(positions)} "
            f"positions, no class token and square grid, and the model has {count}; choose the "
            "architecture of these weights"
        )
    square = positions[1:].view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(
        square, size=grid, mode="bicubic", antialias=True, align_corners=False
    )
    return torch.cat([positions[:1], resized.permute(0, 2, 3, 1).reshape(count - 1, -1)])


def _resized_line(positions: Tensor, count: int) -> Tensor:
    """Return a text's positions for ``count`` tokens."""
    line = positions.t().unsqueeze(0)
    return functional.interpolate(line, size=count, mode="linear")[0].t().contiguous()


class _MendedCheckpoint(ViewCheckpoint):
    """Tensors of another checkpoint under names of their own, and some that are held here."""

    def __init__(
        self, checkpoint: Checkpoint, keys: Mapping[str, str], made: Mapping[str, Tensor]
    ) -> None:
        origins = {name: (checkpoint, key) for name, key in keys.items()}
        super().__init__(checkpoint.path, checkpoint.kind, origins)
        self.chosen = ""
        self.others: tuple[str, ...] = ()
        self._made = made
        own = {key: TensorSpec(tuple(each.shape), each.dtype) for key, each in made.items()}
        self.specs = {**self.specs, **own}

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        if key in self._made:
            out_n.copy_(self._made[key].reshape(-1)[start : start + len(out_n)])
        else:
            super().fill(key, start, out_n)
