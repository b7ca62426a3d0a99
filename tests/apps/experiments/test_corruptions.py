"""Each corruption is what its formula says, by hand or by Pillow; the seed decides the draws."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from raymerge.apps.experiments import corruptions
from raymerge.apps.experiments.corruptions import (
    CORRUPTIONS,
    PARAMETERS,
    SEVERITIES,
    corrupt,
    image_seed,
)
from raymerge.errors import UserError

RANDOM = ("motion_blur", "impulse_noise", "gaussian_noise", "spatter")
WATER_RGB, MUD_RGB = (175, 238, 238), (63, 42, 20)


def _grey(height: int, width: int, level: int = 128) -> np.ndarray:
    return np.full((height, width, 3), level, dtype=np.uint8)


def _picture(height: int = 48, width: int = 64) -> np.ndarray:
    """Return an image with blobs, texture and a sharp edge, levels about 30 to 220."""
    noise = np.random.default_rng(0).normal(size=(3, height, width))
    blobs = 400 * ndimage.gaussian_filter(noise, (0, 6, 6)) + 12 * noise
    blobs[:, :, width // 2 :] += 40
    return np.clip(blobs.transpose(1, 2, 0) + 110, 0, 255).astype(np.uint8)


def _distance(name: str, parameters: str, severity: int, image: np.ndarray) -> float:
    """Return the mean change in levels over a few seeds."""
    changed = [corrupt(image, name, severity, parameters=parameters, seed=s) for s in range(3)]
    return float(np.mean([np.abs(one.astype(int) - image).mean() for one in changed]))


def test_the_names_are_in_the_order_of_the_papers_tables():
    assert CORRUPTIONS == (
        "motion_blur",
        "impulse_noise",
        "gaussian_noise",
        "pixelate",
        "spatter",
        "contrast",
        "jpeg",
    )


def test_the_default_is_the_second_row_of_cifar_c():
    image = _picture()
    for name in CORRUPTIONS:
        named = corrupt(image, name, 2, parameters="cifar", seed=3)
        assert np.array_equal(corrupt(image, name, seed=3), named)
    assert corruptions.MOTION_BLUR["cifar"][1] == (6, 1.5)
    assert corruptions.IMPULSE_NOISE["cifar"][1] == (0.02,)
    assert corruptions.GAUSSIAN_NOISE["cifar"][1] == (0.06,)
    assert corruptions.PIXELATE["cifar"][1] == (0.9,)
    assert corruptions.SPATTER["cifar"][1] == (0.65, 0.1, 0.8, 0.7, 0.5, 0)
    assert corruptions.CONTRAST["cifar"][1] == (0.5,)
    assert corruptions.JPEG["cifar"][1] == (65,)


# What holds for all seven


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_row_keeps_shape_and_type_and_leaves_its_input_alone(name, parameters, severity):
    image = _picture(23, 40)
    before = image.copy()
    image.flags.writeable = False
    changed = corrupt(image, name, severity, parameters=parameters, seed=1)
    assert (changed.shape, changed.dtype) == (image.shape, np.uint8)
    assert np.array_equal(image, before)
    assert not np.shares_memory(changed, image)
    assert changed.flags.writeable
    assert not np.array_equal(changed, image)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 3), (5, 131)])
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_of_any_size_are_corrupted(name, parameters, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for severity in SEVERITIES:
        for seed in range(3):
            changed = corrupt(image, name, severity, parameters=parameters, seed=seed)
            assert (changed.shape, changed.dtype) == (image.shape, np.uint8)


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_alone_decides_the_draws(name, parameters):
    image = _picture()
    first = corrupt(image, name, parameters=parameters, seed=7)
    np.random.seed(5)
    assert np.array_equal(first, corrupt(image, name, parameters=parameters, seed=7))
    other = corrupt(image, name, parameters=parameters, seed=8)
    assert np.array_equal(first, other) == (name not in RANDOM)


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "spatter"])
def test_a_higher_severity_changes_the_image_more(name, parameters):
    """Rows 3 and 4 of CIFAR-C's motion blur are the same: 13 pixels hold all of σ = 2."""
    image = _picture(224, 224)
    distances = [_distance(name, parameters, s, image) for s in SEVERITIES]
    assert distances == sorted(distances), distances
    assert len(set(distances)) == (4 if (name, parameters) == ("motion_blur", "cifar") else 5)


