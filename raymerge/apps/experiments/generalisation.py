"""Merge and adapt on the seen tasks, test on all of them: AdaMerging's Tables 3 and 6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raymerge.apps.experiments.bench import Bench, Changes, top1_cells
from raymerge.apps.experiments.findings import Cell, Findings, Table
from raymerge.apps.experiments.methods import select
from raymerge.apps.experiments.published_numbers import SPLITS
from raymerge.config import TaskConfig
from raymerge.config.experiments import Generalisation
from raymerge.engine.scores import TaskScore
from raymerge.errors import UserError

METHODS: Mapping[str, Changes] = select(
    "zero_shot", "task_arithmetic", "ties", "adamerging_task", "adamerging", "adamerging_pp"
)


def run(bench: Bench, options: Generalisation) -> Findings:
    methods = bench.methods or METHODS
    splits = [split(bench, unseen) for unseen in options.unseen]
    tables = [
        _table(unseen, _scores(bench, methods, unseen, tasks))
        for unseen, tasks in zip(options.unseen, splits, strict=True)
    ]
    return Findings(
        "Generalisation to unseen tasks",
        [*tables, *published_tables()],
        notes=[
            f"{bench.base.model.reference}: no checkpoint and no image of an unseen task is used "
            "to merge or to learn λ; zero_shot is the model before merging.",
        ],
    )


def split(bench: Bench, unseen: Sequence[str]) -> tuple[TaskConfig, ...]:
    """Return all tasks, the ``unseen`` ones without checkpoint and images to adapt on.

    Raises :class:`UserError` for an unknown task, one without test images, or if none is left.
    """
    for task in bench.tasks(unseen):
        if task.test is None:
            raise UserError(
                f"experiment.unseen: task {task.name!r} has no test images; name its test"
            )
    hidden = {"checkpoint": None, "adapt": None}
    tasks = tuple(
        task.model_copy(update=hidden) if task.name in unseen else task for task in bench.base.tasks
    )
    if all(task.checkpoint is None for task in tasks):
        raise UserError(
            f"experiment.unseen: {', '.join(unseen)}: no task is left to merge; name fewer tasks"
        )
    return tasks


def _scores(
    bench: Bench,
    methods: Mapping[str, Changes],
    unseen: Sequence[str],
    tasks: Sequence[TaskConfig],
) -> dict[str, Mapping[str, TaskScore]]:
    folder = "unseen-" + "-".join(unseen)
    with bench.workers(tasks) as group:
        return {
            name: bench.merge(f"{folder}/{name}", changes, group, tasks).scores
            for name, changes in methods.items()
        }


def _table(unseen: Sequence[str], scores: Mapping[str, Mapping[str, TaskScore]]) -> Table:
    tested = next(iter(scores.values()))
    seen_tasks = [task for task in tested if task not in unseen]
    rows: dict[str, list[Cell]] = {
        name: [*top1_cells(each, seen_tasks), *top1_cells(each, unseen)]
        for name, each in scores.items()
    }
    columns = [*seen_tasks, "seen mean", *unseen, "unseen mean"]
    title = f"Unseen: {', '.join(unseen)}"
    return Table(title, columns, rows, "Top-1 in %; the unseen tasks are last.")


def published_tables() -> list[Table]:
    """Return the paper's means, a table for each pair of unseen data sets."""
    return [_published(unseen) for unseen in dict.fromkeys(split.unseen for split in SPLITS)]


def _published(unseen: tuple[str, str]) -> Table:
    splits = [split for split in SPLITS if split.unseen == unseen]
    columns = [f"{split.architecture} {part}" for split in splits for part in ("seen", "unseen")]
    methods = dict.fromkeys(name for split in splits for name in split.means)
    rows: dict[str, list[Cell]] = {
        name: [mean for split in splits for mean in split.means.get(name, (None, None))]
        for name in methods
    }
    caption = (
        "AdaMerging paper, Tables 3 and 6: mean top-1 in % over the six seen and the two unseen "
        "of its eight data sets, CLIP ViTs; not for this world."
    )
    return Table(f"Published, unseen: {', '.join(unseen)}", columns, rows, caption)
