"""Find the model that a config names: its architecture, its weights file and its preprocessing.

A model is a name of open_clip's, a folder of either library, a hub id, a URL or a JSON file. No
tensor is read here. open_clip is imported only where it is needed: it takes seconds, and a static
merge of local files does without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel

from raymerge.config import ModelConfig
from raymerge.errors import CheckpointError, ConfigError, did_you_mean, excerpt, one_line
from raymerge.files.atomic import exists
from raymerge.files.urls import is_remote, redact_url
from raymerge.models.checkpoints import huggingface_config
from raymerge.models.checkpoints.huggingface_config import Channels, Number, validated
from raymerge.models.checkpoints.locate import hub_folder, locate, read_json, split_part

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_CONFIG_FILES = (CONFIG_FILE, huggingface_config.CONFIG_FILE)

_MAX_SIZE = 1 << 24
_LAYERS = re.compile(r"layers?$|depths?$|blocks?$")
_LAYER_BYTES = 1024  # the header of a layer's tensors alone takes as much
_FEW_LAYERS = 64
_MAX_SIZES = {"layers": 1024, "context_length": 1 << 13}  # each makes a block, or part of a mask


@dataclass(frozen=True)
class ResolvedModel:
    """The arguments with which open_clip builds a model, and the file of θ₀ and the text tower."""

    name: str
    model_cfg: Mapping[str, Any]
    preprocess_cfg: Mapping[str, Any]
    weights: Path
    tokenizer: str
    """The argument of ``open_clip.get_tokenizer``; empty for the default tokenizer of
    ``model_cfg``."""
    part: str = ""
    """The prefix of the model's keys in the file, where a reference names one (``#part``)."""

    @property
    def weights_reference(self) -> str:
        """The reference of the weights, with the part of the file that is meant."""
        return f"{self.weights}#{self.part}" if self.part else str(self.weights)

    @property
    def features(self) -> int:
        """The number of features D of an image or a text."""
        return int(self.model_cfg["embed_dim"])

    @property
    def config_json(self) -> str:
        """The ``open_clip_config.json`` of a folder that open_clip loads as ``local-dir:``."""
        cfg = {"model_cfg": self.model_cfg, "preprocess_cfg": self.preprocess_cfg}
        return json.dumps(cfg, indent=2) + "\n"


def resolve_model(config: ModelConfig) -> ResolvedModel:
    """Find the architecture and the weights; downloads tags, URLs and hub models.

    Raises :class:`~raymerge.errors.UserError`.
    """
    model = _resolve_place(config)
    if config.other_weights is not None:
        model = replace(model, weights=locate(config.other_weights))
    return replace(model, part=split_part(config.other_weights or config.reference)[1])


def _resolve_place(config: ModelConfig) -> ResolvedModel:
    arch = split_part(config.arch)[0] if config.is_folder else config.arch
    if arch.startswith("local-dir:"):
        return resolve_folder(Path(arch.removeprefix("local-dir:")), arch)
    if is_remote(arch):
        return replace(resolve_folder(locate(arch).parent), name=redact_url(arch))
    if arch.startswith("hf-hub:"):
        return resolve_folder(hub_folder(arch.removeprefix("hf-hub:")), arch)
    if arch.endswith(".json"):
        assert config.pretrained is not None  # ModelConfig requires it here
        return _resolved(arch, _read_config(Path(arch)), locate(config.pretrained), tokenizer="")
    return _resolve_builtin(arch.replace("/", "-"), str(config.pretrained))


def resolve_folder(folder: Path, name: str = "") -> ResolvedModel:
    """Resolve the model in a folder of open_clip's or of Hugging Face's, by the config in it.

    ``name``: its reference, by default ``local-dir:`` and the folder; open_clip finds the tokenizer
    by it.
    """
    name = name or f"local-dir:{folder}"
    own, other = folder / CONFIG_FILE, folder / huggingface_config.CONFIG_FILE
    if not exists(own) and not exists(other):
        raise CheckpointError(f"model: {folder}: {_without_config(folder)}")
    is_huggingface = exists(other) and not exists(own)
    cfg = huggingface_config.read_huggingface(folder) if is_huggingface else _read_config(own)
    weights = locate(name if name.startswith("hf-hub:") else str(folder))
    return _resolved(name, cfg, weights, tokenizer="" if is_huggingface else name)


