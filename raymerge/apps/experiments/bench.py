"""The base of every experiment: a config to change, workers to share, merges like a user's own.

An experiment is a function of a :class:`Bench` that returns :class:`~.findings.Findings`.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from time import perf_counter
from typing import Any

from raymerge.config import Config, TaskConfig, parse_config
from raymerge.engine.driver.groups import WorkerGroup
from raymerge.engine.scores import TaskScore
from raymerge.errors import UserError
from raymerge.merging.registry import describe, method_of
from raymerge.runs.folder import RunFolder
from raymerge.runs.merge import MergeResult, merge
from raymerge.runs.state import fingerprint, learning_states
from raymerge.runs.workers import open_group

logger = logging.getLogger(__name__)

Changes = Mapping[str, Any]

FAST: Changes = {"preset": "fast"}

_RUN = re.compile(r"(?!\.)[\w.+-]+(/(?!\.)[\w.+-]+)*")


@dataclass
class Bench:
    """One experiment's base config and output folder.

    ``base``: the config that every merge changes. ``output``: the folder of the runs' folders.
    ``methods``: the user's methods instead of the experiment's. ``reseed``: returns the base with
    another seed, which for an embedded base is another world.
    """

    base: Config
    output: Path
    methods: Mapping[str, Changes] | None = None
    reseed: Callable[[int], Config] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def tasks(self, names: Sequence[str] | None) -> tuple[TaskConfig, ...]:
        """Return the base's tasks of these names, or all for None. Raises :class:`UserError`."""
        if names is None:
            return self.base.tasks
        task_of = {task.name: task for task in self.base.tasks}
        for name in names:
            if name not in task_of:
                raise UserError(
                    f"experiment: task {name!r} is not in the base config; it has "
                    f"{', '.join(task_of)}; choose among them"
                )
        return tuple(task_of[name] for name in names)

    def config(
        self, changes: Changes, run: str, tasks: Sequence[TaskConfig] | None = None
    ) -> Config:
        """Return the base with ``changes`` (as in YAML) for ``tasks``, writing to ``runs/run``.

        With a preset the base's optimizer is left out, for it would override the preset.
        """
        if not _RUN.fullmatch(run):
            raise UserError(
                f"experiment: methods: {run!r} is not a valid name of a row and folder; "
                "use letters, digits and _"
            )
        exclude = {"optimizer"} if "preset" in changes else set()
        data = self._base(tasks).model_dump(mode="json", exclude_none=True, exclude=exclude)
        data = {**data, **changes, "output": str(self.output / "runs" / run)}
        return parse_config(data, root=self.output, source=f"experiment: methods: {run}")

    @contextmanager
    def workers(self, tasks: Sequence[TaskConfig] | None = None) -> Iterator[WorkerGroup]:
        """Yield workers for these tasks, which all their merges share."""
        with open_group(self._base(tasks), None) as group:
            yield group

    def _base(self, tasks: Sequence[TaskConfig] | None) -> Config:
        return self.base if tasks is None else self.base.model_copy(update={"tasks": tuple(tasks)})

    def merge(
        self,
        name: str,
        changes: Changes,
        group: WorkerGroup,
        tasks: Sequence[TaskConfig] | None = None,
    ) -> MergeResult:
        """Run one merge and report its top-1 and its time on stderr."""
        began = perf_counter()
        config = self.config(changes, name, tasks)
        result = merge(config, overwrite=_exists(config), group=group)
        self.seconds[name] = perf_counter() - began
        top1 = "" if result.top1 is None else f": {result.top1:.1%}"
        report_line(f"{name}: {describe(config.method)}{top1} ({self.seconds[name]:.0f} s)")
        return result


def collapsed(result: MergeResult) -> tuple[str, ...]:
    """Return the tasks whose predictions collapsed while λ was learned."""
    config, names = result.config, result.config.task_names
    if result.output is None or method_of(config.method).loop is None:
        return ()
    store = learning_states(
        RunFolder(result.output).state,
        fingerprint(config),
        config.model_names,
        result.layers,
        config.state.keep,
    )
    state = store.newest()
    if state is None or state.monitor is None:
        return ()
    return tuple(compress(names, state.monitor.collapsed.tolist()))


def _exists(config: Config) -> bool:
    return config.output is not None and (Path(config.output) / "config.yaml").exists()


def mean_top1(scores: Mapping[str, TaskScore], tasks: Sequence[str] | None = None) -> float | None:
    """Return the unweighted mean over those of ``tasks`` (default: all) that have a score."""
    rows = [row.top1 for name, row in scores.items() if tasks is None or name in tasks]
    return sum(rows) / len(rows) if rows else None


def top1_cells(scores: Mapping[str, TaskScore], tasks: Sequence[str]) -> list[float | None]:
    """Return the top-1 of each task, None where it has no score, and their mean."""
    each = [scores[task].top1 if task in scores else None for task in tasks]
    return [*each, mean_top1(scores, tasks)]


def report_line(text: str) -> None:
    """Print a line of progress on stderr."""
    print(f"raymerge: {text}", file=sys.stderr)