def test_a_higher_severity_spatters_more_within_water_and_within_mud():
    """CIFAR-C's own first mud row (4) is milder than its last water row (3)."""
    cifar = [_distance("spatter", "cifar", s, _picture()) for s in SEVERITIES]
    imagenet = [_distance("spatter", "imagenet", s, _picture()) for s in SEVERITIES]
    assert imagenet == sorted(set(imagenet)), imagenet
    assert cifar[0] < cifar[1] < cifar[2], cifar
    assert cifar[3] < cifar[4], cifar
    assert cifar[3] < cifar[2], cifar


@pytest.mark.parametrize("name", ["motion_blur", "pixelate", "contrast"])
def test_a_flat_image_is_unchanged_by_blur_pixelation_and_contrast(name):
    for level in (0, 1, 77, 254, 255):
        image = _grey(9, 14, level)
        for severity in SEVERITIES:
            assert np.array_equal(corrupt(image, name, severity, seed=0), image)


# Noise


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_impulses_are_black_or_white_with_equal_chance(parameters, severity):
    (probability,) = corruptions.IMPULSE_NOISE[parameters][severity - 1]
    image = _grey(200, 200)
    changed = corrupt(image, "impulse_noise", severity, parameters=parameters, seed=0)
    hit = changed != image
    count, size = hit.sum(), image.size
    assert set(np.unique(changed)) == {0, 128, 255}
    assert abs(count - probability * size) < 5 * np.sqrt(size * probability * (1 - probability))
    assert abs((changed == 255).sum() - count / 2) < 5 * np.sqrt(count / 4)
    assert not (hit.all(axis=2) == hit.any(axis=2)).all()  # channels are hit one by one


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_noise_has_mean_0_and_its_deviation_before_clipping(severity):
    (sigma,) = corruptions.GAUSSIAN_NOISE["cifar"][severity - 1]
    image = _grey(200, 200)  # 5σ from either end, so next to nothing is clipped
    difference = corrupt(image, "gaussian_noise", severity, seed=0).astype(float) - image
    error = 255 * sigma / np.sqrt(image.size)
    assert abs(difference.mean() + 0.5) < 5 * error  # the fraction is cut off: half a level
    assert difference.std() == pytest.approx(np.hypot(255 * sigma, 12**-0.5), rel=0.01)
    channels = np.corrcoef(difference.reshape(-1, 3).T)
    assert np.abs(channels - np.eye(3)).max() < 0.03


def test_gaussian_noise_is_clipped_at_both_ends():
    black = corrupt(_grey(100, 100, 0), "gaussian_noise", 5, seed=0)
    white = corrupt(_grey(100, 100, 255), "gaussian_noise", 5, seed=0)
    assert (black == 0).mean() == pytest.approx(0.5, abs=0.05)
    assert (white == 255).mean() == pytest.approx(0.5, abs=0.05)
    assert black.max() < 160
    assert white.min() > 95


def test_a_severity_scales_the_same_noise():
    image = _grey(40, 40)
    mild = corrupt(image, "gaussian_noise", 1, seed=4).astype(int) - 128  # σ = 0.04
    strong = corrupt(image, "gaussian_noise", 3, seed=4).astype(int) - 128  # σ = 0.08
    assert np.abs(strong - 2 * mild).max() <= 2  # cut-off fractions apart


# Contrast, JPEG, pixelate


