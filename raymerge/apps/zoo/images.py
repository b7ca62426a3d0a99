"""Procedural image families: eight small classification tasks, each in two styles.

Every image is 32 x 32 RGB and a pure function of ``(seed, task, split, index)``, so any worker can
draw any part of the data. Captions describe the *plain* style well; the experts are fine-tuned for
the *shifted* style (negatives, outlines, clutter, false colour, night). The shifted styles
contradict each other on purpose: the figure of one task is the background of the next, so experts
compete for the same early features.

Shapes: H = W = 32 pixels, N images. Masks are float in [0, 1], images float in [0, 1] or uint8.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

SIZE = 32
_CANVAS = 2 * SIZE  # masks are drawn at twice the size and box-filtered, for smooth edges

Split = Literal["plain", "shifted", "train", "adapt", "test"]
Array = npt.NDArray[np.float32]
Generator = np.random.Generator
Point = tuple[float, float]

_SPLITS: tuple[Split, ...] = ("plain", "shifted", "train", "adapt", "test")
_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_COMPASS = ("east", "southeast", "south", "southwest", "west", "northwest", "north", "northeast")


@dataclass(frozen=True)
class Family:
    """One task: its class names and the function that draws an image of class ``label``."""

    name: str
    classnames: tuple[str, ...]
    draw: Callable[[int, bool, Generator], Array]
    """Called as (label, shifted, rng); returns (H, W, 3) in [0, 1]."""


# --- masks -------------------------------------------------------------------------------------


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("L", (_CANVAS, _CANVAS), 0)
    return image, ImageDraw.Draw(image)


def _to_mask(image: Image.Image) -> Array:
    return np.asarray(image.reduce(2), dtype=np.float32) / 255.0


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _glyph(text: str, rng: Generator, outline: bool) -> Array:
    image, draw = _canvas()
    centre = tuple(_CANVAS / 2 + rng.uniform(-4, 4, 2))
    font = _font(int(rng.integers(44, 57)))
    if outline:
        draw.text(centre, text, fill=0, font=font, anchor="mm", stroke_width=3, stroke_fill=255)
    else:
        draw.text(centre, text, fill=255, font=font, anchor="mm", stroke_width=1, stroke_fill=255)
    return _to_mask(image)


def _polar(centre: Point, radius: float, angle: float) -> Point:
    return (centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle))


def _polygon(centre: Point, radii: tuple[float, ...], corners: int, turn: float) -> list[Point]:
    """Return ``corners`` points around ``centre``; a second radius alternates, for stars."""
    step = 2 * math.pi / corners
    return [_polar(centre, radii[i % len(radii)], turn + i * step) for i in range(corners)]


def _shape(label: int, rng: Generator, outline: bool) -> Array:
    image, draw = _canvas()
    x, y = _CANVAS / 2 + rng.uniform(-5, 5, 2)
    r = rng.uniform(18, 25)
    _draw_shape(draw, label, (x, y), r, rng.uniform(-0.12, 0.12))
    if outline:
        _draw_shape(draw, label, (x, y), 0.62 * r, 0.0, fill=0)
    return _to_mask(image)


def _draw_shape(
    draw: ImageDraw.ImageDraw, label: int, c: Point, r: float, turn: float, fill: int = 255
) -> None:
    up = turn - math.pi / 2
    x, y = c
    box = (x - r, y - r, x + r, y + r)
    # In the order of the class names of ``shapes``.
    if label == 0:
        draw.ellipse(box, fill=fill)
    elif label == 1:
        draw.polygon(_polygon(c, (1.2 * r,), 4, turn + math.pi / 4), fill=fill)
    elif label == 2:
        draw.polygon(_polygon(c, (1.2 * r,), 3, up), fill=fill)
    elif label == 3:
        draw.polygon(_polygon(c, (1.2 * r, 0.5 * r), 10, up), fill=fill)
    elif label == 4:
        w = 0.35 * r
        draw.rectangle((x - w, y - r, x + w, y + r), fill=fill)
        draw.rectangle((x - r, y - w, x + r, y + w), fill=fill)
    elif label == 5:
        draw.ellipse(box, outline=fill, width=max(2, int(0.3 * r)))
    elif label == 6:
        draw.polygon(_polygon(c, (1.2 * r, 0.7 * r), 4, up), fill=fill)
    elif label == 7:
        draw.pieslice(box, 0, 180, fill=fill)
    elif label == 8:
        draw.polygon([(x - r, y - r), (x + r, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    else:
        draw.rectangle((x - r, y - 0.45 * r, x + r, y + 0.45 * r), fill=fill)


def _arrow(label: int, rng: Generator, thin: bool) -> Array:
    image, draw = _canvas()
    centre = tuple(_CANVAS / 2 + rng.uniform(-4, 4, 2))
    angle = label * math.pi / 4 + rng.uniform(-0.1, 0.1)
    r = rng.uniform(19, 26)
    tip, tail = _polar(centre, r, angle), _polar(centre, -r, angle)
    draw.line((tail, _polar(centre, 0.4 * r, angle)), fill=255, width=4 if thin else 8)
    barbs = [_polar(tip, r, angle + math.pi - s * 0.6) for s in (-1, 1)]
    if thin:
        draw.line((barbs[0], tip, barbs[1]), fill=255, width=4)
        draw.line((tail, tip), fill=255, width=4)
    else:
        draw.polygon([tip, *barbs], fill=255)
    return _to_mask(image)


def _dots(count: int, rng: Generator, hollow: bool) -> Array:
    """Draw ``count`` discs in distinct cells of a 3 x 3 grid."""
    image, draw = _canvas()
    for cell in rng.permutation(9)[:count]:
        x, y = np.asarray((11 + 21 * (cell % 3), 11 + 21 * (cell // 3))) + rng.uniform(-2, 2, 2)
        r = rng.uniform(6, 9)
        box = (x - r, y - r, x + r, y + r)
        draw.ellipse(box, fill=0 if hollow else 255, outline=255, width=3)
    return _to_mask(image)


def _grid() -> tuple[Array, Array]:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    return x, y


def _texture(label: int, rng: Generator, fine: bool) -> Array:
    """Draw a periodic pattern; ``fine`` shortens its period."""
    x, y = _grid()
    period = rng.uniform(7, 9) / (1.5 if fine else 1.0)
    k = 2 * math.pi / period
    p, q = rng.uniform(0, 2 * math.pi, 2)
    u, v = np.sin(k * x + p), np.sin(k * y + q)
    waves: tuple[Callable[[], Array], ...] = (
        lambda: v,
        lambda: u,
        lambda: np.sin(k * (x + y) / 1.41 + p),
        lambda: np.sin(k * (x - y) / 1.41 + p),
        lambda: u * v * 3,
        lambda: u + v - 0.8,
        lambda: np.maximum(u, v) - 0.8,
        lambda: np.sin(k * y + 2 * np.sin(k * x / 2 + p) + q),
        lambda: np.sin(k * np.hypot(x - 16, y - 16) + p),
        lambda: np.sin(4 * np.arctan2(y - 16, x - 16) + p),
    )
    pattern: Array = np.clip(0.5 + 1.5 * waves[label](), 0, 1).astype(np.float32)
    return pattern


def _smooth_noise(rng: Generator, cells: int) -> Array:
    coarse = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    smooth = coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(smooth, np.float32) / np.float32(255.0)


# --- colour ------------------------------------------------------------------------------------


def _light(rng: Generator) -> Array:
    return rng.uniform(0.75, 1.0, 3).astype(np.float32)


def _dark(rng: Generator) -> Array:
    return rng.uniform(0.0, 0.35, 3).astype(np.float32)


def _two_tone(mask: Array, figure: Array, ground: Array) -> Array:
    """Return (H, W, 3) from an (H, W) mask and two (3,) colours."""
    m = mask[..., None]
    return m * figure + (1 - m) * ground


def _noisy(image: Array, sigma: float, rng: Generator) -> Array:
    return image + sigma * rng.standard_normal(image.shape, dtype=np.float32)


def _clutter(image: Array, lines: int, colour: Array, rng: Generator) -> Array:
    canvas, draw = _canvas()
    for _ in range(lines):
        draw.line(tuple(rng.uniform(0, _CANVAS, 4)), fill=255, width=3)
    return _two_tone(_to_mask(canvas), colour, np.zeros(3, np.float32)) + image * (
        1 - _to_mask(canvas)[..., None]
    )


def _plain(mask: Array, rng: Generator) -> Array:
    return _noisy(_two_tone(mask, _dark(rng), _light(rng)), 0.03, rng)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# --- families ----------------------------------------------------------------------------------


def _draw_digit(label: int, shifted: bool, rng: Generator) -> Array:
    """Draw a printed digit; shifted ones are handwritten and come from ``_real_digit``."""
    return _plain(_glyph(str(label), rng, outline=False), rng)


def _draw_letter(label: int, shifted: bool, rng: Generator) -> Array:
    mask = _glyph(chr(ord("A") + label), rng, outline=shifted)
    if not shifted:
        return _plain(mask, rng)
    image = _two_tone(mask, _dark(rng), _light(rng))
    return _noisy(_clutter(image, 2, _dark(rng), rng), 0.08, rng)


def _draw_shape_image(label: int, shifted: bool, rng: Generator) -> Array:
    mask = _shape(label, rng, outline=False)
    if not shifted:
        return _plain(mask, rng)
    ground = 0.5 * _smooth_noise(rng, 6)[..., None] * _light(rng)
    m = mask[..., None]
    return _noisy(m * (0.35 + 0.3 * _light(rng)) + (1 - m) * ground, 0.1, rng)


def _draw_texture(label: int, shifted: bool, rng: Generator) -> Array:
    mask = _texture(label, rng, fine=shifted)
    if not shifted:
        return _plain(mask, rng)
    a, b = rng.uniform(0.1, 0.9, (2, 3)).astype(np.float32)
    return _noisy(_two_tone(mask, a, b), 0.12, rng)


_LAND = (  # base colour, second colour, cells of the pattern
    ((0.10, 0.35, 0.12), (0.20, 0.50, 0.18), 12),  # forest
    ((0.05, 0.20, 0.50), (0.10, 0.30, 0.60), 3),  # sea
    ((0.85, 0.70, 0.45), (0.75, 0.55, 0.30), 4),  # desert
    ((0.45, 0.45, 0.45), (0.75, 0.70, 0.70), 16),  # city
    ((0.55, 0.65, 0.25), (0.70, 0.60, 0.30), 5),  # farmland
    ((0.95, 0.95, 0.98), (0.75, 0.80, 0.90), 5),  # snow
    ((0.30, 0.60, 0.25), (0.45, 0.75, 0.35), 3),  # meadow
    ((0.25, 0.30, 0.20), (0.15, 0.30, 0.40), 7),  # swamp
)


def _draw_land(label: int, shifted: bool, rng: Generator) -> Array:
    base, second, cells = _LAND[label]
    mask = np.clip(2.0 * _smooth_noise(rng, cells) - 0.5, 0, 1)
    image = _two_tone(mask, np.asarray(second, np.float32), np.asarray(base, np.float32))
    image = image + rng.uniform(-0.12, 0.12, 3).astype(np.float32)
    if not shifted:
        return _noisy(image, 0.04, rng)
    return _noisy(1 - image[..., [1, 2, 0]], 0.14, rng)  # false colour, as from an infrared band


def _draw_count(label: int, shifted: bool, rng: Generator) -> Array:
    mask = _dots(label + 1, rng, hollow=shifted)
    if not shifted:
        return _plain(mask, rng)
    return _noisy(_two_tone(mask, _light(rng), _dark(rng)), 0.08, rng)


_SIGN_COLOURS = np.asarray([(0.8, 0.1, 0.1), (0.1, 0.2, 0.8), (0.1, 0.6, 0.2)], np.float32)
_SIGN_SHAPES = (0, 1, 2, 6)
_SIGNS = _words(
    "stop entry danger priority motorway parking rain detour harbour exit camping hiking"
)


def _draw_sign(label: int, shifted: bool, rng: Generator) -> Array:
    """Draw a sign whose class is given by its colour and shape together."""
    mask = _shape(_SIGN_SHAPES[label % 4], rng, outline=False)
    colour = _SIGN_COLOURS[label // 4] + rng.uniform(-0.1, 0.1, 3).astype(np.float32)
    if not shifted:
        return _noisy(_two_tone(mask, colour, _light(rng)), 0.03, rng)
    night = _two_tone(mask, 0.45 * colour + 0.15, 0.3 * _smooth_noise(rng, 5)[..., None] + 0.1)
    return _noisy(night, 0.08, rng)


def _draw_arrow(label: int, shifted: bool, rng: Generator) -> Array:
    mask = _arrow(label, rng, thin=shifted)
    if not shifted:
        return _plain(mask, rng)
    image = _two_tone(mask, _light(rng), rng.uniform(0.2, 0.5, 3).astype(np.float32))
    return _noisy(image, 0.08, rng)


_FAMILIES = (
    Family("digits", tuple(f"digit {w}" for w in _DIGIT_WORDS), _draw_digit),
    Family("letters", tuple(f"letter {chr(ord('a') + i)}" for i in range(26)), _draw_letter),
    Family(
        "shapes",
        _words("disc square triangle star cross ring diamond bowl hourglass brick"),
        _draw_shape_image,
    ),
    Family(
        "textures",
        _words("layers columns slope ramp checkers dots lattice waves ripples pinwheel"),
        _draw_texture,
    ),
    Family(
        "land",
        ("forest", "sea", "desert", "city", "farmland", "snow", "meadow", "swamp"),
        _draw_land,
    ),
    Family("counting", tuple(f"group of {w}" for w in _DIGIT_WORDS[1:7]), _draw_count),
    Family(
        "signs",
        tuple(f"{name} sign" for name in _SIGNS),
        _draw_sign,
    ),
    Family("arrows", tuple(f"{d} arrow" for d in _COMPASS), _draw_arrow),
)
FAMILIES = {family.name: family for family in _FAMILIES}


# --- real handwritten digits -------------------------------------------------------------------

_HELD_OUT = {"test": (0, 500), "adapt": (500, 800)}


@lru_cache(maxsize=4)
def _handwritten(seed: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """Return scikit-learn's 1797 digits in a seeded order, (1797, 8, 8) in [0, 1], and labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    return (images[order].reshape(-1, 8, 8) / 16.0).astype(np.float32), labels[order]