def _without_config(folder: Path) -> str:
    """Return what a folder lacks to be a model, and the remedy."""
    if not exists(folder) or not folder.is_dir():
        return "no such folder; check the path"
    what = f"the folder holds neither {CONFIG_FILE} nor {huggingface_config.CONFIG_FILE}"
    below = (each.parent for name in _CONFIG_FILES for each in sorted(folder.glob(f"*/{name}")))
    inside = next(below, None)
    if inside is not None:
        return f"{what}; its subfolder {inside.name} does: write local-dir:{inside}"
    try:
        weights = locate(str(folder))
    except CheckpointError:
        return f"{what}, so no model; name the folder of a whole model"
    if weights.name.startswith("adapter_model"):
        return (
            f"{what}: it is an adapter, which can be a task's checkpoint; name its base model here"
        )
    return f"{what}; name the architecture: model: {{arch: ViT-B-32, pretrained: {weights}}}"


# --- open_clip's own architectures ---------------------------------------------------------------


def _resolve_builtin(arch: str, pretrained: str) -> ResolvedModel:
    import open_clip
    from open_clip.pretrained import download_pretrained

    model_cfg = open_clip.get_model_config(arch)
    if model_cfg is None:
        hint = did_you_mean(arch, open_clip.list_models()) or "; see open_clip.list_models()"
        raise ConfigError(f"model.arch: {arch!r} is no open_clip architecture{hint}")
    # The weights are a tag of open_clip's, or a file.
    tag = open_clip.get_pretrained_cfg(arch, pretrained)
    if not tag:
        if not exists(Path(pretrained)) and "/" not in pretrained:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
            raise ConfigError(
                f"model.pretrained: {pretrained!r} is neither a file nor a tag of {arch} ({tags}); "
                "name one of these"
            )
        return _resolved(arch, {"model_cfg": model_cfg}, locate(pretrained), tokenizer=arch)
    _require_same_activation(arch, pretrained, model_cfg, tag)
    try:
        weights = Path(download_pretrained(tag))
    except Exception as error:  # whatever the hub client or urllib raises offline
        raise CheckpointError(
            f"model.pretrained: {pretrained} of {arch} cannot be downloaded "
            f"({one_line(error)}); give a local file instead"
        ) from error
    cfg = {"model_cfg": model_cfg, "preprocess_cfg": tag}
    return _resolved(f"{arch} ({pretrained})", cfg, weights, tokenizer=arch)


def _require_same_activation(
    arch: str, tag: str, model_cfg: Mapping[str, Any], tag_cfg: Mapping[str, Any]
) -> None:
    """Raise :class:`ConfigError` where an architecture has another GELU than a tag's weights.

    OpenAI's weights need QuickGELU; with GELU they silently lose accuracy (open_clip #771).
    """
    trained_quick, is_quick = bool(tag_cfg.get("quick_gelu")), bool(model_cfg.get("quick_gelu"))
    if trained_quick == is_quick:
        return
    other = f"{arch}-quickgelu" if trained_quick else arch.removesuffix("-quickgelu")
    raise ConfigError(
        f"model.arch: {arch} uses {'QuickGELU' if is_quick else 'GELU'}, but the {tag} weights "
        f"were trained with {'QuickGELU' if trained_quick else 'GELU'}; use arch: {other}"
    )


# --- a model's own config ------------------------------------------------------------------------


