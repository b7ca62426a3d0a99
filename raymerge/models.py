"""open_clip's module for the pretrained model, its preprocessing, and an encoder over flat θ.

Legend: P parameters, B images, D features.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.transforms import Compose, ToTensor

from raymerge.architecture import CONFIG_FILE, ResolvedModel, unmerged_tensors
from raymerge.checkpoints.visual import VisualCheckpoint
from raymerge.errors import CheckpointError, UserError
from raymerge.flat import view_flat
from raymerge.merging.layout import ParameterLayout

_MOST_SCALED_PIXELS = 1 << 26
OpenClipModel = Any
"""open_clip's CLIP, CustomTextCLIP or CoCa; open_clip has no types."""


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


def build_model(resolved: ResolvedModel, pretrained: VisualCheckpoint) -> OpenClipModel:
    """The pretrained model on the CPU, in float32 and evaluation mode, without gradients.

    The merged tensors of its visual tower are left unset: :class:`FlatEncoder` brings its own.
    """
    with _NoRandomWeights():
        model = build_skeleton(resolved)
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in unmerged_tensors(pretrained)
    }
    model.load_state_dict(state, strict=False, assign=True)  # the names have been checked
    return model.eval().requires_grad_(False)


def activation_bytes(visual: nn.Module) -> int:
    """Bytes that a float32 forward pass of one image keeps for its backward pass.

    ``visual``: the tower on ``meta``, where this costs neither time nor memory.
    """
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    height, width = make_preprocess(visual).size
    image = torch.empty(1, 3, height, width, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = visual.train(False).requires_grad_(True)(image)
    weights = {p.untyped_storage()._cdata for p in visual.parameters()}
    del output
    return sum(size for storage, size in kept.items() if storage not in weights)


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


class _NoRandomWeights(TorchFunctionMode):
    """Leaves tensors as they are where a module would draw random weights (seconds at ViT-B)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        in_place = func in (Tensor.normal_, Tensor.uniform_)
        if in_place or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            func = torch.empty
        return func(*args, **(kwargs or {}))


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
        """(3, H, W) uint8 at the model's resolution. Raises :class:`ValueError` for an image so
        long that the scaled one, before it is cropped, would be enormous."""
        ratio = max(image.size) / max(1, min(image.size))
        if ratio * max(self.size) ** 2 > _MOST_SCALED_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels: too long for its width")
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
    """open_clip's image encoder over flat vectors (``view_flat``)."""

    def __init__(
        self,
        model: nn.Module,
        layout: ParameterLayout,
        device: torch.device,
        columns: int | None = None,
    ) -> None:
        columns = layout.columns if columns is None else columns
        self.theta_P = torch.zeros(columns, device=device)
        self.gradient_P = torch.zeros(columns, device=device)
        self.preprocess = make_preprocess(model.visual)
        self.device = device
        self._model: OpenClipModel = model.to(device).eval()
        view_flat(self.visual, layout, self.theta_P, self.gradient_P)

    @property
    def visual(self) -> nn.Module:
        """The tower itself."""
        visual: nn.Module = self._model.visual
        return visual

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
