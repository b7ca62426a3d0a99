"""Whole models between open_clip's and Hugging Face's folders: the same numbers, bit for bit.

Nothing is held but a part of one tensor. transformers is not needed to write what it loads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from raymerge.config import ModelConfig
from raymerge.errors import CheckpointError, RunError, UserError
from raymerge.files.atomic import stage_file, stage_folder, sync
from raymerge.models.checkpoints import huggingface_config
from raymerge.models.checkpoints.checkpoint import TensorSpec, read_tensor
from raymerge.models.checkpoints.huggingface import (
    HuggingFaceCheckpoint,
    Source,
    columns,
    source_of,
)
from raymerge.models.checkpoints.locate import locate
from raymerge.models.checkpoints.writer import SafetensorsWriter
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
_AGREEMENT = 1e-5

_Spec = Mapping[str, TensorSpec]


def convert(
    reference: str, destination: Path, to: Format, arch: str | None = None, *, verify: bool = True
) -> float | None:
    """Write the model as a folder of the other format.

    ``arch``: as ``model.arch`` of a config; needed where no config is beside the weights.
    ``verify``: load both with their own libraries and compare what they make of an image and two
    texts, if transformers is installed. Returns by how much the cosines differ at most, None if
    that was not looked at.

    Raises :class:`UserError` before anything is written, :class:`~raymerge.errors.RunError` where
    it cannot be written, or where the two do not agree; then nothing is left.
    """
    _require_free(destination)
    resolved = _resolve(reference, arch)
    model = WholeModel(resolved)
    files = _files(model, to)
    with stage_folder(destination) as folder:
        for name, write in files.items():
            write(folder / name)
            sync(folder / name)
        return compare(model, folder, to) if verify else None


def write_also(folder: Path, also: Sequence[Also]) -> None:
    """The merged model in an output folder, once more in the formats of ``also``, and in no other:
    what an earlier run has left of them is of another model."""
    stale = {STATE_DICT_FILE: "state_dict", **{f"{HF_FOLDER}/{name}": "hf" for name in HF_FILES}}
    for name, kind in stale.items():
        if kind not in also:
            (folder / name).unlink(missing_ok=True)
    if not also:
        return
    model = WholeModel(resolve_folder(folder, f"local-dir:{folder}"))
    if "hf" in also:
        below = folder / HF_FOLDER
        below.mkdir(exist_ok=True)
        for name, write in _files(model, "hf").items():
            with stage_file(below / name, below) as (temporary, commit):
                write(temporary)
                commit()
    if "state_dict" in also:
        with stage_file(folder / STATE_DICT_FILE, folder) as (temporary, commit):
            torch.save({name: model.read(name) for name in model.specs}, temporary)
            commit()


def require_also(resolved: ResolvedModel, also: Sequence[Also]) -> None:
    """Raise :class:`UserError` if the model cannot be written in one of the formats."""
    if "hf" in also:
        _configs(resolved, "float32")
        _sources(WholeModel(resolved))


class WholeModel:
    """Every tensor of a model under open_clip's names."""

    def __init__(self, resolved: ResolvedModel) -> None:
        pretrained, _ = open_pretrained(resolved)
        self.resolved, self._checkpoint = resolved, pretrained.checkpoint
        visual = {f"visual.{name}": pretrained.prefix + name for name in pretrained.layout.names}
        self._keys = {**unmerged_keys(pretrained), **visual}
        stored = pretrained.checkpoint.specs
        self.specs: _Spec = {name: stored[key] for name, key in self._keys.items()}

    @property
    def huggingface_folder(self) -> Path | None:
        """From where transformers loads it, if it does."""
        folder = self.resolved.weights.parent
        whole = isinstance(self._checkpoint, HuggingFaceCheckpoint)
        return folder if whole and (folder / huggingface_config.CONFIG_FILE).is_file() else None

    def read(self, name: str) -> Tensor:
        return read_tensor(self._checkpoint, self._keys[name])

    def parts(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """A tensor's columns, some at a time."""
        spec = self.specs[name]
        size = math.prod(spec.shape)
        for start in range(0, size, _COLUMNS):
            part_n = torch.empty(min(_COLUMNS, size - start), dtype=spec.dtype)
            self._checkpoint.fill(self._keys[name], start, part_n)
            yield start, part_n


def _resolve(reference: str, arch: str | None) -> ResolvedModel:
    if arch is not None:
        if arch.startswith(("local-dir:", "hf-hub:")):
            return replace(resolve_model(ModelConfig(arch=arch)), weights=locate(reference))
        return resolve_model(ModelConfig(arch=arch, pretrained=str(locate(reference))))
    if reference.startswith("hf-hub:"):
        return resolve_model(ModelConfig(arch=reference))
    weights = locate(reference)
    if any((weights.parent / name).is_file() for name in _CONFIG_FILES):
        resolved = resolve_folder(weights.parent, f"local-dir:{weights.parent}")
        return replace(resolved, weights=weights)
    raise CheckpointError(
        f"checkpoint {weights}: neither {' nor '.join(_CONFIG_FILES)} is beside it; say what it is "
        "with --arch (an open_clip architecture, or a config JSON)"
    )


# --- writing -------------------------------------------------------------------------------------


def _files(model: WholeModel, to: Format) -> Mapping[str, Callable[[Path], None]]:
    """What is written: names → functions that write a file. Raises :class:`CheckpointError`."""
    if to == "open_clip":
        return {
            WEIGHTS_FILE: lambda path: _write_open_clip(model, path),
            CONFIG_FILE: lambda path: _write_text(path, model.resolved.config_json),
        }
    dtypes = {spec.dtype for spec in model.specs.values()}
    dtype = str(dtypes.pop() if len(dtypes) == 1 else torch.float32).removeprefix("torch.")
    config, preprocessor = _configs(model.resolved, dtype)
    sources = _sources(model)
    return {
        HF_WEIGHTS_FILE: lambda path: _write_huggingface(model, sources, path),
        huggingface_config.CONFIG_FILE: lambda path: _write_text(path, _json(config)),
        huggingface_config.PREPROCESSOR_FILE: lambda path: _write_text(path, _json(preprocessor)),
    }


def _configs(resolved: ResolvedModel, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    where = f"model {resolved.name}"
    config = huggingface_config.huggingface_config(resolved.model_cfg, where, dtype)
    size = config["vision_config"]["image_size"]
    return config, huggingface_config.preprocessor_config(resolved.preprocess_cfg, size)


def _sources(model: WholeModel) -> dict[str, Source]:
    found = {name: source_of(name) for name in model.specs}
    homeless = sorted(name for name, source in found.items() if source is None)
    if homeless:
        raise CheckpointError(
            f"model {model.resolved.name}: {homeless[0]} (of {len(homeless)}) has no place in "
            "Hugging Face's CLIPModel"
        )
    return {name: source for name, source in found.items() if source is not None}


def _write_open_clip(model: WholeModel, path: Path) -> None:
    with SafetensorsWriter(path, model.specs) as writer:
        for name in model.specs:
            for start, part_n in model.parts(name):
                writer.write(name, start, part_n)


def _write_huggingface(model: WholeModel, sources: Mapping[str, Source], path: Path) -> None:
    specs = {}
    for name, source in sources.items():
        spec = model.specs[name]
        shape = spec.shape[::-1] if source.transposed else spec.shape
        if len(source.keys) > 1:
            shape = (shape[0] // len(source.keys), *shape[1:])
        specs.update(dict.fromkeys(source.keys, TensorSpec(shape, spec.dtype)))
    with SafetensorsWriter(path, specs) as writer:
        for name, source in sources.items():
            if source.transposed:
                writer.write(source.keys[0], 0, model.read(name).t())
                continue
            sizes = [math.prod(specs[key].shape) for key in source.keys]
            for start, part_n in model.parts(name):
                for k, (inside, here) in columns(sizes, start, len(part_n)):
                    writer.write(source.keys[k], inside, part_n[here])


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _require_free(destination: Path) -> None:
    try:
        taken = destination.exists() and (not destination.is_dir() or any(destination.iterdir()))
    except OSError as error:
        raise UserError(f"destination {destination}: {error.strerror}; choose another") from error
    if taken:
        raise UserError(f"destination {destination}: is in use; name a folder that is not there")


# --- the two libraries side by side --------------------------------------------------------------


@torch.no_grad()
def compare(model: WholeModel, folder: Path, to: Format) -> float | None:
    """The most that a cosine of an image and a text differs between the two libraries, in float32.

    One side is what was written to ``folder``, the other what it was made from; None if both are
    open_clip's. Raises :class:`RunError` if they do not agree.
    """
    theirs_folder = folder if to == "hf" else model.huggingface_folder
    if theirs_folder is None or find_spec("transformers") is None:
        return None
    from transformers import CLIPModel

    from raymerge.models.skeleton import build_skeleton

    state = model if to == "hf" else WholeModel(resolve_folder(folder, f"local-dir:{folder}"))
    ours = build_skeleton(state.resolved)
    ours.load_state_dict({name: state.read(name).float() for name in state.specs}, strict=True)
    theirs: Any = CLIPModel.from_pretrained(theirs_folder)
    theirs.float()
    images_BHW, texts_BT = _inputs(theirs.config)
    ours.eval()
    theirs.eval()
    given = _cosines(ours.encode_image(images_BHW), ours.encode_text(texts_BT))
    output = theirs(input_ids=texts_BT, pixel_values=images_BHW)
    difference = float((given - _cosines(output.image_embeds, output.text_embeds)).abs().max())
    if not difference <= _AGREEMENT:
        raise RunError(
            f"convert: the cosines of open_clip and transformers differ by {difference:.2g}, more "
            f"than {_AGREEMENT:g}; nothing was written"
        )
    return difference


def _inputs(config: Any) -> tuple[Tensor, Tensor]:
    """Two noise images, and two texts of random tokens that end as CLIP's do."""
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