def _read_config(path: Path) -> Mapping[str, Any]:
    """Return ``model_cfg`` and ``preprocess_cfg`` of an ``open_clip_config.json``, of a bare
    model_cfg as open_clip ships them, or of Hugging Face's ``config.json``."""
    if not exists(path) or not path.is_file():
        raise CheckpointError(f"model: {path}: no such file; check the path")
    cfg = read_json(path)
    if isinstance(cfg, dict) and "vision_cfg" in cfg:
        cfg = {"model_cfg": cfg}
    if isinstance(cfg, dict) and "model_type" in cfg:
        return huggingface_config.read_huggingface(path.parent)
    if not isinstance(cfg, dict) or not isinstance(cfg.get("model_cfg"), dict):
        raise CheckpointError(
            f"model: {path}: holds neither a model_cfg nor a vision_cfg; "
            "name an open_clip_config.json"
        )
    return cfg


class _PreprocessCfg(BaseModel):
    """open_clip's PreprocessCfg without the size: the model's own image size decides."""

    mode: Literal["RGB"] = "RGB"
    mean: Channels = (0, 0, 0)
    std: Annotated[Channels, AfterValidator(lambda std: _require_least(1e-6, std))] = (1, 1, 1)
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: Annotated[
        Number | Channels, AfterValidator(lambda color: _require_least(0, color))
    ] = 0


def _require_least(least: float, value: Any) -> Any:
    if min(value if isinstance(value, Sequence) else (value,)) < least:
        raise ValueError(f"{excerpt(value)} must not be below {least:g}")
    return value


def _resolved(name: str, cfg: Mapping[str, Any], weights: Path, tokenizer: str) -> ResolvedModel:
    """Check a config that comes with a model, and return what open_clip reads of it."""
    _require_harmless(cfg["model_cfg"], name, weights)
    values = cfg.get("preprocess_cfg") or {}
    validated(_PreprocessCfg, values, f"model: {name}", "preprocess_cfg")
    preprocess = {key: values[key] for key in _PreprocessCfg.model_fields if key in values}
    return ResolvedModel(name, cfg["model_cfg"], preprocess, weights, tokenizer)


def _require_harmless(model_cfg: Mapping[str, Any], name: str, weights: Path) -> None:
    """Raise :class:`CheckpointError` for a config that runs its author's code, or that is larger
    than any model.

    open_clip hands ``tokenizer_kwargs`` to transformers, which imports code from the folder of the
    weights if they contain ``trust_remote_code``. Each layer takes time to build, and bytes of the
    weights file.
    """
    layers, most = 0, max(_FEW_LAYERS, weights.stat().st_size // _LAYER_BYTES)
    # Every key and value, however deep.
    pending: list[tuple[str, Any]] = [*model_cfg.items()]
    while pending:
        key, value = pending.pop()
        if key == "trust_remote_code" and value:
            raise CheckpointError(
                f"model: {name}: refused: its config has trust_remote_code, which runs code that "
                "comes with the model; remove it, and use a tokenizer that needs none"
            )
        if key in ("hf_tokenizer_name", "hf_model_name") and isinstance(value, str):
            _require_no_code(Path(value), name, key)
        limit = _MAX_SIZES.get(key, _MAX_SIZE)
        if isinstance(value, int) and value > limit:
            raise CheckpointError(
                f"model: {name}: its config has {key} {excerpt(value)}; at most {limit:,} is "
                "allowed"
            )
        if isinstance(value, int) and _LAYERS.search(str(key)):
            layers += value
            if layers > most:
                raise CheckpointError(
                    f"model: {name}: its config has {layers:,} layers, and {weights.name} is too "
                    f"small for more than {most}; is it the config of another model?"
                )
        if isinstance(value, Mapping):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(key, each) for each in value]


def _require_no_code(folder: Path, name: str, key: str) -> None:
    """Raise :class:`CheckpointError` for a tokenizer or a tower with code of its own.

    One of the hub's is refused where it is loaded (``models.skeleton``).
    """
    for file in (folder / "tokenizer_config.json", folder / "config.json"):
        content = read_json(file) if exists(file) else None
        if isinstance(content, dict) and content.get("auto_map"):
            raise CheckpointError(
                f"model: {name}: refused: {key} {excerpt(str(folder))} has code of its own "
                f"(auto_map in {file.name}), which is never run; use one that transformers knows"
            )
