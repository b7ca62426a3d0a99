"""Means that were published for CLIP ViTs on the eight data sets of the AdaMerging paper.

Top-1 over SUN397, Cars, RESISC45, EuroSAT, SVHN, GTSRB, MNIST and DTD, merged from the task-vectors
checkpoints. They stand beside our tables for comparison, and are never ours.
"""

from __future__ import annotations

from collections.abc import Mapping

MEANS: Mapping[str, tuple[float | None, float | None]] = {
    # AdaMerging (ICLR 2024), Tables 1 and 2: ViT-B/32, ViT-L/14.
    "individual": (0.905, 0.942),
    "joint": (0.889, 0.935),
    "average": (0.658, 0.796),
    "fisher": (0.683, 0.822),
    "regmean": (0.718, 0.837),
    "task_arithmetic": (0.691, 0.845),
    "ties": (0.724, 0.860),
    "adamerging_task": (0.711, None),
    "adamerging_task_pp": (0.737, None),
    "adamerging": (0.801, 0.908),
    "adamerging_500": (0.801, 0.908),
    "adamerging_pp": (0.811, 0.910),
}


def published(method: str) -> tuple[float | None, float | None]:
    """(ViT-B/32, ViT-L/14) in [0, 1]; None where the paper has none."""
    return MEANS.get(method, (None, None))
