"""Seven corruptions of Hendrycks & Dietterich (ICLR 2019, arXiv:1903.12261), as in AdaMerging's
robustness tables (ICLR 2024, Tables 4 and 7), without OpenCV, ImageMagick or scikit-image.

Each applies at the image's own resolution and is a pure function of (image, row of its table,
seed). Arithmetic is in levels 0–255. As in the original scripts the result is clipped and its
fraction cut off, except that motion blur rounds, as ImageMagick does. A seed gives every severity
the same draws, so severities differ in strength only.

What differs from the original scripts: the random streams (a numpy Generator's), and the side that
pixelate shrinks (⌊S·c⌋ for each side S of the image at hand, where theirs is always 32 or 224).

Legend: H × W the image's resolution, 3 its RGB channels.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from raymerge.errors import UserError

Pixels = NDArray[np.uint8]
Levels = NDArray[np.float64]
Table = Mapping[str, tuple[tuple[float, ...], ...]]
"""Parameter set → one row of parameters per severity, 1 to 5."""

# (radius in pixels, σ in pixels)
MOTION_BLUR: Table = {
    "cifar": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "imagenet": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
}
# (probability that an element is replaced,)
IMPULSE_NOISE: Table = {
    "cifar": ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
    "imagenet": ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
}
# (σ, as a fraction of full scale,)
GAUSSIAN_NOISE: Table = {
    "cifar": ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
    "imagenet": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
}
# (fraction of each side kept,)
PIXELATE: Table = {
    "cifar": ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)),
    "imagenet": ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
}
# (mean and deviation of the liquid layer, its blur σ in pixels, threshold, strength, 1 for mud):
# the strength is water's factor, or mud's second blur σ in pixels
SPATTER: Table = {
    "cifar": (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
    "imagenet": (
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    ),
}
# (factor on the distance from the channel's mean,)
CONTRAST: Table = {
    "cifar": ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
    "imagenet": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
}
# (quality on libjpeg's scale,)
JPEG: Table = {
    "cifar": ((80,), (65,), (58,), (50,), (40,)),
    "imagenet": ((25,), (18,), (15,), (10,), (7,)),
}

SEVERITIES = (1, 2, 3, 4, 5)
PARAMETERS = ("cifar", "imagenet")
"""CIFAR-C's tables, tuned for 32-pixel images, and ImageNet-C's, for 224."""

_WATER_RGB = (175.0, 238.0, 238.0)
_MUD_RGB = (63.0, 42.0, 20.0)
_WATER_REACH = 20.0  # pixels from an edge beyond which the water looks the same
_CANNY_LOW, _CANNY_HIGH = 50, 150
_STRAIGHT, _DIAGONAL, _KNIGHT = 1.0, 1.4, 2.1969  # lengths of OpenCV's steps, DIST_L2 with mask 5
_STEPS_5x5 = np.array(
    [
        [2 * _DIAGONAL, _KNIGHT, 2 * _STRAIGHT, _KNIGHT, 2 * _DIAGONAL],
        [_KNIGHT, _DIAGONAL, _STRAIGHT, _DIAGONAL, _KNIGHT],
        [2 * _STRAIGHT, _STRAIGHT, 0, _STRAIGHT, 2 * _STRAIGHT],
        [_KNIGHT, _DIAGONAL, _STRAIGHT, _DIAGONAL, _KNIGHT],
        [2 * _DIAGONAL, _KNIGHT, 2 * _STRAIGHT, _KNIGHT, 2 * _DIAGONAL],
    ]
)


def corrupt(
    image_HW3: Pixels, name: str, severity: int = 2, *, parameters: str = "cifar", seed: int
) -> Pixels:
    """Return the corrupted image, a new (H, W, 3) uint8 RGB array; H and W are at least 1.

    The defaults are, as far as is known, those of AdaMerging's corrupted sets. ``seed`` (≥ 0)
    alone decides the random draws: make one per image with :func:`image_seed`. Raises
    :class:`UserError` for an unknown name, severity or parameter set, and ValueError for an array
    that is not an RGB image.
    """
    _require_known("corruption", name, CORRUPTIONS)
    _require_known("severity", severity, SEVERITIES)
    _require_known("corruption parameters", parameters, PARAMETERS)
    if image_HW3.dtype != np.uint8 or image_HW3.ndim != 3 or image_HW3.shape[2] != 3:
        raise ValueError(f"not (H, W, 3) uint8: {image_HW3.shape} {image_HW3.dtype}")
    function, table = _REGISTRY[name]
    row = table[parameters][severity - 1]
    return function(image_HW3, np.random.default_rng(seed), *row)


def image_seed(seed: int, key: str) -> int:
    """Return the 64-bit seed of one image of a run, the same in every process.

    ``key`` names the image (such as its path below the data folder), not its position in a list,
    so that adding an image leaves the draws of the others unchanged.
    """
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _require_known(what: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        names = ", ".join(str(choice) for choice in choices)
        raise UserError(f"unknown {what} {value!r}; choose one of {names}")


def _to_pixels(levels: Levels) -> Pixels:
    """Return the levels clipped to 0–255, without their fractions."""
    return np.clip(levels, 0, 255).astype(np.uint8)


# Noise, contrast, compression


def _gaussian_noise(image_HW3: Pixels, rng: np.random.Generator, sigma: float) -> Pixels:
    """Return clip(x + N(0, σ²)), with a draw for each element."""
    return _to_pixels(image_HW3 + 255 * sigma * rng.normal(size=image_HW3.shape))


def _impulse_noise(image_HW3: Pixels, rng: np.random.Generator, probability: float) -> Pixels:
    """Set each element with the given probability to 0 or 255, with equal chance."""
    hit = rng.random(image_HW3.shape) < probability
    extreme = np.where(rng.random(image_HW3.shape) < 0.5, np.uint8(255), np.uint8(0))
    return np.where(hit, extreme, image_HW3)


def _contrast(image_HW3: Pixels, rng: np.random.Generator, factor: float) -> Pixels:
    """Return clip((x − μ)·factor + μ), μ the mean of the channel over this image."""
    mean_113 = image_HW3.mean(axis=(0, 1), keepdims=True)
    return _to_pixels((image_HW3 - mean_113) * factor + mean_113)


def _jpeg(image_HW3: Pixels, rng: np.random.Generator, quality: int) -> Pixels:
    """Encode and decode with Pillow's JPEG and its default chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer, formats=("JPEG",)) as decoded:
        return np.array(decoded)


