"""Learned methods over several seeds, at equal steps: means and standard deviations.

For an embedded base each seed is a world of its own: other images, another pretraining, other
experts. With any other base only the images that a step draws differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean, stdev

from raymerge.apps.experiments.bench import Bench, Changes, mean_top1, report_line
from raymerge.apps.experiments.findings import Cell, Findings, Table
from raymerge.apps.experiments.lambda_scan import means, scan
from raymerge.apps.experiments.methods import adamerging, select
from raymerge.config.experiments import Seeds
from raymerge.errors import UserError

METHODS: Mapping[str, Changes] = {
    **select("zero_shot", "task_arithmetic", "ties", "tsv", "iso_c", "wudi", "individual"),
    "adamerging_task": adamerging(granularity="task"),
    "adamerging": adamerging(),
    "normalised": adamerging(normalise=True),
    "filtered": adamerging(filter=0.4),
    "infomax": adamerging(objective="infomax"),
    "kl_task": adamerging(objective="kl", granularity="task"),
    "kl": adamerging(objective="kl"),
    "tsv_entropy": adamerging(task_vectors="tsv", clamp="none"),
    "tsv_kl": {"method": {"name": "adamerging"}, "preset": "recommended"},
    "iso_kl": adamerging(task_vectors="iso", clamp="none", objective="kl"),
}
UNIFORM = "best uniform λ"
"""Task arithmetic at the λ that is best for the test labels: a reference, not a method."""
REFERENCES = ("adamerging", UNIFORM)
SCALINGS = tuple(round(0.1 * step, 1) for step in range(1, 11))


def run(bench: Bench, options: Seeds) -> Findings:
    if all(task.test is None for task in bench.base.tasks):
        raise UserError(
            "experiment seeds: no task of the base config has test images to score; "
            "name a tasks[].test"
        )
    methods = bench.methods or METHODS
    by_method: dict[str, list[float]] = {name: [] for name in (UNIFORM, *methods)}
    best_of: list[str] = []
    for seed in options.seeds:
        world = bench if bench.reseed is None else replace(bench, base=bench.reseed(seed))
        with world.workers() as group:
            config = world.config({"method": {"name": "task_arithmetic"}}, f"seed{seed}/scan")
            uniform = means(scan(config, group, SCALINGS, world.output))
            by_method[UNIFORM].append(max(uniform))
            best_of.append(f"{SCALINGS[uniform.index(max(uniform))]:g} (seed {seed})")
            report_line(f"seed {seed}: best uniform λ {best_of[-1]}: {max(uniform):.1%}")
            for name, changes in methods.items():
                top1 = mean_top1(world.merge(f"seed{seed}/{name}", changes, group).scores)
                assert top1 is not None  # checked above
                by_method[name].append(top1)
    notes = [
        f"{bench.base.model.reference}: rows that learn take the same number of steps.",
        f"The best uniform λ, chosen with the test labels: {', '.join(best_of)}.",
    ]
    return Findings("Over several seeds", [table(options.seeds, by_method)], notes=notes)


def table(seeds: Sequence[int], by_method: Mapping[str, Sequence[float]]) -> Table:
    """Return a row per method: top-1 by seed, mean and deviation, gain over each reference."""
    columns = [*(f"seed {seed}" for seed in seeds), "mean", "sd"]
    rows: dict[str, list[Cell]] = {
        name: [*values, mean(values), _spread(values)] for name, values in by_method.items()
    }
    for reference in REFERENCES:
        if reference not in by_method:
            continue
        columns += [f"over {reference}", "sd of that"]
        for name, values in by_method.items():
            gains = [a - b for a, b in zip(values, by_method[reference], strict=True)]
            rows[name] += [mean(gains), _spread(gains)]
    caption = (
        "Mean top-1 over the tasks in %. Gains are taken seed by seed, so their spread is that of "
        "the gain, not of the worlds."
    )
    return Table("Methods", columns, rows, caption)


def _spread(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation; None for a single value."""
    return stdev(values) if len(values) > 1 else None
