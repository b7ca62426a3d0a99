"""Learned methods over several embedded worlds, at equal steps: means and standard deviations.

Each seed is a world of its own: other images, another pretraining, other experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean, stdev

from raymerge.config.experiments import Seeds
from raymerge.experiments.bench import Bench, Changes, mean_top1
from raymerge.experiments.findings import Cell, Findings, Table
from raymerge.experiments.methods import adamerging, select
from raymerge.experiments.run import demo_config

METHODS: Mapping[str, Changes] = {
    **select("zero_shot", "task_arithmetic", "ties", "tsv", "iso_c", "individual"),
    "adamerging_task": adamerging(granularity="task"),
    "adamerging": adamerging(),
    "normalised": adamerging(normalise=True),
    "filtered": adamerging(filter=0.4),
    "infomax": adamerging(objective="infomax"),
    "kl": adamerging(objective="kl"),
    "tsv_entropy": adamerging(task_vectors="tsv", clamp="none"),
    "tsv_kl": adamerging(task_vectors="tsv", clamp="none", objective="kl"),
    "iso_kl": adamerging(task_vectors="iso", clamp="none", objective="kl"),
}
REFERENCE = "adamerging"


def run(bench: Bench, options: Seeds) -> Findings:
    methods = bench.methods or METHODS
    found: dict[str, list[float]] = {name: [] for name in methods}
    for seed in options.seeds:
        world = replace(bench, base=demo_config(seed))
        with world.workers() as group:
            for name, changes in methods.items():
                top1 = mean_top1(world.merge(f"seed{seed}/{name}", changes, group).scores)
                assert top1 is not None  # the embedded world has test images
                found[name].append(top1)
    columns = [*(f"seed {seed}" for seed in options.seeds), "mean", "sd"]
    rows: dict[str, list[Cell]] = {
        name: [*values, mean(values), _spread(values)] for name, values in found.items()
    }
    if REFERENCE in found:
        columns += [f"over {REFERENCE}", "sd of that"]
        for name, values in found.items():
            gains = [a - b for a, b in zip(values, found[REFERENCE], strict=True)]
            rows[name] += [mean(gains), _spread(gains)]
    caption = (
        "Mean top-1 over the tasks in %. Differences are taken world by world, so their spread is "
        "that of the gain, not of the worlds."
    )
    notes = ["Rows that learn take the same number of steps on the same images."]
    return Findings("Over several worlds", [Table("Methods", columns, rows, caption)], notes=notes)


def _spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None of one value."""
    return stdev(values) if len(values) > 1 else None
