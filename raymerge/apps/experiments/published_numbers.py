"""Numbers published for CLIP ViTs, shown beside ours in tables; none of them was measured here.

All are mean top-1 over data sets of the AdaMerging paper (SUN397, Cars, RESISC45, EuroSAT, SVHN,
GTSRB, MNIST, DTD), for models that others fine-tuned. None means a dash in the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Architecture = Literal["B/32", "B/16", "L/14"]
ARCHITECTURES: tuple[Architecture, ...] = ("B/32", "B/16", "L/14")


@dataclass(frozen=True)
class Means:
    """Mean top-1 over all eight data sets, in [0, 1], by architecture."""

    b32: float | None
    b16: float | None
    l14: float | None
    source: str = "AdaMerging paper"

    @property
    def cells(self) -> tuple[float | None, float | None, float | None, str]:
        """The cells under :data:`MEANS_COLUMNS`."""
        return (self.b32, self.b16, self.l14, self.source)


MEANS_COLUMNS = (*ARCHITECTURES, "published in")

_ISO = "Iso-Merging paper, TALL-masks checkpoints"

MEANS: Mapping[str, Means] = {
    # AdaMerging (ICLR 2024): ViT-B/32 in Table 1, B/16 in Table 5, L/14 in Table 2.
    "individual": Means(0.905, None, 0.942),
    "joint": Means(0.889, None, 0.935),
    "average": Means(0.658, None, 0.796),
    "fisher": Means(0.683, None, 0.822),
    "regmean": Means(0.718, None, 0.837),
    "task_arithmetic": Means(0.691, 0.738, 0.845),
    "ties": Means(0.724, 0.770, 0.860),
    "adamerging_task": Means(0.711, 0.760, None),
    "adamerging_pp_task": Means(0.737, 0.780, None),
    "adamerging": Means(0.801, 0.849, 0.908),
    "adamerging_500": Means(0.801, 0.849, 0.908),
    "adamerging_pp": Means(0.811, 0.857, 0.910),
    # Later papers; the first three merge other fine-tuned checkpoints.
    "tsv": Means(0.859, 0.890, 0.930, _ISO),
    "iso_c": Means(0.863, 0.906, 0.942, _ISO),
    "iso_cts": Means(0.862, 0.911, 0.947, _ISO),
    "wudi": Means(0.852, None, 0.926, "WUDI README"),
    "regmean_pp": Means(0.844, 0.872, 0.910, "fusion_bench docs and checkpoints"),
}


def published(method: str) -> Means:
    """Return the published means of a method; all None if nothing was published."""
    return MEANS.get(method, Means(None, None, None, "–"))


@dataclass(frozen=True)
class Split:
    """A split into six seen tasks and two unseen ones."""

    architecture: Architecture
    unseen: tuple[str, str]
    means: Mapping[str, tuple[float, float]]
    """Method → means over (seen, unseen) tasks."""


SPLITS = (
    # AdaMerging, Table 3: ViT-B/32.
    Split(
        "B/32",
        ("mnist", "eurosat"),
        {
            "task_arithmetic": (0.706, 0.617),
            "ties": (0.693, 0.596),
            "adamerging": (0.774, 0.700),
            "adamerging_pp": (0.780, 0.687),
        },
    ),
    Split(
        "B/32",
        ("resisc45", "svhn"),
        {
            "task_arithmetic": (0.739, 0.511),
            "ties": (0.718, 0.539),
            "adamerging": (0.803, 0.555),
            "adamerging_pp": (0.808, 0.585),
        },
    ),
    # AdaMerging, Table 6: its title says ViT-B/32, the text that it is ViT-B/16.
    Split(
        "B/16",
        ("mnist", "eurosat"),
        {"task_arithmetic": (0.758, 0.657), "adamerging": (0.824, 0.680)},
    ),
    Split(
        "B/16",
        ("resisc45", "svhn"),
        {"task_arithmetic": (0.780, 0.618), "adamerging": (0.855, 0.639)},
    ),
)

ROBUSTNESS: Mapping[Architecture, Mapping[str, Mapping[str, float]]] = {
    # Method → condition → mean over Cars, EuroSAT, RESISC45 and GTSRB.
    # AdaMerging, Table 4: ViT-B/32.
    "B/32": {
        "task_arithmetic": {
            "clean": 0.798,
            "motion_blur": 0.694,
            "impulse_noise": 0.561,
            "gaussian_noise": 0.611,
            "pixelate": 0.334,
            "spatter": 0.629,
            "contrast": 0.689,
            "jpeg": 0.703,
        },
        "adamerging": {
            "clean": 0.880,
            "motion_blur": 0.806,
            "impulse_noise": 0.628,
            "gaussian_noise": 0.669,
            "pixelate": 0.423,
            "spatter": 0.696,
            "contrast": 0.790,
            "jpeg": 0.801,
        },
    },
    # AdaMerging, Table 7: ViT-B/16.
    "B/16": {
        "task_arithmetic": {
            "clean": 0.843,
            "motion_blur": 0.751,
            "impulse_noise": 0.648,
            "gaussian_noise": 0.656,
            "pixelate": 0.345,
            "spatter": 0.676,
            "contrast": 0.735,
            "jpeg": 0.744,
        },
        "adamerging": {
            "clean": 0.917,
            "motion_blur": 0.850,
            "impulse_noise": 0.730,
            "gaussian_noise": 0.734,
            "pixelate": 0.413,
            "spatter": 0.800,
            "contrast": 0.830,
            "jpeg": 0.841,
        },
    },
}

BEST_SCALING: Mapping[str, tuple[float, float]] = {
    # AdaMerging, Fig. 1, ViT-B/32: (best λ, mean top-1 there). Its Table 1 has 72.4 for TIES.
    "task_arithmetic": (0.3, 0.691),
    "ties": (0.3, 0.729),
}
