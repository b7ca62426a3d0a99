"""Adapt and test on clean and on corrupted images: AdaMerging's Tables 4 and 7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raymerge.apps.experiments.bench import Bench, Changes, collapsed, mean_top1, top1_cells
from raymerge.apps.experiments.corrupted_tasks import Corruption, corrupted_tasks
from raymerge.apps.experiments.corruptions import CORRUPTIONS
from raymerge.apps.experiments.findings import Cell, Findings, Table
from raymerge.apps.experiments.methods import select
from raymerge.apps.experiments.published_numbers import ROBUSTNESS
from raymerge.config import TaskConfig
from raymerge.config.experiments import Robustness
from raymerge.engine.scores import TaskScore
from raymerge.errors import UserError, unknown_name
from raymerge.runs.plan.make import local_resources

METHODS: Mapping[str, Changes] = select("task_arithmetic", "ties", "adamerging", "adamerging_pp")

CLEAN = "clean"

Scores = Mapping[str, Mapping[str, Mapping[str, TaskScore]]]
"""Condition → method → task."""


def run(bench: Bench, options: Robustness) -> Findings:
    methods = bench.methods or METHODS
    tasks = bench.tasks(options.tasks)
    _check(tasks, options)
    # Every condition has images, and so workers, of its own.
    scores: dict[str, Mapping[str, Mapping[str, TaskScore]]] = {}
    collapses: dict[str, list[str]] = {}
    for condition in (CLEAN, *(options.corruptions or CORRUPTIONS)):
        images = _corrupt_tasks(condition, tasks, options, bench.base.seed)
        with bench.workers(images) as group:
            results = {
                name: bench.merge(f"{condition}/{name}", changes, group, images)
                for name, changes in methods.items()
            }
        scores[condition] = {name: result.scores for name, result in results.items()}
        collapses[condition] = [
            f"{name}: {', '.join(names)}"
            for name, result in results.items()
            if (names := collapsed(result))
        ]
    tested = [task.name for task in tasks if task.test is not None]
    return Findings(
        "Robustness to corrupted images",
        [
            _means_table(list(methods), scores, collapses),
            *(_task_table(name, tested, scores) for name in methods),
        ],
        notes=[
            f"{bench.base.model.reference}: {len(tasks)} tasks; adapt and test images corrupted "
            f"alike, severity {options.severity} of the {options.parameters} parameters.",
        ],
    )


def _check(tasks: Sequence[TaskConfig], options: Robustness) -> None:
    for name in options.corruptions or ():
        if name not in CORRUPTIONS:
            raise UserError(f"experiment.corruptions: {unknown_name(name, CORRUPTIONS)}")
    if all(task.test is None for task in tasks):
        raise UserError(
            "experiment.tasks: none of them has test images, so nothing can be scored; "
            "name one of tasks[].test"
        )
    if all(task.checkpoint is None for task in tasks):
        raise UserError(
            "experiment.tasks: none of them has a checkpoint, so nothing can be merged; "
            "name one of tasks[].checkpoint"
        )


def _corrupt_tasks(
    condition: str, tasks: tuple[TaskConfig, ...], options: Robustness, seed: int
) -> tuple[TaskConfig, ...]:
    if condition == CLEAN:
        return tasks
    corruption = Corruption(condition, options.severity, options.parameters, seed)
    return corrupted_tasks(tasks, corruption, local_resources().cpus)


def _means_table(
    methods: Sequence[str], scores: Scores, collapses: Mapping[str, Sequence[str]]
) -> Table:
    published = [
        (f"{architecture} {method}", means)
        for architecture, table in ROBUSTNESS.items()
        for method, means in table.items()
    ]
    rows: dict[str, list[Cell]] = {
        condition: [
            *(mean_top1(each[name]) for name in methods),
            "; ".join(collapses[condition]) or None,
            *(means.get(condition) for _, means in published),
        ]
        for condition, each in scores.items()
    }
    columns = [*methods, "collapsed tasks", *(name for name, _ in published)]
    caption = (
        "Mean top-1 over the tasks in %. Collapsed: the predictions of these tasks shrank to few "
        "classes while λ was learned. B/32 and B/16: published in the AdaMerging "
        "paper's Tables 4 and 7 for Cars, EuroSAT, RESISC45 and GTSRB; not for this world."
    )
    return Table("All conditions", columns, rows, caption)


def _task_table(method: str, tasks: Sequence[str], scores: Scores) -> Table:
    rows: dict[str, list[Cell]] = {
        condition: list(top1_cells(each[method], tasks)[:-1]) for condition, each in scores.items()
    }
    return Table(f"{method}, by task", tasks, rows)
