"""The images of a training step: their order and their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_world import CLASSES, TrainingWorld
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from raymerge.apps.finetune import images as module
from raymerge.apps.finetune.images import (
    TrainingImages,
    make_augment,
    may_keep,
    step_indices,
    steps_per_epoch,
)
from raymerge.config import ModelConfig
from raymerge.data.folder import ImageList, labelled_images
from raymerge.data.preprocess import Preprocess, make_preprocess
from raymerge.errors import DataError
from raymerge.models.resolve import resolve_model
from raymerge.models.skeleton import build_skeleton


@pytest.fixture(scope="module")
def visual(training_world: TrainingWorld) -> object:
    model = ModelConfig(arch=f"local-dir:{training_world.root / 'pretrained'}")
    return build_skeleton(resolve_model(model), "meta").visual


@pytest.fixture(scope="module")
def preprocess(visual: object) -> Preprocess:
    return make_preprocess(visual)


@pytest.fixture(scope="module")
def listed(training_world: TrainingWorld) -> ImageList:
    folder = training_world.root / "data" / "colour" / "train"
    return labelled_images(str(folder), CLASSES["colour"], "here")


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order() -> None:
    assert [steps_per_epoch(n, 4) for n in (1, 4, 5, 10)] == [1, 1, 2, 3]
    epochs = [
        [int(i) for step in range(first, first + 3) for i in step_indices(0, "a", step, 4, 10)]
        for first in (0, 3)
    ]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_order_is_a_pure_function_of_seed_task_and_epoch() -> None:
    def order(seed: int, task: str, step: int) -> list[int]:
        return step_indices(seed, task, step, 50, 50).tolist()

    assert order(0, "a", 7) == order(0, "a", 7)
    orders = [order(0, "a", 7), order(1, "a", 7), order(0, "b", 7), order(0, "a", 8)]
    assert len({tuple(each) for each in orders}) == 4


def test_images_that_are_kept_are_those_that_are_decoded(
    listed: ImageList, preprocess: Preprocess
) -> None:
    kept = TrainingImages("colour", listed, 0, 4, preprocess, keep=True)
    decoded = TrainingImages("colour", listed, 0, 4, preprocess)
    for step in range(9):
        for a, b in zip(kept.batch(step), decoded.batch(step), strict=True):
            assert torch.equal(a, b)
    pixels, labels = kept.batch(1)
    for pixel, label, i in zip(pixels, labels, step_indices(0, "colour", 1, 4, 15), strict=True):
        assert label == listed.labels[i]
        assert torch.equal(pixel, preprocess.to_pixels(Image.open(listed.items[i])))


def test_images_are_kept_if_they_fit_and_are_not_augmented(
    preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert may_keep(100, preprocess, "none")
    assert not may_keep(100, preprocess, "open_clip")
    monkeypatch.setattr(module, "_KEEP_BYTES", 100 * 3 * 32 * 32 - 1)
    assert not may_keep(100, preprocess, "none")
    assert may_keep(99, preprocess, "none")


def test_augmentation_is_open_clips_and_depends_on_seed_task_epoch_and_image(
    listed: ImageList, preprocess: Preprocess, visual: object
) -> None:
    def batch(seed: int, step: int) -> torch.Tensor:
        images = TrainingImages("colour", listed, seed, 15, preprocess, make_augment(visual))
        pixels, _ = images.batch(step)
        order = step_indices(seed, "colour", step, 15, 15)
        return pixels[torch.from_numpy(np.argsort(order))]

    torch.manual_seed(0)
    first = batch(0, 0)
    torch.manual_seed(1)  # the process's own generator does not matter
    assert torch.equal(batch(0, 0), first)
    assert not torch.equal(batch(0, 1), first)
    assert not torch.equal(batch(1, 0), first)
    # The transform itself: open_clip's, with the same numbers.
    key = module._key("0/colour/0/3")
    torch.manual_seed(key % 2**63)
    theirs = image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=True)
    expected = theirs(Image.open(listed.items[3]))
    assert torch.equal(preprocess.normalise(first[3:4])[0], expected)


def test_a_damaged_image_is_named(preprocess: Preprocess, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not an image")
    images = TrainingImages("x", ImageList((tmp_path / "a.png",), (0,)), 0, 4, preprocess)
    with pytest.raises(DataError, match=r"a\.png: does not decode"):
        images.batch(0)