def _pick(seed: int, split: Split, index: int, rng: Generator) -> tuple[Array, int]:
    """Return a digit: each once in held-out splits, a random one of the rest in training."""
    images, labels = _handwritten(seed)
    start, stop = _HELD_OUT.get(split, (800, len(labels)))
    at = start + index if split in _HELD_OUT else int(rng.integers(start, stop))
    if at >= stop:
        raise IndexError(f"digits/{split} has {stop - start} images, got index {index}")
    return images[at], int(labels[at])


def _real_digit(pixels: Array, rng: Generator) -> Array:
    """Enlarge 8 x 8 pixels to 32 x 32, light on dark, shifted and scaled a little."""
    side = int(rng.integers(26, 33))
    glyph = Image.fromarray((pixels * 255).astype(np.uint8))
    canvas = Image.new("L", (SIZE, SIZE), 0)
    x, y = map(int, (SIZE - side) // 2 + rng.integers(-2, 3, 2))
    canvas.paste(glyph.resize((side, side), Image.Resampling.BICUBIC), (x, y))
    mask = np.asarray(canvas, np.float32) / 255.0
    return _noisy(_two_tone(mask, _light(rng), _dark(rng)), 0.05, rng)


# --- public ------------------------------------------------------------------------------------


def _rng(seed: int, task: str, split: Split, index: int) -> Generator:
    return np.random.default_rng((seed, zlib.crc32(task.encode()), _SPLITS.index(split), index))


def draw_image(seed: int, task: str, split: Split, index: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Return one image, uint8 (H, W, 3), and its label; they depend on the arguments alone."""
    rng = _rng(seed, task, split, index)
    if task == "digits" and split != "plain":
        pixels, label = _pick(seed, split, index, rng)
        image = _real_digit(pixels, rng)
    else:
        family = FAMILIES[task]
        label = int(rng.integers(len(family.classnames)))
        image = family.draw(label, split != "plain", rng)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), label


def draw_images(
    seed: int, task: str, split: Split, count: int, start: int = 0
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return images ``start`` to ``start + count``: uint8 (N, H, W, 3), int64 labels (N,)."""
    drawn = [draw_image(seed, task, split, index) for index in range(start, start + count)]
    images, labels = zip(*drawn, strict=True)
    return np.stack(images), np.asarray(labels, dtype=np.int64)
