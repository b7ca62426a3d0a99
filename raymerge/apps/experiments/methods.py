"""All methods on all tasks: AdaMerging's Tables 1, 2 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from raymerge.apps.experiments.bench import FAST, Bench, Changes, top1_cells
from raymerge.apps.experiments.findings import Cell, Findings, Table
from raymerge.apps.experiments.published_numbers import MEANS_COLUMNS, published
from raymerge.apps.zoo import ZooPaths
from raymerge.config import Config
from raymerge.config.experiments import Methods
from raymerge.merging.registry import needed_images

PAPER: Changes = {"optimizer": {"steps": 500, "lr": 1e-3, "batch_size": 16}}


def adamerging(**options: object) -> Changes:
    """Return AdaMerging with these options and the preset ``fast``."""
    return {"method": {"name": "adamerging", **options}, **FAST}


METHODS: Mapping[str, Changes] = {
    "zero_shot": {"method": {"name": "zero_shot"}},
    "individual": {"method": {"name": "individual"}},
    "average": {"method": {"name": "average"}},
    "fisher": {"method": {"name": "fisher"}},
    "regmean": {"method": {"name": "regmean"}},
    "regmean_pp": {"method": {"name": "regmean_pp"}},
    "task_arithmetic": {"method": {"name": "task_arithmetic", "scaling": 0.3}},
    "ties": {"method": {"name": "ties", "density": 0.2, "scaling": 0.3}},
    "dare": {"method": {"name": "dare"}},
    "tsv": {"method": {"name": "tsv"}},
    "iso_c": {"method": {"name": "iso_c"}},
    "iso_cts": {"method": {"name": "iso_cts"}},
    "wudi": {"method": {"name": "wudi"}},
    "adamerging_task": adamerging(granularity="task"),
    "adamerging_pp_task": adamerging(granularity="task", task_vectors="ties"),
    "adamerging": adamerging(),
    "adamerging_pp": adamerging(task_vectors="ties"),
    "adamerging_kl": adamerging(objective="kl"),
    "adamerging_tsv": adamerging(task_vectors="tsv", clamp="none"),
    "samerging": {"method": {"name": "adamerging"}, "preset": "samerging"},
    "fw_hard": {
        "method": {"name": "fw_hard", "objective": "entropy", "step_size": 1.0, "scaling": 1.0}
    },
    "fw_soft": {"method": {"name": "fw_soft", "objective": "entropy", "iterations": 2}, **FAST},
    "adamerging_500": {"method": {"name": "adamerging"}, **PAPER},
}
"""Each row's changes of the base config. The last has the paper's own optimiser settings."""


def select(*names: str) -> dict[str, Changes]:
    """Return these of :data:`METHODS`, in this order."""
    return {name: METHODS[name] for name in names}


def known_methods(base: Config) -> dict[str, Changes]:
    """Return :data:`METHODS`, with Traditional MTL if the embedded world has a joint model."""
    methods = dict(METHODS)
    root = Path(base.model.reference.removeprefix("local-dir:")).parent
    joint = ZooPaths(root).joint
    if base.model.is_folder and joint.is_file():
        methods["joint"] = {"method": {"name": "joint", "checkpoint": str(joint)}}
    first = ("zero_shot", "individual", "joint")
    return {name: methods[name] for name in dict.fromkeys((*first, *methods)) if name in methods}


def run(bench: Bench, options: Methods) -> Findings:
    methods = bench.methods or _methods_with_images(bench)
    scores = {}
    with bench.workers() as group:
        for name, changes in methods.items():
            scores[name] = bench.merge(name, changes, group).scores
    tasks = [task.name for task in bench.base.tasks if task.test is not None]
    rows: dict[str, list[Cell]] = {
        name: [*top1_cells(each, tasks), *published(name).cells] for name, each in scores.items()
    }
    columns = [*tasks, "mean", *MEANS_COLUMNS]
    caption = (
        "Top-1 in %. B/32, B/16, L/14: the mean published for CLIP ViTs on the eight data sets of "
        "the AdaMerging paper; not for this world, and not all for the same fine-tuned checkpoints."
    )
    return Findings(
        "Performance on all tasks",
        [Table("All methods", columns, rows, caption)],
        notes=[f"base: {len(bench.base.models)} models of {bench.base.model.reference}"],
    )


def _methods_with_images(bench: Bench) -> dict[str, Changes]:
    """Return the methods for which the base config has the images."""
    methods = {}
    for name, changes in known_methods(bench.base).items():
        config = bench.config(changes, name)
        if needed_images(config) == "none" or _all_adapt(config):
            methods[name] = changes
    return methods


def _all_adapt(config: Config) -> bool:
    return all(task.adapt is not None for task in config.models)
