"""Images are decoded once, into uint8, and come back by their index in the task's list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from raymerge.data.decoding import PinnedImages, check_image, decode, decode_all, decode_batches
from raymerge.data.folder import ImageList
from raymerge.data.preprocess import Preprocess
from raymerge.errors import DataError

CFG = PreprocessCfg(size=8)


@pytest.fixture(scope="module")
def preprocess() -> Preprocess:
    return Preprocess((8, 8), CFG.mean, CFG.std, image_transform_v2(CFG, is_train=False))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageList:
    """Twenty images, the i-th all of level 10·i: what is decoded tells which file it was."""
    root = tmp_path_factory.mktemp("levels")
    paths = [root / f"{i}.png" for i in range(20)]
    for i, path in enumerate(paths):
        Image.new("RGB", (9, 11), (10 * i,) * 3).save(path)
    return ImageList(tuple(paths), (-1,) * 20)


def _levels(pixels_N3HW: torch.Tensor) -> list[int]:
    assert pixels_N3HW.dtype == torch.uint8
    assert pixels_N3HW.shape[1:] == (3, 8, 8)
    levels = pixels_N3HW.flatten(1)
    assert (levels == levels[:, :1]).all()
    return [int(level) // 10 for level in levels[:, 0]]


def test_decoding_keeps_the_order_of_the_paths(images, preprocess):
    shuffled = [images.items[i] for i in (7, 3, 19, 3)]
    seen = []
    assert _levels(decode_all(shuffled, preprocess, seen.append)) == [7, 3, 19, 3]
    assert sum(seen) == 4


@pytest.mark.parametrize("batch", [1, 3, 7, 20, 64])
def test_batches_are_the_whole_list_cut_in_order(images, preprocess, batch):
    pairs = list(decode_batches(images.items, preprocess, batch))
    assert [start for start, _ in pairs] == list(range(0, 20, batch))
    assert _levels(torch.cat([pixels for _, pixels in pairs])) == list(range(20))


def test_pinned_images_come_back_by_index_in_the_whole_list(images, preprocess):
    pinned = PinnedImages(images, np.array([17, 2, 5, 2, 11]), preprocess)
    assert _levels(pinned.take(np.array([11, 2, 17]))) == [11, 2, 17]
    assert _levels(pinned.take(np.array([5, 5]))) == [5, 5]
    assert pinned.nbytes == 4 * 3 * 8 * 8  # each needed image once, and no other


def test_pinned_images_know_what_they_hold(images, preprocess):
    pinned = PinnedImages(images, np.array([1, 2, 9]), preprocess)
    assert pinned.holds(np.array([9, 1]))
    assert not pinned.holds(np.array([1, 3]))


def _jpeg(path: Path, keep: float = 1.0) -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, quality=90)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    return path


def _png(path: Path, flip: int | None = None) -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    if flip is not None:
        content = bytearray(path.read_bytes())
        content[flip] ^= 0xFF
        path.write_bytes(bytes(content))
    return path


DAMAGED = {
    "empty": lambda root: _jpeg(root / "x.jpg", keep=0),
    "half a JPEG": lambda root: _jpeg(root / "x.jpg", keep=0.5),
    "a JPEG's header": lambda root: _jpeg(root / "x.jpg", keep=0.02),
    "flipped PNG bytes": lambda root: _png(root / "x.png", flip=400),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_image_is_found_before_the_run_and_named(tmp_path, kind):
    path = DAMAGED[kind](tmp_path)
    problem = check_image(path)
    assert isinstance(problem, DataError)
    assert f"image {path}: does not decode" in str(problem)
    assert "\n" not in str(problem)


@pytest.mark.parametrize("kind", ["empty", "half a JPEG", "a JPEG's header"])
def test_a_damaged_image_does_not_decode(tmp_path, preprocess, kind):
    path = DAMAGED[kind](tmp_path)
    with pytest.raises(DataError, match=f"image {path}"):
        decode(path, preprocess)


def test_text_with_an_image_suffix_is_no_image(tmp_path, preprocess):
    path = tmp_path / "x.png"
    path.write_text("not an image at all")
    assert "x.png" in str(check_image(path))
    with pytest.raises(DataError, match=r"x\.png"):
        decode_all([path], preprocess)


def test_a_damaged_image_raises_through_the_threads_that_decode_ahead(images, preprocess, tmp_path):
    bad = _jpeg(tmp_path / "bad.jpg", keep=0.5)
    with pytest.raises(DataError, match=r"bad\.jpg"):
        list(decode_batches([*images.items[:5], bad], preprocess, 2))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "webp", "tiff", "ppm"])
def test_sound_images_pass_the_check(tmp_path, preprocess, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (12, 10), (1, 2, 3)).save(path)
    assert check_image(path) is None
    assert decode(path, preprocess).shape == (3, 8, 8)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n"


def test_a_program_that_is_named_as_an_image_is_not_run(tmp_path, preprocess, monkeypatch):
    """Pillow goes by the content, and gives PostScript to Ghostscript."""
    called = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args: called.append(args))
    (tmp_path / "x.jpg").write_bytes(EPS)
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == "EPS"
    with pytest.raises(DataError, match="does not decode"):
        decode(tmp_path / "x.jpg", preprocess)
    assert check_image(tmp_path / "x.jpg") is not None
    assert called == []


@pytest.mark.parametrize("size", [(4_000_000, 1), (1, 4_000_000)])
def test_an_image_that_would_be_enormous_when_scaled(tmp_path, preprocess, size):
    """Its shortest side becomes 8: 4 MB of pixels would be 32 million by 8."""
    Image.new("L", size).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="too long for its width"):
        decode(tmp_path / "x.png", preprocess)
