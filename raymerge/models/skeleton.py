"""open_clip's module for a resolved model without its weights, and what follows from it alone."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from raymerge.data.preprocess import make_preprocess
from raymerge.errors import CheckpointError, UserError, one_line
from raymerge.models.resolve import CONFIG_FILE, ResolvedModel

OpenClipModel = Any
"""open_clip's CLIP, CustomTextCLIP or CoCa; open_clip has no types."""


def build_skeleton(resolved: ResolvedModel, device: str = "cpu") -> OpenClipModel:
    """Return open_clip's module with random weights; on ``meta`` it takes neither time nor memory.

    Raises :class:`CheckpointError` for a config that open_clip cannot build.
    """
    with _folder(resolved) as folder, _quiet_open_clip(), torch.device(device):
        try:
            return open_clip.create_model(
                f"local-dir:{folder}", load_weights=False, pretrained_text=False, device=device
            )
        except UserError:
            raise
        except Exception as error:  # a bad model_cfg fails anywhere inside open_clip
            raise CheckpointError(
                f"model: {resolved.name}: open_clip cannot build it "
                f"({type(error).__name__}: {one_line(error)})"
            ) from error


def activation_bytes(visual: nn.Module) -> int:
    """Return the bytes that a float32 forward pass of one image saves for its backward pass.

    ``visual``: the tower on ``meta``, where this takes neither time nor memory.
    """
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    height, width = make_preprocess(visual).size
    image = torch.empty(1, 3, height, width, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = visual.train(False).requires_grad_(True)(image)
    weights = {p.untyped_storage()._cdata for p in visual.parameters()}
    del output
    return sum(size for storage, size in saved.items() if storage not in weights)


def make_tokenizer(resolved: ResolvedModel) -> Callable[[list[str]], Tensor]:
    """Return open_clip's tokenizer of a model: texts → (B, T) token ids."""
    with _folder(resolved) as folder, _quiet_open_clip():
        tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(
            resolved.tokenizer or f"local-dir:{folder}"
        )
    return tokenizer


@contextmanager
def _folder(resolved: ResolvedModel) -> Iterator[Path]:
    """Yield a temporary folder with the model's config, which is all that open_clip reads here."""
    with tempfile.TemporaryDirectory(prefix="raymerge-") as name:
        (Path(name) / CONFIG_FILE).write_text(resolved.config_json, encoding="utf-8")
        yield Path(name)


@contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """Suppress open_clip's warning, on the root logger, about a model without weights."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