def _pixelate(image_HW3: Pixels, rng: np.random.Generator, fraction: float) -> Pixels:
    """Resize each side S to ⌊S·fraction⌋ (at least 1 pixel) with a box filter, and back."""
    height, width, _ = image_HW3.shape
    small = max(1, int(width * fraction)), max(1, int(height * fraction))
    shrunk = Image.fromarray(image_HW3).resize(small, Image.Resampling.BOX)
    return np.array(shrunk.resize((width, height), Image.Resampling.BOX))


# Motion blur


def _motion_blur(image_HW3: Pixels, rng: np.random.Generator, radius: int, sigma: float) -> Pixels:
    """Blur along a direction drawn from U(−45°, 45°) of the horizontal; edges are replicated."""
    angle = math.radians(rng.uniform(-45, 45))
    return _blur_along(image_HW3, _motion_kernel(radius, sigma), angle)


def _motion_kernel(radius: int, sigma: float) -> Levels:
    """Return (2·radius + 1,) weights exp(−i²/2σ²), normalised: a one-sided gaussian."""
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    return np.asarray(weights / weights.sum())


def _blur_along(image_HW3: Pixels, kernel: Levels, angle: float) -> Pixels:
    """Return Σᵢ kernelᵢ · the image moved by i pixels against ``angle`` (radians, y downwards).

    Offsets are rounded to whole pixels, ⌈v − ½⌉, and the sum to the nearest level, as ImageMagick's
    ``MotionBlurImage`` does. Where a move leaves the image its edge is replicated; the pure-numpy
    versions of ImageNet-C stop summing there instead, which darkens images under 2·radius pixels.
    """
    height, width, _ = image_HW3.shape
    blurred_HW3 = np.zeros(image_HW3.shape)
    for i, weight in enumerate(kernel):
        down, right = (math.ceil(i * step - 0.5) for step in (math.sin(angle), math.cos(angle)))
        rows = np.clip(np.arange(height) + down, 0, height - 1)
        columns = np.clip(np.arange(width) + right, 0, width - 1)
        blurred_HW3 += weight * image_HW3[rows[:, None], columns]
    return _to_pixels(np.rint(blurred_HW3))