def test_contrast_halves_the_distance_from_each_channels_mean():
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    image[..., 0] = [[0, 100], [200, 100]]  # mean 100
    image[..., 1] = [[10, 10], [10, 50]]  # mean 20
    image[..., 2] = [[255, 0], [0, 0]]  # mean 63.75
    changed = corrupt(image, "contrast", 2, seed=0)
    assert changed[..., 0].tolist() == [[50, 100], [150, 100]]
    assert changed[..., 1].tolist() == [[15, 15], [15, 35]]
    assert changed[..., 2].tolist() == [[159, 31], [31, 31]]  # 159.375, 31.875


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_jpeg_is_pillows_own_round_trip(parameters, severity):
    image = _picture(37, 50)
    (quality,) = corruptions.JPEG[parameters][severity - 1]
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    expected = np.asarray(Image.open(io.BytesIO(buffer.getvalue())))
    changed = corrupt(image, "jpeg", severity, parameters=parameters, seed=0)
    assert np.array_equal(changed, expected)


def test_pixelating_to_half_the_side_is_the_mean_of_each_2x2():
    red = np.array(
        [[0, 40, 100, 100], [40, 80, 100, 100], [8, 8, 255, 255], [8, 8, 255, 251]],
        dtype=np.uint8,
    )
    image = np.stack([red, red.T, np.zeros_like(red)], axis=2)
    changed = corrupt(image, "pixelate", 2, parameters="imagenet", seed=0)
    halves = [[40, 40, 100, 100]] * 2 + [[8, 8, 254, 254]] * 2
    assert changed[..., 0].tolist() == halves
    assert changed[..., 1].tolist() == np.array(halves).T.tolist()
    assert not changed[..., 2].any()


def test_pixelate_rounds_each_side_down_by_itself():
    image = _picture(10, 33)
    changed = corrupt(image, "pixelate", 5, parameters="imagenet", seed=0)  # a quarter: 2 × 8
    small = Image.fromarray(image).resize((8, 2), Image.Resampling.BOX)
    assert np.array_equal(changed, small.resize((33, 10), Image.Resampling.BOX))
    assert len(np.unique(changed[:, 0], axis=0)) == 2


# Motion blur


@pytest.mark.parametrize(
    ("degrees", "direction"), [(0, (0, 1)), (90, (1, 0)), (45, (1, 1)), (-45, (-1, 1))]
)
def test_a_bright_pixel_becomes_the_kernel_along_the_direction(degrees, direction):
    kernel = corruptions._motion_kernel(3, 1.5)
    image = _grey(21, 21, 0)
    image[10, 10] = 255
    blurred = corruptions._blur_along(image, kernel, np.deg2rad(degrees))
    expected = np.zeros((21, 21))
    for i, weight in enumerate(kernel):
        step = int(np.ceil(i / np.hypot(*direction) - 0.5))
        expected[10 - step * direction[0], 10 - step * direction[1]] += weight
    assert np.array_equal(blurred, np.rint(255 * expected)[..., None].repeat(3, axis=2))


def test_the_motion_kernel_is_one_sided_gaussian_and_sums_to_1():
    kernel = corruptions._motion_kernel(6, 1.5)
    assert kernel.shape == (13,)
    assert kernel.sum() == pytest.approx(1)
    assert kernel[3] / kernel[0] == pytest.approx(np.exp(-2))  # 3 = 2σ
    assert (np.diff(kernel) < 0).all()


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_motion_blur_moves_light_but_keeps_its_sum(parameters, severity):
    image = _grey(160, 160, 0)
    image[70:90, 70:90] = 200  # more than 2·radius from every edge
    for seed in range(4):
        blurred = corrupt(image, "motion_blur", severity, parameters=parameters, seed=seed)
        total = blurred.sum(dtype=float) / image.sum(dtype=float)
        assert total == pytest.approx(1, abs=0.02)  # rounding to levels
        assert not blurred[:, 90:].any()  # it trails to the left only


def test_motion_blur_replicates_the_edges():
    ramp = np.repeat(np.arange(0, 250, 50, dtype=np.uint8)[None, :, None], 5, axis=0)
    image = ramp.repeat(3, axis=2)
    kernel = np.array([0.5, 0.25, 0.25])
    blurred = corruptions._blur_along(image, kernel, 0.0)
    assert blurred[2, :, 0].tolist() == [38, 88, 138, 175, 200]  # from 37.5, 87.5, 137.5


