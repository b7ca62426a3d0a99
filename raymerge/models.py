"""The pretrained model: where it comes from, open_clip's module for it, an encoder over flat θ.

Legend: P parameters, B images, D features.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import merge_preprocess_dict
from open_clip.pretrained import download_pretrained
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose, ToTensor

from raymerge.checkpoints.reader import Checkpoint, locate, open_checkpoint, read_json
from raymerge.checkpoints.visual import VisualCheckpoint, match_visual
from raymerge.config import ModelConfig
from raymerge.errors import CheckpointError, ConfigError, UserError
from raymerge.merging.layout import ParameterLayout

OpenClipModel = Any
"""open_clip's CLIP, CustomTextCLIP or CoCa; open_clip has no types."""

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"

# OpenAI's own state dicts carry these numbers beside the weights; open_clip drops them as well.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


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
    def config_json(self) -> str:
        """``open_clip_config.json`` of a folder that open_clip loads as ``local-dir:``."""
        cfg = {"model_cfg": self.model_cfg, "preprocess_cfg": self.preprocess_cfg}
        return json.dumps(cfg, indent=2) + "\n"


def resolve_model(config: ModelConfig) -> ResolvedModel:
    """Find the architecture and the weights; downloads tags and hub models. Reads no tensor."""
    arch = config.arch
    if arch.startswith("local-dir:"):
        folder = Path(arch.removeprefix("local-dir:"))
        cfg = _model_json(folder / CONFIG_FILE)
        return _resolved(arch, cfg, locate(str(folder)), tokenizer=arch)
    if arch.startswith("hf-hub:"):
        return _resolved(arch, _hub_config(arch), locate(arch), tokenizer=arch)
    if arch.endswith(".json"):
        assert config.pretrained is not None  # ModelConfig requires it here
        return _resolved(arch, _model_json(Path(arch)), locate(config.pretrained), tokenizer="")
    return _resolve_builtin(arch.replace("/", "-"), str(config.pretrained))


def _resolve_builtin(arch: str, pretrained: str) -> ResolvedModel:
    model_cfg = open_clip.get_model_config(arch)
    if model_cfg is None:
        raise ConfigError(f"model.arch: {arch!r} is no open_clip architecture{_close_to(arch)}")
    tag = open_clip.get_pretrained_cfg(arch, pretrained)
    if not tag:
        if not Path(pretrained).exists() and "/" not in pretrained:
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
            f"({' '.join(str(error).split())[:160]}); give a local file instead"
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
    preprocess = merge_preprocess_dict(asdict(PreprocessCfg()), dict(cfg.get("preprocess_cfg", {})))
    preprocess.pop("size", None)  # the model's own image size decides
    return ResolvedModel(name, cfg["model_cfg"], preprocess, weights, tokenizer)


def _model_json(path: Path) -> dict[str, Any]:
    """An ``open_clip_config.json``, or a bare model_cfg as open_clip ships them."""
    if not path.is_file():
        raise CheckpointError(f"model: {path}: no such file")
    cfg = read_json(path)
    if isinstance(cfg, dict) and "vision_cfg" in cfg:
        cfg = {"model_cfg": cfg}
    if not isinstance(cfg, dict) or not isinstance(cfg.get("model_cfg"), dict):
        raise CheckpointError(f"model: {path}: holds neither a model_cfg nor a vision_cfg")
    return cfg


def _hub_config(arch: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(arch.removeprefix("hf-hub:"), CONFIG_FILE))
    except Exception as error:  # offline, unknown id, gated: one line for all of them
        raise CheckpointError(
            f"model: {arch}: {CONFIG_FILE} cannot be fetched ({' '.join(str(error).split())[:160]})"
        ) from error
    return _model_json(path)


def _close_to(arch: str) -> str:
    import difflib

    guess = difflib.get_close_matches(arch, open_clip.list_models(), 3, cutoff=0.7)
    return f"; did you mean {' or '.join(guess)}?" if guess else "; see open_clip.list_models()"


# --- open_clip's module ------------------------------------------------------------------------


def build_skeleton(resolved: ResolvedModel, device: str = "cpu") -> OpenClipModel:
    """open_clip's module with random weights; on ``meta`` it costs neither time nor memory."""
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
                f"({type(error).__name__}: {' '.join(str(error).split())[:160]})"
            ) from error


def build_model(resolved: ResolvedModel) -> OpenClipModel:
    """The pretrained model, on the CPU, in evaluation mode, without gradients."""
    model = build_skeleton(resolved)
    checkpoint = open_checkpoint(resolved.weights)
    model.load_state_dict(whole_state_dict(checkpoint))
    return model.eval().requires_grad_(False)


