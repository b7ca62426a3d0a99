"""The training images of a step: their order and their pixels.

The order is a pure function of (seed, task, epoch), so no random state is saved for ``--resume``.

Legend: N images of a task, B of them in a step, H × W the model's resolution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, ToTensor

from raymerge.data.decoding import decode, decode_all
from raymerge.data.images import ImageList, Item
from raymerge.data.preprocess import Preprocess

Augment = Literal["none", "open_clip"]

_KEEP_BYTES = 1 << 31
"""A target's images are decoded once and kept if all of them take at most this."""
_RANDOM = Lock()


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Return the number of steps in an epoch; the last one has the images that remain."""
    return -(-images // batch_size)


def step_indices(
    seed: int, task: str, step: int, batch_size: int, images: int
) -> NDArray[np.int64]:
    """Return the indices (B,) of the images of ``step``; each epoch is shuffled anew."""
    epoch, position = divmod(step, steps_per_epoch(images, batch_size))
    order = np.random.default_rng([seed, _key(task), epoch]).permutation(images)
    return order[position * batch_size : (position + 1) * batch_size]


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


class TrainingImages:
    """One task's labelled images in the order of the steps.

    ``keep``: decode all images now and keep them; otherwise each is decoded when a step needs it.
    """

    def __init__(
        self,
        task: str,
        images: ImageList,
        seed: int,
        batch_size: int,
        preprocess: Preprocess,
        augment: Compose | None = None,
        keep: bool = False,
    ) -> None:
        self.task, self._images = task, images
        self._seed, self._batch_size = seed, batch_size
        self._preprocess, self._augment = preprocess, augment
        self._labels_N = torch.tensor(images.labels)
        self._pixels_N3HW = decode_all(images.items, preprocess) if keep else None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, H, W) uint8 and labels (B,).

        Raises :class:`DataError` for a damaged image.
        """
        count = len(self._images)
        indices_B = step_indices(self._seed, self.task, step, self._batch_size, count)
        rows_B = torch.from_numpy(indices_B)
        labels_B = self._labels_N[rows_B]
        if self._pixels_N3HW is not None:
            return self._pixels_N3HW[rows_B], labels_B
        items = [self._images.items[i] for i in indices_B]
        if self._augment is None:
            return decode_all(items, self._preprocess), labels_B
        epoch = step // steps_per_epoch(count, self._batch_size)
        keys = [_key(f"{self._seed}/{self.task}/{epoch}/{i}") for i in indices_B]
        return decode_augmented(items, keys, self._preprocess, self._augment), labels_B


def may_keep(images: int, preprocess: Preprocess, augment: Augment) -> bool:
    """Return True if the images can be decoded once: without augmentation, and if they fit."""
    height, width = preprocess.size
    return augment == "none" and images * 3 * height * width <= _KEEP_BYTES


# --- augmentation --------------------------------------------------------------------------------


def make_augment(visual: Any) -> Compose:
    """Return open_clip's own training transform for this visual tower."""
    transform: Compose = image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=True)
    return transform


def decode_augmented(
    items: Sequence[Item], keys: Sequence[int], preprocess: Preprocess, augment: Compose
) -> Tensor:
    """Return images (B, 3, H, W) uint8; the augmentation of each depends on its key alone."""

    def work(keyed: tuple[Item, int]) -> Tensor:
        item, key = keyed
        seeded = Compose([_Seeded(augment, key), ToTensor()])
        return decode(item, replace(preprocess, transform=seeded))

    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(work, zip(items, keys, strict=True))))


class _Seeded:
    """A transform up to its ToTensor, with random numbers that are seeded by a key.

    torchvision draws from torch's process-wide generator, so a lock lets one image in at a time.
    """

    def __init__(self, augment: Compose, key: int) -> None:
        self._augment, self._key = augment, key

    def __call__(self, image: Image.Image) -> Image.Image:
        image.load()  # the decoding itself needs no lock
        with _RANDOM:
            torch.default_generator.manual_seed(self._key % 2**63)
            for step in self._augment.transforms:
                if isinstance(step, ToTensor):
                    break
                image = step(image)
        return image