def test_the_angle_stays_within_45_degrees_of_the_horizontal():
    image = _grey(41, 41, 0)
    image[20, 20] = 255
    sides = []
    for seed in range(40):
        rows, columns = corrupt(image, "motion_blur", 5, seed=seed)[..., 0].nonzero()
        assert (np.abs(rows - 20) <= 20 - columns).all()
        sides.append(np.sign((rows - 20).sum()))
    assert {-1, 1} <= set(sides)


# Spatter


def _dry(seed: int, parameters: str, severity: int, shape: tuple[int, int]) -> np.ndarray:
    """Return where the liquid layer that the seed draws is below the threshold."""
    mean, deviation, blur, threshold, _, _ = corruptions.SPATTER[parameters][severity - 1]
    layer = corruptions._liquid(np.random.default_rng(seed), shape, mean, deviation, blur)
    return layer < threshold


@pytest.mark.parametrize(
    ("parameters", "severity"),
    [("cifar", 1), ("cifar", 2), ("cifar", 3), ("cifar", 4), ("cifar", 5), ("imagenet", 2)],
)
def test_an_image_is_unchanged_where_the_liquid_is_below_the_threshold(parameters, severity):
    image = _picture()
    dry = _dry(5, parameters, severity, image.shape[:2])
    changed = corrupt(image, "spatter", severity, parameters=parameters, seed=5)
    assert 0 < dry.mean() < 1
    assert np.array_equal(changed[dry], image[dry])
    assert not np.array_equal(changed[~dry], image[~dry])


@pytest.mark.parametrize(
    ("parameters", "severity"), [(p, s) for p in PARAMETERS for s in (1, 2, 3)]
)
def test_water_adds_pale_turquoise_up_to_its_strength(parameters, severity):
    strength = corruptions.SPATTER[parameters][severity - 1][4]
    changed = corrupt(_grey(96, 96, 0), "spatter", severity, parameters=parameters, seed=2)
    brightest = [int(strength * level) for level in WATER_RGB]
    assert changed.max(axis=(0, 1)).tolist() == brightest
    assert np.array_equal(changed[..., 1], changed[..., 2])
    opacity = changed / WATER_RGB
    assert np.abs(opacity[..., 0] - opacity[..., 1]).max() < 1 / 175
    assert (corrupt(_picture(), "spatter", severity, seed=2) >= _picture()).all()


@pytest.mark.parametrize(("parameters", "severity"), [(p, s) for p in PARAMETERS for s in (4, 5)])
def test_mud_is_brown_and_at_least_four_fifths_opaque(parameters, severity):
    changed = corrupt(_grey(96, 96, 255), "spatter", severity, parameters=parameters, seed=2)
    muddy = changed[(changed != 255).any(axis=2)].astype(float)
    assert len(muddy) > 0
    for channel, level in enumerate(MUD_RGB):
        assert muddy[:, channel].min() >= level - 1
        assert muddy[:, channel].max() <= 255 - 0.8 * (255 - level)


def test_mud_fills_the_inside_of_a_drop_and_fades_at_its_rim():
    wet = np.zeros((11, 11), dtype=bool)
    wet[3:8, 3:8] = True
    changed = corruptions._mud(_grey(11, 11, 255), wet, 0.6)
    assert changed[5, 5].tolist() == list(MUD_RGB)
    assert (changed[~wet] == 255).all()
    assert (changed[3, 3] == 255).all()  # a corner is less than 0.8 covered
    assert MUD_RGB[0] < changed[3, 5, 0] < 255  # the middle of a side is partly covered


def test_without_drops_the_image_is_unchanged():
    image = _picture()
    dry = np.zeros(image.shape[:2])
    assert np.array_equal(corruptions._water(image, dry, 0.6), image)
    assert np.array_equal(corruptions._mud(image, dry > 0, 0.6), image)


def _drops() -> np.ndarray:
    """(9, 12): a block with a brighter core, a leaf-shaped drop, and one pixel in the corner."""
    layer = np.zeros((9, 12), dtype=np.int32)
    layer[2:7, 2:6] = 180
    layer[3:6, 3:5] = 230
    layer[1:5, 8:11] = 200
    layer[8, 0] = 190
    layer[5, 9] = 180
    return layer


