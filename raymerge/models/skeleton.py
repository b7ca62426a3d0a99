"""open_clip's module for a resolved model without its weights, and what follows from it alone."""

from __future__ import annotations

import importlib.util
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
    with _inside_open_clip(resolved) as folder, torch.device(device):
        return open_clip.create_model(
            f"local-dir:{folder}", load_weights=False, pretrained_text=False, device=device
        )


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
    """Return open_clip's tokenizer of a model: texts → (B, T) token ids.

    Raises :class:`CheckpointError` where it cannot be loaded, or comes with code of its own.
    """
    with _inside_open_clip(resolved) as folder:
        tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(
            resolved.tokenizer or f"local-dir:{folder}"
        )
    return tokenizer


@contextmanager
def _inside_open_clip(resolved: ResolvedModel) -> Iterator[Path]:
    """Yield a temporary folder with the model's config, which is all that open_clip reads here.

    open_clip's warnings are suppressed, no code of the model's author runs, and whatever fails is a
    :class:`CheckpointError`.
    """
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip warns of a model without weights
    try:
        with tempfile.TemporaryDirectory(prefix="raymerge-") as name, _no_custom_code(resolved):
            (Path(name) / CONFIG_FILE).write_text(resolved.config_json, encoding="utf-8")
            yield Path(name)
    except UserError:
        raise
    except Exception as error:  # a bad model_cfg fails anywhere inside open_clip
        if "custom code" in str(error):
            raise CheckpointError(
                f"model: {resolved.name}: refused: its tokenizer or text tower comes with code of "
                "its own, which is never run; use one that transformers knows"
            ) from error
        raise CheckpointError(
            f"model: {resolved.name}: open_clip cannot build it ({type(error).__name__}: "
            f"{one_line(error)}); check its {CONFIG_FILE}"
        ) from error
    finally:
        logging.disable(previous)


@contextmanager
def _no_custom_code(resolved: ResolvedModel) -> Iterator[None]:
    """Let transformers refuse a model's own code, where it would ask on the terminal to run it."""
    if '"hf_' not in resolved.config_json or importlib.util.find_spec("transformers") is None:
        yield
        return
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE  # to wait for an answer; 0: do not ask
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds
