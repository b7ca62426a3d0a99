"""Whole models between open_clip's and Hugging Face's folders: the same numbers, bit for bit.

Tensors are copied in parts, so that no model is held whole. Writing needs no transformers; where it
is installed, the two libraries are compared on the same inputs before a folder is kept.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from raymerge.config import ModelConfig
from raymerge.errors import (
    CheckpointError,
    RunError,
    UserError,
    escape_unprintable,
    one_line,
)
from raymerge.files.atomic import stage_folder, sync, write_atomically
from raymerge.models.checkpoints import huggingface_config
from raymerge.models.checkpoints.checkpoint import (
    Checkpoint,
    TensorSpec,
    ViewCheckpoint,
    read_tensor,
)
from raymerge.models.checkpoints.huggingface import HuggingFaceCheckpoint, stored_keys
from raymerge.models.checkpoints.locate import locate, split_part
from raymerge.models.checkpoints.safetensors_file import SafetensorsWriter
from raymerge.models.checkpoints.visual_tower import choice_of
from raymerge.models.pretrained import open_pretrained, unmerged_keys
from raymerge.models.resolve import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ResolvedModel,
    resolve_folder,
    resolve_model,
)

Format = Literal["open_clip", "hf"]
Also = Literal["hf", "state_dict"]

logger = logging.getLogger(__name__)

HF_FOLDER = "hf"
STATE_DICT_FILE = "state_dict.pt"
HF_WEIGHTS_FILE = "model.safetensors"
HF_FILES = (
    HF_WEIGHTS_FILE,
    huggingface_config.CONFIG_FILE,
    huggingface_config.PREPROCESSOR_FILE,
)
_CONFIG_FILES = (CONFIG_FILE, huggingface_config.CONFIG_FILE)
_COLUMNS = 1 << 22
_MAX_DIFFERENCE = 1e-5


def convert(
    reference: str, destination: Path, to: Format, arch: str | None = None, *, verify: bool = True
) -> float | None:
    """Write a model as a folder of the other library's format.

    ``arch``: as ``model.arch`` of a config; needed where no config lies beside the weights.
    ``verify``: load both folders with their own libraries and compare the cosines of images and
    texts, if transformers is installed. Returns the largest difference, None if not compared.

    Raises :class:`UserError` before anything is written, and :class:`~raymerge.errors.RunError`
    where the folder cannot be written or the libraries do not agree; then nothing is left.
    """
    _require_free(destination)
    resolved = _resolve(reference, arch)
    files = _files(resolved, to)
    if choice := choice_of(open_pretrained(resolved)[0], resolved.weights.name):
        logger.warning("%s", escape_unprintable(choice))
    with stage_folder(destination) as folder:
        for name, write in files.items():
            write(folder / name)
            sync(folder / name)
        return _compare(resolved, folder, to) if verify else None


def write_also(folder: Path, also: Sequence[Also]) -> None:
    """Write the merged model of an output folder again, in the formats of ``also`` and no other."""
    # Files of an earlier run hold another model.
    stale = {STATE_DICT_FILE: "state_dict", **{f"{HF_FOLDER}/{name}": "hf" for name in HF_FILES}}
    for name, kind in stale.items():
        if kind not in also:
            (folder / name).unlink(missing_ok=True)
    if not also:
        return
    resolved = resolve_folder(folder)
    if "hf" in also:
        (folder / HF_FOLDER).mkdir(exist_ok=True)
        for name, write in _files(resolved, "hf").items():
            write_atomically(folder / HF_FOLDER / name, write)
    if "state_dict" in also:
        state = _state_dict(resolved)
        write_atomically(folder / STATE_DICT_FILE, lambda path: _save(state, path))


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's own writer, on a full disk
        raise OSError(errno.ENOSPC, one_line(error)) from error


def require_also(resolved: ResolvedModel, also: Sequence[Also]) -> None:
    """Raise :class:`UserError` if the model cannot be written in one of the formats."""
    if "hf" in also:
        _files(resolved, "hf")


def _state_dict(resolved: ResolvedModel) -> dict[str, Tensor]:
    model = _whole_model(resolved)
    return {name: read_tensor(model, name) for name in model.specs}


def _whole_model(resolved: ResolvedModel) -> Checkpoint:
    """Return all tensors of a model under open_clip's names."""
    pretrained, _ = open_pretrained(resolved)
    checkpoint = pretrained.checkpoint
    visual = {f"visual.{name}": pretrained.prefix + name for name in pretrained.layout.names}
    keys = {**unmerged_keys(pretrained), **visual}
    origins = {name: (checkpoint, key) for name, key in keys.items()}
    return ViewCheckpoint(checkpoint.path, checkpoint.kind, origins)


class HuggingFaceView:
    """A model's tensors under Hugging Face's keys: transposed, or as equal parts of a packed one.

    Raises :class:`CheckpointError` for a tensor that Hugging Face's CLIP does not have.
    """

    kind = HuggingFaceCheckpoint.kind

    def __init__(self, model: Checkpoint) -> None:
        self.path, self._model = model.path, model
        specs: dict[str, TensorSpec] = {}
        self.specs: Mapping[str, TensorSpec] = specs
        self._origins: dict[str, tuple[str, int, bool]] = {}
        for name, spec in model.specs.items():
            stored = stored_keys(name)
            if stored is None:
                raise CheckpointError(
                    f"checkpoint {model.path}: Hugging Face's CLIPModel has no tensor for {name}; "
                    "keep it as an open_clip folder"
                )
            shape = spec.shape[::-1] if stored.is_transposed else spec.shape
            if len(stored.keys) > 1:
                shape = (shape[0] // len(stored.keys), *shape[1:])
            for part, key in enumerate(stored.keys):
                specs[key] = TensorSpec(shape, spec.dtype)
                self._origins[key] = name, part, stored.is_transposed

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        name, part, is_transposed = self._origins[key]
        if is_transposed:
            whole_n = read_tensor(self._model, name).t().reshape(-1)
            out_n.copy_(whole_n[start : start + len(out_n)])
        else:
            self._model.fill(name, part * self.specs[key].numel + start, out_n)


def _resolve(reference: str, arch: str | None) -> ResolvedModel:
    part = split_part(reference)[1]
    return replace(_resolve_place(reference, arch), part=part)


def _resolve_place(reference: str, arch: str | None) -> ResolvedModel:
    if arch is not None:
        if arch.startswith(("local-dir:", "hf-hub:")):
            return replace(resolve_model(ModelConfig(arch=arch)), weights=locate(reference))
        return resolve_model(ModelConfig(arch=arch, pretrained=str(locate(reference))))
    if reference.startswith("hf-hub:"):
        return resolve_model(ModelConfig(arch=reference))
    weights = locate(reference)
    if any((weights.parent / name).is_file() for name in _CONFIG_FILES):
        return replace(resolve_folder(weights.parent), weights=weights)
    raise CheckpointError(
        f"checkpoint {weights}: neither {' nor '.join(_CONFIG_FILES)} is beside it; name its "
        "architecture with --arch (one of open_clip's, or a config JSON)"
    )


# --- writing -------------------------------------------------------------------------------------


def _files(resolved: ResolvedModel, to: Format) -> Mapping[str, Callable[[Path], None]]:
    """Return the files of a format by name, as functions that write them.

    Raises :class:`CheckpointError` if the format cannot express the model.
    """
    model = _whole_model(resolved)
    if to == "open_clip":
        return {
            WEIGHTS_FILE: lambda path: _write_tensors(model, path),
            CONFIG_FILE: lambda path: _write_text(path, resolved.config_json),
        }
    dtypes = {spec.dtype for spec in model.specs.values()}
    dtype = str(dtypes.pop() if len(dtypes) == 1 else torch.float32).removeprefix("torch.")
    config, preprocessor = _configs(resolved, dtype)
    view = HuggingFaceView(model)
    return {
        HF_WEIGHTS_FILE: lambda path: _write_tensors(view, path),
        huggingface_config.CONFIG_FILE: lambda path: _write_text(path, _json(config)),
        huggingface_config.PREPROCESSOR_FILE: lambda path: _write_text(path, _json(preprocessor)),
    }


def _configs(resolved: ResolvedModel, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    where = f"model {resolved.name}"
    config = huggingface_config.huggingface_config(resolved.model_cfg, where, dtype)
    size = config["vision_config"]["image_size"]
    return config, huggingface_config.preprocessor_config(resolved.preprocess_cfg, size)


def _write_tensors(checkpoint: Checkpoint, path: Path) -> None:
    with SafetensorsWriter(path, checkpoint.specs) as writer:
        for key, spec in checkpoint.specs.items():
            for start in range(0, spec.numel, _COLUMNS):
                part_n = torch.empty(min(_COLUMNS, spec.numel - start), dtype=spec.dtype)
                checkpoint.fill(key, start, part_n)
                writer.write(key, start, part_n)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _require_free(destination: Path) -> None:
    try:
        is_used = destination.exists() and (not destination.is_dir() or any(destination.iterdir()))
    except OSError as error:
        raise UserError(f"destination {destination}: {error.strerror}; choose another") from error
    if is_used:
        raise UserError(f"destination {destination}: is in use; name a folder that does not exist")


# --- the two libraries side by side --------------------------------------------------------------


@torch.no_grad()
def _compare(resolved: ResolvedModel, folder: Path, to: Format) -> float | None:
    """Return the largest difference between the two libraries' cosines of images and texts.

    One model is the written ``folder``, the other the one it was made from, both in float32. None
    if transformers is not installed or both are open_clip's. Raises :class:`RunError` if the
    difference is above 1e-5.
    """
    huggingface_folder = folder
    if to == "open_clip":
        huggingface_folder = resolved.weights.parent
        has_config = (huggingface_folder / huggingface_config.CONFIG_FILE).is_file()
        if not has_config or _whole_model(resolved).kind != HuggingFaceCheckpoint.kind:
            return None
        resolved = resolve_folder(folder)
    if find_spec("transformers") is None:
        return None
    from transformers import CLIPModel

    from raymerge.models.skeleton import build_skeleton

    # Each side is loaded by its own library.
    own = build_skeleton(resolved)
    own.load_state_dict(_state_dict(resolved), strict=True)
    own.eval()
    other: Any = CLIPModel.from_pretrained(huggingface_folder)
    other.float().eval()
    # Both see the same inputs.
    images_B3HW, texts_BT = _inputs(other.config)
    cosines_BB = _cosines(own.encode_image(images_B3HW), own.encode_text(texts_BT))
    output = other(input_ids=texts_BT, pixel_values=images_B3HW)
    other_BB = _cosines(output.image_embeds, output.text_embeds)
    difference = float((cosines_BB - other_BB).abs().max())
    if not difference <= _MAX_DIFFERENCE:
        raise RunError(
            f"convert: the cosines of open_clip and transformers differ by {difference:.2g}, more "
            f"than {_MAX_DIFFERENCE:g}; nothing is written: check the model in open_clip"
        )
    return difference


def _inputs(config: Any) -> tuple[Tensor, Tensor]:
    """Return two noise images, and two texts of random tokens with CLIP's end token."""
    generator = torch.Generator().manual_seed(0)
    size, text = config.vision_config.image_size, config.text_config
    images = torch.randn(2, 3, size, size, generator=generator)
    texts = torch.zeros(2, text.max_position_embeddings, dtype=torch.int64)
    end = text.eos_token_id if text.eos_token_id != 2 else text.vocab_size - 1
    for row, length in enumerate((3, texts.shape[1] - 1)):
        texts[row, :length] = torch.randint(3, text.vocab_size - 3, (length,), generator=generator)
        texts[row, length] = end
    return images, texts


def _cosines(images_BD: Tensor, texts_BD: Tensor) -> Tensor:
    normalise = torch.nn.functional.normalize
    return normalise(images_BD, dim=-1) @ normalise(texts_BD, dim=-1).t()