def test_edges_are_opencvs():
    """Recorded from cv2.Canny(layer, 50, 150), OpenCV 5.0."""
    expected = [
        ".........#..",
        "........#.#.",
        "..####.#..#.",
        "..#..#.#..#.",
        "..#..#..#.#.",
        "..#..#..###.",
        "..####......",
        "............",
        "#...........",
    ]
    edges = corruptions._canny(_drops())
    assert ["".join(".#"[pixel] for pixel in row) for row in edges.astype(int)] == expected


def test_the_relief_is_opencvs():
    """Recorded from OpenCV 5.0: the original's chain from Canny to the last blur."""
    assert corruptions._relief(_drops()).tolist() == [
        [118, 118, 71, 71, 71, 47, 24, 0, 0, 0, 0, 0],
        [118, 118, 71, 71, 71, 47, 24, 0, 0, 0, 0, 0],
        [71, 71, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [71, 71, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [71, 71, 0, 0, 0, 28, 57, 85, 85, 85, 85, 85],
        [71, 71, 28, 57, 85, 113, 142, 170, 170, 170, 170, 170],
        [118, 123, 109, 142, 170, 198, 227, 255, 255, 255, 255, 255],
        [165, 170, 179, 212, 241, 245, 250, 255, 255, 255, 255, 255],
        [212, 222, 231, 241, 241, 245, 250, 255, 255, 255, 255, 255],
    ]


def test_the_distance_to_an_edge_goes_in_opencvs_steps_up_to_20():
    edge = np.zeros((4, 30), dtype=bool)
    edge[0, 0] = True
    distance = corruptions._edge_distance(edge)
    assert distance[0].tolist() == pytest.approx([min(i, 20) for i in range(30)])
    assert distance[1, :4] == pytest.approx([1, 1.4, 2.1969, 3.1969])
    assert distance[3, :5] == pytest.approx([3, 3.1969, 3.5969, 4.2, 4.9969])
    assert (corruptions._edge_distance(np.zeros((3, 3), dtype=bool)) == 20).all()


def test_equalisation_spreads_the_levels_by_rank():
    levels = np.array([[3.0, 3, 5], [7, 5, 3]])  # above the lowest: 2 of 3, then 3 of 3
    assert corruptions._equalise(levels).tolist() == [[0, 0, 170], [255, 170, 0]]
    assert (corruptions._equalise(np.full((2, 2), 9.0)) == 9).all()


# Seeds and errors


def test_an_images_seed_depends_on_the_run_and_the_image_and_on_nothing_else():
    assert image_seed(0, "gtsrb/00001.png") == 4512097948598085872
    keys = [image_seed(seed, key) for seed in (0, 1, -1, 11) for key in ("a", "b", "1/a", "")]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)
    assert corrupt(_grey(4, 4), "gaussian_noise", seed=max(keys)).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"name": "fog"},
            "unknown corruption 'fog'; choose one of motion_blur, impulse_noise, gaussian_noise, "
            "pixelate, spatter, contrast, jpeg",
        ),
        ({"severity": 0}, "unknown severity 0; choose one of 1, 2, 3, 4, 5"),
        ({"severity": 6}, "unknown severity 6; choose one of 1, 2, 3, 4, 5"),
        (
            {"parameters": "imagenet-c"},
            "unknown corruption parameters 'imagenet-c'; choose one of cifar, imagenet",
        ),
    ],
)
def test_an_unknown_choice_is_one_line_with_the_known_ones(arguments, expected):
    with pytest.raises(UserError) as caught:
        corrupt(_grey(2, 2), **{"name": "jpeg", "seed": 0, **arguments})
    assert str(caught.value) == expected
    assert str(pickle.loads(pickle.dumps(caught.value))) == expected


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4, 3))]
)
def test_an_array_that_is_not_an_rgb_image_is_refused(array):
    with pytest.raises(ValueError, match=r"not \(H, W, 3\) uint8"):
        corrupt(array, "contrast", seed=0)