def whole_state_dict(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of a whole CLIP under open_clip's own names."""
    return {
        key.removeprefix("module."): checkpoint.read(key)
        for key in checkpoint.specs
        if key not in _NOT_WEIGHTS
    }


def open_pretrained(resolved: ResolvedModel) -> tuple[VisualCheckpoint, int]:
    """θ₀, checked against the architecture, and the size of the text parameters beside it.

    The text parameters counted are those that the official release leaves in its pickled encoders;
    ``trim_scope: full`` counts them as zero deltas. Raises :class:`CheckpointError`.
    """
    skeleton = build_skeleton(resolved, "meta")
    checkpoint = open_checkpoint(resolved.weights)
    stored = {k.removeprefix("module."): s for k, s in checkpoint.specs.items()}
    expected = {k: tuple(t.shape) for k, t in skeleton.state_dict().items()}
    _require_whole(checkpoint.path, {k: s.shape for k, s in stored.items()}, expected)
    layout = ParameterLayout.of(skeleton.visual.state_dict())
    leftovers = sum(
        math.prod(spec.shape)
        for key, spec in stored.items()
        if key.split(".")[0]
        in ("positional_embedding", "text_projection", "logit_scale", "token_embedding", "ln_final")
    )
    return match_visual(checkpoint, layout), leftovers


def _require_whole(
    path: Path, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    missing = sorted(expected.keys() - stored.keys())
    unexpected = sorted(stored.keys() - expected.keys() - set(_NOT_WEIGHTS))
    if missing or unexpected:
        first = f"missing {missing[0]}" if missing else f"unexpected {unexpected[0]}"
        raise CheckpointError(
            f"pretrained {path}: does not fit the architecture: {len(missing)} tensors missing, "
            f"{len(unexpected)} unexpected ({first}); it must be a whole open_clip model"
        )
    for key, shape in expected.items():
        if stored[key] != shape:
            raise CheckpointError(
                f"pretrained {path}: {key} has shape {list(stored[key])}, the architecture "
                f"wants {list(shape)}"
            )


def make_tokenizer(resolved: ResolvedModel) -> Callable[[list[str]], Tensor]:
    with _folder(resolved) as folder, _quiet_open_clip():
        tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(
            resolved.tokenizer or f"local-dir:{folder}"
        )
    return tokenizer


@contextmanager
def _folder(resolved: ResolvedModel) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="raymerge-") as name:
        (Path(name) / CONFIG_FILE).write_text(resolved.config_json, encoding="utf-8")
        yield Path(name)


@contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """open_clip reports each model without weights on the root logger; here that is intended."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


# --- images in, features out -------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocess:
    """The model's validation transform, cut before it leaves uint8.

    ``to_pixels`` maps an image file's content to what the cache keeps; ``normalise`` does the rest
    on the device.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    transform: Compose

    def to_pixels(self, image: Image.Image) -> Tensor:
        """(3, H, W) uint8 at the model's resolution."""
        for step in self.transform.transforms:
            if isinstance(step, ToTensor):
                break
            image = step(image)
        return torch.from_numpy(_pixels(image)).permute(2, 0, 1)

    def normalise(self, pixels_B3HW: Tensor) -> Tensor:
        """uint8 → normalised float32, as torchvision's ToTensor and Normalize do it."""
        mean = pixels_B3HW.new_tensor(self.mean, dtype=torch.float32)[:, None, None]
        std = pixels_B3HW.new_tensor(self.std, dtype=torch.float32)[:, None, None]
        return pixels_B3HW.float().div_(255).sub_(mean).div_(std)


def _pixels(image: Image.Image) -> Any:
    import numpy as np

    return np.array(image, dtype=np.uint8)


def make_preprocess(visual: Any) -> Preprocess:
    """From an open_clip visual tower (a skeleton on ``meta`` will do)."""
    cfg = PreprocessCfg(**visual.preprocess_cfg)
    size = cfg.size if isinstance(cfg.size, tuple) else (cfg.size, cfg.size)
    transform = image_transform_v2(cfg, is_train=False)
    return Preprocess((size[0], size[1]), tuple(cfg.mean), tuple(cfg.std), transform)


class FlatEncoder:
    """open_clip's image encoder whose weights and gradients are views into two flat vectors.

    Writing ``theta_P`` changes the model; a backward adds into ``gradient_P``. Buffers such as
    BatchNorm's running statistics are merged too; their gradient stays zero.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ParameterLayout,
        device: torch.device,
        numel: int | None = None,
    ) -> None:
        numel = layout.numel if numel is None else numel
        self.theta_P = torch.zeros(numel, device=device)
        self.gradient_P = torch.zeros(numel, device=device)
        self.preprocess = make_preprocess(model.visual)
        self.device = device
        self._model: OpenClipModel = model.to(device).eval()
        self._view_flat(layout)

    def _view_flat(self, layout: ParameterLayout) -> None:
        visual: Any = self._model.visual
        parameters = dict(visual.named_parameters())
        gradients = layout.views(self.gradient_P)
        for name, view in layout.views(self.theta_P).items():
            if name in parameters:
                parameters[name].data = view
                parameters[name].requires_grad_(True)
                parameters[name].grad = gradients[name]
            else:
                owner, _, leaf = name.rpartition(".")
                visual.get_submodule(owner)._buffers[leaf] = view

    def drop_text(self) -> None:
        """Free everything but the visual tower, once the heads are made."""
        for name, _ in list(self._model.named_children()):
            if name != "visual":
                delattr(self._model, name)

    def features(self, pixels_B3HW: Tensor, autocast: bool = False) -> Tensor:
        """uint8 images → (B, D) float32 features of norm 1; ``autocast``: compute in bfloat16."""
        images = self.preprocess.normalise(pixels_B3HW.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast):
            features_BD = self._model.encode_image(images)
        return nn.functional.normalize(features_BD.float(), dim=-1)
