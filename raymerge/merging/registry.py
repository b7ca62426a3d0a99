"""Every method by name: its title, its paper, and what kind of work it is.

- ``constant``: θ₀ + Σ λ V with one constant λ, from the checkpoints alone;
- ``statistics``: the merged vector follows from statistics of each expert on its own images;
- ``learned``: λ by gradient steps on images;
- ``frank_wolfe``: λ by Frank-Wolfe steps, one expert (or one of each task) at a time;
- ``reference``: nothing is merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from raymerge.config import (
    AdaMerging,
    Config,
    Dare,
    Fisher,
    FwHard,
    FwSoft,
    Granularity,
    Joint,
    MethodConfig,
    RegMean,
    RegMeanPP,
    TaskArithmetic,
    Ties,
)

Kind = Literal["constant", "statistics", "learned", "frank_wolfe", "reference"]
Images = Literal["none", "unlabeled", "labelled"]


@dataclass(frozen=True)
class Method:
    """``scaling(method, K)`` is the constant λ, or the initial one of a learned one."""

    title: str
    paper: str
    kind: Kind = "constant"
    scaling: Callable[[Any, int], float] = lambda method, models: float(method.scaling)
    images: Callable[[Any], Images] = lambda method: "none"
    """Which images of every merged task it needs."""
    rows: bool = True
    """Whether its λ has a row for each model."""

    @property
    def learned(self) -> bool:
        return self.kind == "learned"

    @property
    def merges(self) -> bool:
        return self.kind != "reference"


def _unlabeled(method: Any) -> Images:
    return "unlabeled"


def _by_objective(method: AdaMerging | FwHard | FwSoft) -> Images:
    return "labelled" if method.objective == "cross_entropy" else "unlabeled"


def _zero(method: Any, models: int) -> float:
    return 0.0


def _one(method: Any, models: int) -> float:
    return 1.0


METHODS: dict[str, Method] = {
    "zero_shot": Method("Zero-shot (pretrained)", "Radford et al., ICML 2021", scaling=_zero),
    "individual": Method(
        "Individual experts", "Ilharco et al., ICLR 2023", "reference", scaling=_zero
    ),
    "joint": Method("Traditional MTL", "Caruana, Machine Learning 1997", scaling=_one, rows=False),
    "average": Method(
        "Weight averaging",
        "Wortsman et al., ICML 2022",
        scaling=lambda method, models: 1.0 / models,
    ),
    "task_arithmetic": Method("Task arithmetic", "Ilharco et al., ICLR 2023"),
    "ties": Method(
        "TIES-Merging",
        "Yadav et al., NeurIPS 2023",
        scaling=lambda method, models: float(method.effective_scaling),
    ),
    "dare": Method("DARE", "Yu et al., ICML 2024"),
    "fisher": Method(
        "Fisher merging",
        "Matena and Raffel, NeurIPS 2022",
        "statistics",
        scaling=_one,
        images=_unlabeled,
        rows=False,
    ),
    "regmean": Method(
        "RegMean",
        "Jin et al., ICLR 2023",
        "statistics",
        scaling=_one,
        images=_unlabeled,
        rows=False,
    ),
    "regmean_pp": Method(
        "RegMean++",
        "Nguyen et al., arXiv 2508.03121",
        "statistics",
        scaling=_one,
        images=_unlabeled,
        rows=False,
    ),
    "tsv": Method("TSV-Merge", "Gargiulo et al., CVPR 2025"),
    "iso_c": Method("Iso-C", "Marczak et al., ICML 2025", rows=False),
    "iso_cts": Method("Iso-CTS", "Marczak et al., ICML 2025"),
    "wudi": Method("WUDI-Merging", "Cheng et al., ICML 2025", rows=False),
    "adamerging": Method(
        "AdaMerging",
        "Yang et al., ICLR 2024",
        "learned",
        scaling=lambda method, models: float(method.effective_init),
        images=_by_objective,
    ),
    "fw_hard": Method(
        "FW-Merging (hard)",
        "Chen et al., ICCV 2025",
        "frank_wolfe",
        scaling=_zero,
        images=_by_objective,
    ),
    "fw_soft": Method(
        "FW-Merging (soft)",
        "Chen et al., ICCV 2025",
        "frank_wolfe",
        scaling=_zero,
        images=_by_objective,
    ),
}


def method_of(config: MethodConfig) -> Method:
    return METHODS[config.name]


def needed_images(config: Config) -> Images:
    """Which images of every merged task this config's method needs."""
    return method_of(config.method).images(config.method)


def merged_checkpoints(config: Config) -> tuple[str, ...]:
    """What is merged, in the order of the rows of λ."""
    if isinstance(config.method, Joint):
        return (config.method.checkpoint,)
    return tuple(str(task.checkpoint) for task in config.models)


def steps_of(config: Config) -> int:
    """Updates of λ in a method that takes steps."""
    if isinstance(config.method, FwHard | FwSoft):
        return config.method.iterations
    return config.optimizer.steps


def images_per_step(config: Config) -> int:
    """Of every task that has images."""
    if isinstance(config.method, FwHard | FwSoft | Fisher | RegMean | RegMeanPP):
        return config.method.images
    return config.optimizer.images_per_step


def granularity_of(config: MethodConfig) -> Granularity:
    """What one coefficient covers."""
    if isinstance(config, AdaMerging):
        return config.granularity
    return "tensor" if isinstance(config, FwHard | FwSoft) else "task"


def describe(config: MethodConfig) -> str:
    """The method in words: ``AdaMerging++ (layer-wise)``, ``TIES-Merging (20 %, sum, λ=0.3)``."""
    title = METHODS[config.name].title
    if isinstance(config, AdaMerging):
        return _adamerging(config, title)
    if isinstance(config, Ties):
        return f"{title} ({config.density:.0%}, {config.merge}, λ={config.effective_scaling:g})"
    if isinstance(config, Dare):
        elect = ", elected signs" if config.elect_sign else ""
        return f"{title} ({config.density:.0%}{elect}, λ={config.scaling:g})"
    if isinstance(config, TaskArithmetic):
        return f"{title} (λ={config.scaling:g})"
    if isinstance(config, FwHard | FwSoft):
        wise = {"task": "task-wise", "tensor": "layer-wise"}[config.granularity]
        return f"{title[:-1]}, {wise}, {config.iterations} iterations)"
    return title


def _adamerging(config: AdaMerging, title: str) -> str:
    bases = {"raw": "", "ties": "++", "dare": " on DARE", "tsv": " on TSV", "iso": " on Iso-CTS"}
    wise = {"task": "task-wise", "block": "block-wise", "tensor": "layer-wise"}
    names = {"entropy": "", "kl": ", KL", "infomax": ", infomax", "cross_entropy": ", labels"}
    objective = names[config.objective]
    return f"{title}{bases[config.task_vectors]} ({wise[config.granularity]}{objective})"