# Spatter


def _spatter(
    image_HW3: Pixels,
    rng: np.random.Generator,
    mean: float,
    deviation: float,
    blur: float,
    threshold: float,
    strength: float,
    mud: int,
) -> Pixels:
    """Add drops of water or mud where a blurred gaussian layer reaches the threshold."""
    layer_HW = _liquid(rng, image_HW3.shape[:2], mean, deviation, blur)
    layer_HW[layer_HW < threshold] = 0
    if mud:
        return _mud(image_HW3, layer_HW > threshold, strength)
    return _water(image_HW3, layer_HW, strength)


def _liquid(
    rng: np.random.Generator, shape: tuple[int, ...], mean: float, deviation: float, blur: float
) -> Levels:
    """Return (H, W) values of about 0–1: N(mean, deviation²) under a gaussian blur."""
    return _gaussian_blur(rng.normal(mean, deviation, shape), blur)


def _gaussian_blur(layer_HW: Levels, sigma: float) -> Levels:
    """Return scikit-image's ``gaussian``: cut off at 4σ, edges replicated."""
    blurred: Levels = ndimage.gaussian_filter(layer_HW, sigma, mode="nearest", truncate=4.0)
    return blurred


def _mud(image_HW3: Pixels, wet_HW: NDArray[np.bool_], blur: float) -> Pixels:
    """Paint brown with the blurred mask as its opacity, where that is at least 0.8."""
    opacity_HW1 = _gaussian_blur(wet_HW.astype(np.float64), blur)[..., None]
    opacity_HW1[opacity_HW1 < 0.8] = 0
    return _to_pixels(image_HW3 * (1 - opacity_HW1) + np.array(_MUD_RGB) * opacity_HW1)


def _water(image_HW3: Pixels, layer_HW: Levels, strength: float) -> Pixels:
    """Add pale turquoise where the layer is not 0, embossed to look like drops.

    The original's OpenCV steps (Canny, distance transform, equalisation, 3 × 3 filters), redone
    with scipy.ndimage: on the same layer the result is OpenCV's to within one level, where OpenCV
    rounds in float32. Two cases are defined here and not there: where nothing is wet (a division
    by zero) the image comes back unchanged, and a layer above 1 counts as 1 (it overflows uint8).
    """
    layer_HW = np.floor(255 * np.clip(layer_HW, 0, 1))
    weight_HW = layer_HW * _relief(layer_HW.astype(np.int32))
    peak = weight_HW.max()
    if peak == 0:
        return image_HW3.copy()
    weight_HW1 = (strength * (weight_HW / peak))[..., None]
    return _to_pixels(image_HW3 + weight_HW1 * np.array(_WATER_RGB))


def _relief(layer_HW: NDArray[np.int32]) -> Levels:
    """Return (H, W) levels 0–255: distance to the drops' edges, equalised, embossed, smoothed."""
    distance_HW = np.floor(_box_3x3(_edge_distance(_canny(layer_HW))))
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    embossed_HW = ndimage.correlate(_equalise(distance_HW), emboss, mode="mirror")
    return np.rint(_box_3x3(np.clip(embossed_HW, 0, 255)))


