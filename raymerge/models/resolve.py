"""Which pretrained model: its architecture, its files, and the shapes that both must agree on.

open_clip is imported only where it is needed: it takes seconds, and a static merge of local files
needs none of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raymerge.config import ModelConfig
from raymerge.errors import CheckpointError, ConfigError, did_you_mean, excerpt, one_line
from raymerge.files.atomic import exists
from raymerge.files.urls import is_remote, redact_url
from raymerge.models.checkpoints import huggingface_config
from raymerge.models.checkpoints.locate import hub_file, locate, read_json

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"


def _is_number(value: object, least: float = -1e6) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return least <= value <= 1e6


def _are_channels(values: object, least: float = -1e6) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(_is_number(value, least) for value in values)
    )


# What open_clip's PreprocessCfg takes, but for the size: the model's own image size decides.
_PREPROCESS_KEYS: Mapping[str, Callable[[Any], bool]] = {
    "mode": lambda value: value == "RGB",
    "mean": _are_channels,
    "std": lambda value: _are_channels(value, least=1e-6),
    "interpolation": lambda value: value in ("bicubic", "bilinear", "random"),
    "resize_mode": lambda value: value in ("shortest", "longest", "squash"),
    "fill_color": lambda value: _is_number(value, least=0) or _are_channels(value, least=0),
}

_LARGEST_SIZE = 1 << 24
_MOST = {"layers": 1024, "context_length": 1 << 13}  # a block or a mask is made for each of them


@dataclass(frozen=True)
class ResolvedModel:
    """What open_clip needs to build the model, and the file that holds θ₀ and the text tower."""

    name: str
    model_cfg: Mapping[str, Any]
    preprocess_cfg: Mapping[str, Any]
    weights: Path
    tokenizer: str
    """What ``open_clip.get_tokenizer`` takes; empty: the default tokenizer of ``model_cfg``."""

    @property
    def features(self) -> int:
        """Of an image or a text."""
        return int(self.model_cfg["embed_dim"])

    @property
    def config_json(self) -> str:
        """``open_clip_config.json`` of a folder that open_clip loads as ``local-dir:``."""
        cfg = {"model_cfg": self.model_cfg, "preprocess_cfg": self.preprocess_cfg}
        return json.dumps(cfg, indent=2) + "\n"


def resolve_model(config: ModelConfig) -> ResolvedModel:
    """Find the architecture and the weights; downloads tags and hub models. Reads no tensor."""
    arch = config.arch
    if arch.startswith("local-dir:"):
        return resolve_folder(Path(arch.removeprefix("local-dir:")), arch)
    if is_remote(arch):
        folder = locate(arch).parent
        return replace(resolve_folder(folder, f"local-dir:{folder}"), name=redact_url(arch))
    if arch.startswith("hf-hub:"):
        return resolve_folder(_hub_folder(arch.removeprefix("hf-hub:")), arch)
    if arch.endswith(".json"):
        assert config.pretrained is not None  # ModelConfig requires it here
        return _resolved(arch, _model_json(Path(arch)), locate(config.pretrained), tokenizer="")
    return _resolve_builtin(arch.replace("/", "-"), str(config.pretrained))


def resolve_folder(folder: Path, name: str) -> ResolvedModel:
    """The model in a folder of open_clip's or of Hugging Face's, by the config that is in it."""
    own, theirs = folder / CONFIG_FILE, folder / huggingface_config.CONFIG_FILE
    foreign = exists(theirs) and not exists(own)
    cfg = huggingface_config.read_huggingface(folder) if foreign else _model_json(own)
    weights = locate(name if name.startswith("hf-hub:") else str(folder))
    return _resolved(name, cfg, weights, tokenizer="" if foreign else name)


def _resolve_builtin(arch: str, pretrained: str) -> ResolvedModel:
    import open_clip
    from open_clip.pretrained import download_pretrained

    model_cfg = open_clip.get_model_config(arch)
    if model_cfg is None:
        raise ConfigError(f"model.arch: {arch!r} is no open_clip architecture{_close_to(arch)}")
    tag = open_clip.get_pretrained_cfg(arch, pretrained)
    if not tag:
        if not exists(Path(pretrained)) and "/" not in pretrained:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
            raise ConfigError(
                f"model.pretrained: {pretrained!r} is neither a file nor a tag of {arch} ({tags})"
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
    """OpenAI's weights need QuickGELU; with GELU they silently lose accuracy (open_clip #771)."""
    wants, has = bool(tag_cfg.get("quick_gelu")), bool(model_cfg.get("quick_gelu"))
    if wants == has:
        return
    other = f"{arch}-quickgelu" if wants else arch.removesuffix("-quickgelu")
    raise ConfigError(
        f"model.arch: {arch} uses {'QuickGELU' if has else 'GELU'}, but the {tag} weights were "
        f"trained with {'QuickGELU' if wants else 'GELU'}; use arch: {other}"
    )


