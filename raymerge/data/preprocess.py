"""The model's validation transform, cut where it leaves uint8.

The first half runs once, when an image is decoded; the second on the device, at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from torchvision.transforms import Compose

_MOST_SCALED_PIXELS = 1 << 26


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
        """Return (3, H, W) uint8 at the model's resolution.

        Raises :class:`ValueError` for an image so long that its scaled copy would be enormous.
        """
        from torchvision.transforms import ToTensor

        ratio = max(image.size) / max(1, min(image.size))
        if ratio * max(self.size) ** 2 > _MOST_SCALED_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels: too long for its width")
        for step in self.transform.transforms:
            if isinstance(step, ToTensor):
                break
            image = step(image)
        return torch.from_numpy(_pixels(image)).permute(2, 0, 1)

    def normalise(self, pixels_B3HW: Tensor) -> Tensor:
        """Return normalised float32, as torchvision's ToTensor and Normalize compute it."""
        mean = pixels_B3HW.new_tensor(self.mean, dtype=torch.float32)[:, None, None]
        std = pixels_B3HW.new_tensor(self.std, dtype=torch.float32)[:, None, None]
        return pixels_B3HW.float().div_(255).sub_(mean).div_(std)


def _pixels(image: Image.Image) -> Any:
    import numpy as np

    return np.array(image, dtype=np.uint8)


def make_preprocess(visual: Any) -> Preprocess:
    """Return the transform of an open_clip visual tower, which may be on ``meta``."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    cfg = PreprocessCfg(**visual.preprocess_cfg)
    size = cfg.size if isinstance(cfg.size, tuple) else (cfg.size, cfg.size)
    transform = image_transform_v2(cfg, is_train=False)
    return Preprocess((size[0], size[1]), tuple(cfg.mean), tuple(cfg.std), transform)