def _box_3x3(layer_HW: Levels) -> Levels:
    """Return the mean over 3 × 3 pixels, mirrored at the edges."""
    mean: Levels = ndimage.correlate(layer_HW, np.ones((3, 3)), mode="mirror") / 9
    return mean


def _edge_distance(edge_HW: NDArray[np.bool_]) -> Levels:
    """Return the distance (H, W) to the nearest edge along OpenCV's 5 × 5 steps, at most 20."""
    distance_HW = np.where(edge_HW, 0.0, _WATER_REACH)
    while True:
        nearer_HW: Levels = ndimage.grey_erosion(distance_HW, structure=-_STEPS_5x5, mode="nearest")
        if np.array_equal(nearer_HW, distance_HW):
            return distance_HW
        distance_HW = nearer_HW


def _equalise(levels_HW: Levels) -> Levels:
    """Equalise the histogram: the lowest level becomes 0, the highest 255; a single one stays."""
    values, inverse, counts = np.unique(levels_HW, return_inverse=True, return_counts=True)
    if len(values) == 1:
        return levels_HW
    above_lowest = np.cumsum(counts) - counts[0]
    equalised: Levels = np.rint(255 * above_lowest / above_lowest[-1])
    return equalised[inverse.reshape(levels_HW.shape)]


def _canny(layer_HW: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return the edges: ridges of |∂x| + |∂y| (Sobel) above 50 connected to one above 150."""
    dx_HW, dy_HW = (ndimage.sobel(layer_HW, axis=axis, mode="nearest") for axis in (1, 0))
    magnitude_HW = np.abs(dx_HW) + np.abs(dy_HW)
    ridge_HW = (magnitude_HW > _CANNY_LOW) & _ridges(magnitude_HW, dx_HW, dy_HW)
    group_HW, _ = ndimage.label(ridge_HW, structure=np.ones((3, 3)))
    strong = np.unique(group_HW[ridge_HW & (magnitude_HW > _CANNY_HIGH)])
    return np.isin(group_HW, strong)


def _ridges(
    magnitude_HW: NDArray[np.int32], dx_HW: NDArray[np.int32], dy_HW: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Return True where the magnitude is largest along the gradient's direction (steps of 45°).

    It is 0 outside the image. Of equal ones in a row or column the first counts, on a diagonal
    none.
    """
    height, width = magnitude_HW.shape
    padded = np.pad(magnitude_HW, 1)

    def at(down: int, right: int) -> NDArray[np.int32]:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    # The direction of the gradient decides which two neighbours count.
    m, tangent = magnitude_HW, math.sqrt(2) - 1  # of 22.5°
    flat = np.abs(dy_HW) < tangent * np.abs(dx_HW)
    steep = np.abs(dy_HW) > (2 + tangent) * np.abs(dx_HW)
    falling = (dx_HW < 0) == (dy_HW < 0)
    return np.select(
        [flat, steep, falling],
        [
            (m > at(0, -1)) & (m >= at(0, 1)),
            (m > at(-1, 0)) & (m >= at(1, 0)),
            (m > at(-1, -1)) & (m > at(1, 1)),
        ],
        (m > at(-1, 1)) & (m > at(1, -1)),
    )


_REGISTRY: Mapping[str, tuple[Callable[..., Pixels], Table]] = {
    "motion_blur": (_motion_blur, MOTION_BLUR),
    "impulse_noise": (_impulse_noise, IMPULSE_NOISE),
    "gaussian_noise": (_gaussian_noise, GAUSSIAN_NOISE),
    "pixelate": (_pixelate, PIXELATE),
    "spatter": (_spatter, SPATTER),
    "contrast": (_contrast, CONTRAST),
    "jpeg": (_jpeg, JPEG),
}
CORRUPTIONS = tuple(_REGISTRY)
"""Names, in the order of the paper's tables."""