def _resolved(name: str, cfg: Mapping[str, Any], weights: Path, tokenizer: str) -> ResolvedModel:
    _require_harmless(cfg["model_cfg"], name)
    given = cfg.get("preprocess_cfg") or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"model: {name}: preprocess_cfg is {excerpt(given)}, not a mapping")
    preprocess = {key: given[key] for key in _PREPROCESS_KEYS if key in given}
    for key, value in preprocess.items():
        if not _PREPROCESS_KEYS[key](value):
            raise CheckpointError(
                f"model: {name}: preprocess_cfg.{key} is {excerpt(value)}, which open_clip has not"
            )
    return ResolvedModel(name, cfg["model_cfg"], preprocess, weights, tokenizer)


def _require_harmless(model_cfg: Mapping[str, Any], name: str) -> None:
    """Refuse a config that runs its author's code, or that is as large as no model is.

    open_clip hands ``tokenizer_kwargs`` to transformers, which imports what is beside the weights
    where it finds ``trust_remote_code`` among them.
    """
    left: list[tuple[str, Any]] = [*model_cfg.items()]
    while left:
        key, value = left.pop()
        if key == "trust_remote_code" and value:
            raise CheckpointError(
                f"model: {name}: refused: its config has trust_remote_code, which runs code that "
                "comes with the model; remove it, and use a tokenizer that needs none"
            )
        most = _MOST.get(key, _LARGEST_SIZE)
        if isinstance(value, int) and value > most:
            raise CheckpointError(
                f"model: {name}: its config has {key} {excerpt(value)}; at most {most:,} is taken"
            )
        if isinstance(value, Mapping):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, each) for each in value]


def _model_json(path: Path) -> dict[str, Any]:
    """An ``open_clip_config.json``, or a bare model_cfg as open_clip ships them."""
    if not exists(path) or not path.is_file():
        raise CheckpointError(f"model: {path}: no such file")
    cfg = read_json(path)
    if isinstance(cfg, dict) and "vision_cfg" in cfg:
        cfg = {"model_cfg": cfg}
    if isinstance(cfg, dict) and "model_type" in cfg:
        return huggingface_config.read_huggingface(path.parent)
    if not isinstance(cfg, dict) or not isinstance(cfg.get("model_cfg"), dict):
        raise CheckpointError(f"model: {path}: holds neither a model_cfg nor a vision_cfg")
    return cfg


def _hub_folder(repository: str) -> Path:
    """Where the config of a hub repository is, of open_clip's or of Hugging Face's."""
    path = hub_file(repository, CONFIG_FILE, missing_ok=True)
    if path is None:
        path = hub_file(repository, huggingface_config.CONFIG_FILE)
        hub_file(repository, huggingface_config.PREPROCESSOR_FILE, missing_ok=True)
    assert path is not None
    return path.parent


def _close_to(arch: str) -> str:
    import open_clip

    return did_you_mean(arch, open_clip.list_models()) or "; see open_clip.list_models()"


# --- the weights ---------------------------------------------------------------------------------
