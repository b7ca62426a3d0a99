"""Top-1 against the single λ of task arithmetic, TIES and similar methods: AdaMerging's Fig. 1."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

import torch

from raymerge.apps.experiments.bench import Bench, Changes, mean_top1, report_line
from raymerge.apps.experiments.findings import Cell, Curves, Findings, Table
from raymerge.apps.experiments.methods import select
from raymerge.apps.experiments.published_numbers import BEST_SCALING
from raymerge.config import Config
from raymerge.config.experiments import LambdaScan
from raymerge.engine.driver.groups import WorkerGroup
from raymerge.engine.scores import TaskScore
from raymerge.errors import UserError
from raymerge.merging.registry import method_of
from raymerge.models.resolve import WEIGHTS_FILE
from raymerge.runs.inputs import MergeInputs
from raymerge.runs.merge import score

METHODS: Mapping[str, Changes] = select("task_arithmetic", "ties")

Scan = Sequence[Mapping[str, TaskScore]]
"""The scores at each λ in turn."""


def run(bench: Bench, options: LambdaScan) -> Findings:
    methods = bench.methods or METHODS
    configs = {name: bench.config(changes, name) for name, changes in methods.items()}
    _check(configs, options)
    # One set of workers scores the models of every method and λ.
    scans: dict[str, Scan] = {}
    with bench.workers() as group:
        for name, config in configs.items():
            began = perf_counter()
            scans[name] = scan(config, group, options.scalings, bench.output)
            bench.seconds[name] = perf_counter() - began
            report_line(f"{name}: {len(options.scalings)} λ ({bench.seconds[name]:.0f} s)")
    tasks = list(next(iter(scans.values()))[0])
    return Findings(
        "Top-1 against λ",
        [
            _best_table(options.scalings, scans),
            _task_table(options.scalings, scans, tasks),
            _all_table(options.scalings, scans),
        ],
        [_mean_curves(options.scalings, scans)]
        + [_task_curves(options.scalings, name, results, tasks) for name, results in scans.items()],
        notes=[
            f"{bench.base.model.reference}: the best λ is chosen with the test labels, which no "
            "merging method may see; λ = 0 is the pretrained model.",
        ],
    )


def scan(
    config: Config, group: WorkerGroup, scalings: Sequence[float], folder: Path
) -> list[Mapping[str, TaskScore]]:
    """Return the scores of the config's method at each λ; its task vectors are prepared once.

    ``folder``: a folder that every worker can read; one model at a time is written there and
    removed.
    """
    inputs = MergeInputs(config)
    scores: list[Mapping[str, TaskScore]] = []
    inputs.require_finite()
    folder.mkdir(parents=True, exist_ok=True)
    for scaling in scalings:
        with tempfile.TemporaryDirectory(prefix=".scan-", dir=folder) as temporary:
            weights = Path(temporary) / WEIGHTS_FILE
            inputs.write(weights, torch.full_like(inputs.initial_lambdas(), scaling))
            scores.append(score(config, group, str(weights)))
    return scores


def _check(configs: Mapping[str, Config], options: LambdaScan) -> None:
    if not options.scalings:
        raise UserError("experiment.scalings: is empty; list at least one λ")
    for name, config in configs.items():
        if not method_of(config.method).constant:
            raise UserError(
                f"experiment: methods: {name}: {config.method.name} has no single λ to scan; use "
                "task_arithmetic, ties, dare or another that needs no images"
            )
        if all(task.test is None for task in config.tasks):
            raise UserError(
                "experiment: no task of the base config has test images; name a tasks[].test"
            )


def means(results: Scan) -> list[float]:
    """Return the mean top-1 at each λ."""
    return [mean for scores in results if (mean := mean_top1(scores)) is not None]


def _best(scalings: Sequence[float], top1: Sequence[float]) -> tuple[float, float]:
    """Return the best (λ, top-1); of equal ones the smallest λ."""
    return max(zip(scalings, top1, strict=True), key=lambda pair: (pair[1], -pair[0]))


def _best_table(scalings: Sequence[float], scans: Mapping[str, Scan]) -> Table:
    rows: dict[str, list[Cell]] = {}
    for name, results in scans.items():
        best, top1 = _best(scalings, means(results))
        published = BEST_SCALING.get(name)
        cells: list[Cell] = [f"{published[0]:g}", published[1]] if published else [None, None]
        rows[name] = [f"{best:g}", top1, *cells]
    columns = ["best λ", "top-1", "published: best λ", "top-1 there"]
    caption = (
        "Mean top-1 over the tasks in %. Published: AdaMerging paper, Fig. 1, ViT-B/32 on eight "
        "data sets; not for this world."
    )
    return Table("The best λ", columns, rows, caption)


def _task_table(
    scalings: Sequence[float], scans: Mapping[str, Scan], tasks: Sequence[str]
) -> Table:
    rows: dict[str, list[Cell]] = {}
    for name, results in scans.items():
        best = [_best(scalings, [scores[task].top1 for scores in results]) for task in tasks]
        rows[f"{name}: λ"] = [f"{scaling:g}" for scaling, _ in best]
        rows[f"{name}: top-1"] = [top1 for _, top1 in best]
    return Table("The best λ of each task, if it were for that task alone", tasks, rows)


def _all_table(scalings: Sequence[float], scans: Mapping[str, Scan]) -> Table:
    rows = {name: means(results) for name, results in scans.items()}
    return Table("Mean top-1 at each λ", [f"{scaling:g}" for scaling in scalings], rows)


def _mean_curves(scalings: Sequence[float], scans: Mapping[str, Scan]) -> Curves:
    series = {name: means(results) for name, results in scans.items()}
    return Curves("Mean top-1 against λ", "λ", "top-1", scalings, series)


def _task_curves(
    scalings: Sequence[float], method: str, results: Scan, tasks: Sequence[str]
) -> Curves:
    series = {task: [scores[task].top1 for scores in results] for task in tasks}
    return Curves(f"{method}: top-1 of each task against λ", "λ", "top-1", scalings, series)
