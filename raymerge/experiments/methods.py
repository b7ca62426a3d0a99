"""All methods on all tasks: the paper's Tables 1, 2 and 5."""

from __future__ import annotations

from collections.abc import Mapping

from raymerge.config import Config
from raymerge.config.experiments import Methods
from raymerge.experiments.bench import FAST, Bench, Changes, mean_top1
from raymerge.experiments.findings import Cell, Findings, Table
from raymerge.experiments.published import published
from raymerge.merging.registry import needed_images

PAPER: Changes = {"optimizer": {"steps": 500, "lr": 1e-3, "batch_size": 16}}


def _ada(**options: object) -> Changes:
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
    "adamerging_task": _ada(granularity="task"),
    "adamerging_task_pp": _ada(granularity="task", task_vectors="ties"),
    "adamerging": _ada(),
    "adamerging_pp": _ada(task_vectors="ties"),
    "adamerging_kl": _ada(objective="kl"),
    "adamerging_tsv": _ada(task_vectors="tsv", clamp="none"),
    "samerging": {"method": {"name": "adamerging"}, "preset": "samerging"},
    "fw_hard": {
        "method": {"name": "fw_hard", "objective": "entropy", "step_size": 1.0, "scaling": 1.0}
    },
    "fw_soft": {"method": {"name": "fw_soft", "objective": "entropy", "iterations": 2}, **FAST},
    "adamerging_500": {"method": {"name": "adamerging"}, **PAPER},
}
"""What each row changes in the base config. The last has the paper's own optimiser settings."""


def run(bench: Bench, options: Methods) -> Findings:
    methods = bench.methods or _possible(bench)
    scores = {}
    with bench.workers() as group:
        for name, changes in methods.items():
            scores[name] = bench.merge(name, changes, group).scores
    tasks = [task.name for task in bench.base.tasks if task.test is not None]
    rows: dict[str, list[Cell]] = {}
    for name, found in scores.items():
        each: list[Cell] = [found[task].top1 if task in found else None for task in tasks]
        rows[name] = [*each, mean_top1(found), *published(name)]
    columns = [*tasks, "mean", "B/32", "L/14"]
    caption = (
        "Top-1 in %. B/32 and L/14: the mean published for the eight data sets of the AdaMerging "
        "paper with CLIP ViTs; not this world."
    )
    return Findings(
        "Performance on all tasks",
        [Table("All methods", columns, rows, caption)],
        notes=[f"base: {len(bench.base.models)} models of {bench.base.model.reference}"],
    )


def _possible(bench: Bench) -> dict[str, Changes]:
    """The methods for which the base config has the images."""
    kept = {}
    for name, changes in METHODS.items():
        config = bench.config(changes, name)
        if needed_images(config) == "none" or _all_adapt(config):
            kept[name] = changes
    return kept


def _all_adapt(config: Config) -> bool:
    return all(task.adapt is not None for task in config.models)
