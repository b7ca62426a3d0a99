"""Images are decoded once, into uint8, and come back by their index in the task's list."""

from __future__ import annotations

import struct
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


# --- more than 8 bits, and other kinds of pixels --------------------------------------------------

GRADIENT = np.linspace(0, 65535, 24 * 24).reshape(24, 24)


def _plain(tmp_path: Path, preprocess: Preprocess, levels: np.ndarray) -> torch.Tensor:
    Image.fromarray(levels.round().astype(np.uint8)).save(tmp_path / "plain.png")
    return decode(tmp_path / "plain.png", preprocess)


def _twelve_bit_tiff(path: Path, levels: np.ndarray) -> Path:
    """Two pixels in three bytes, as cameras pack them; Pillow reads it and cannot write it."""
    pairs = levels.astype(np.uint16).reshape(-1, 2)
    packed = b"".join(
        bytes([int(a) >> 4, (int(a) & 15) << 4 | int(b) >> 8, int(b) & 255]) for a, b in pairs
    )
    height, width = levels.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height,
            279: len(packed)}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    path.write_bytes(head + packed + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


def _deep(path: Path) -> Path:
    if path.suffix == ".pgm":
        head = f"P5 24 24 {65535}\n".encode()
        path.write_bytes(head + GRADIENT.round().astype(">u2").tobytes())
    else:
        Image.fromarray(GRADIENT.round().astype(np.uint16)).save(path)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_in_every_format(tmp_path, preprocess, suffix):
    path = _deep(tmp_path / f"x.{suffix}")
    assert check_image(path) is None
    assert torch.equal(decode(path, preprocess), _plain(tmp_path, preprocess, GRADIENT / 257))


def test_twelve_bits_are_scaled_by_their_own_white(tmp_path, preprocess):
    levels = (GRADIENT / 65535 * 4095).round()
    path = _twelve_bit_tiff(tmp_path / "x.tif", levels)
    assert check_image(path) is None
    expected = _plain(tmp_path, preprocess, levels / 4095 * 255)
    assert torch.equal(decode(path, preprocess), expected)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_from_0_to_255_are_read_as_before(tmp_path, preprocess, kind):
    levels = np.tile(np.arange(24) * 10, (24, 1))
    Image.fromarray(levels.astype(kind)).save(tmp_path / "x.tif")
    assert check_image(tmp_path / "x.tif") is None
    with Image.open(tmp_path / "x.tif") as image:
        expected = preprocess.to_pixels(image)
    assert torch.equal(decode(tmp_path / "x.tif", preprocess), expected)


@pytest.mark.parametrize(
    ("levels", "span"),
    [
        (np.array([[0, 70_000]], np.int32), "int32 from 0 to 70000"),
        (np.array([[-5, 200]], np.int32), "int32 from -5 to 200"),
        (np.array([[0, 300.5]], np.float32), r"float32 from 0 to 300\.5"),
        (np.array([[0, 0.75]], np.float32), r"float32 from 0 to 0\.75"),
        (np.array([[0, np.nan]], np.float32), "float32 from nan to nan"),
        (np.array([[0, np.inf]], np.float32), "float32 from 0 to inf"),
    ],
)
def test_pixels_that_would_be_clipped_or_black_are_named(tmp_path, preprocess, levels, span):
    Image.fromarray(levels).save(tmp_path / "x.tif")
    message = (
        rf"image {tmp_path}/x\.tif: does not decode \(its pixels are {span}, which have no white"
    )
    with pytest.raises(DataError, match=message):
        decode(tmp_path / "x.tif", preprocess)
    assert "have no white" in str(check_image(tmp_path / "x.tif"))


KINDS = {
    "CMYK": lambda image: image.convert("CMYK"),
    "palette": lambda image: image.convert("P"),
    "grey with alpha": lambda image: image.convert("LA"),
    "alpha": lambda image: image.convert("RGBA"),
    "one bit": lambda image: image.convert("1"),
    "YCbCr": lambda image: image.convert("YCbCr"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_pixels_are_open_clips(tmp_path, preprocess, kind):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    path = tmp_path / ("x.jpg" if kind in ("CMYK", "YCbCr") else "x.png")
    options = {"transparency": 3} if kind == "palette" else {}
    KINDS[kind](image).save(path, **options)
    assert check_image(path) is None
    with Image.open(path) as stored:
        expected = image_transform_v2(CFG, is_train=False)(stored)
    found = preprocess.normalise(decode(path, preprocess)[None])[0]
    assert torch.equal(found, expected)
