"""The candidate models of ``fw_scaling``: pools that start with some models and grow.

Candidates are models of tested tasks that the pool starts without, further models of the demo world
and models without images. Merging them is left to :mod:`raymerge.apps.experiments.fw_scaling`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raymerge.apps.experiments.bench import Bench, report_line
from raymerge.apps.zoo.extras import Extra, build_extras, extras
from raymerge.apps.zoo.recipe import ZooRecipe
from raymerge.config import TaskConfig
from raymerge.config.experiments import FwScaling
from raymerge.errors import UserError


@dataclass(frozen=True)
class Candidate:
    """A model that may be added to the pool.

    ``images``: the task whose images a method gets for it, if the method needs some; or None.
    """

    config: TaskConfig
    images: TaskConfig | None = None

    @property
    def with_images(self) -> TaskConfig:
        """The model as a task with images to learn from, but none to test on."""
        assert self.images is not None
        keys = ("adapt", "classnames", "templates", "head")
        return self.config.model_copy(update={key: getattr(self.images, key) for key in keys})


@dataclass(frozen=True)
class GrowingPool:
    """A pool of models to which ``candidates`` of one kind are added.

    ``tested``: the tasks that are tested and that Frank-Wolfe learns for, at every size of the
    pool. ``own``: the tasks whose models the pool starts with. ``extra_counts``: numbers of
    candidates at which it is measured, besides 4, 8, 16, …
    """

    kind: str
    tested: Sequence[TaskConfig]
    own: Sequence[TaskConfig]
    candidates: Sequence[Candidate]
    extra_counts: Sequence[int] = ()

    @property
    def counts(self) -> list[int]:
        """The numbers of candidates at which the pool is measured."""
        return sorted({0, *self.extra_counts, *candidate_counts(len(self.candidates))})

    @property
    def title(self) -> str:
        return f"{self.kind} models"

    def tasks(self, count: int) -> tuple[TaskConfig, ...]:
        """Return the tasks of a merge with ``count`` candidates in the pool.

        First the tested tasks, without a checkpoint if their model is not in the pool; then the
        candidates that belong to no tested task.
        """
        pool = [*self.own, *(candidate.config for candidate in self.candidates[:count])]
        names = {task.name for task in pool}
        tested = {task.name for task in self.tested}
        tasks = (t if t.name in names else _drop_model(t) for t in self.tested)
        return (*tasks, *(task for task in pool if task.name not in tested))

    def with_images(self, count: int) -> tuple[TaskConfig, ...] | None:
        """Return the tasks with images for every model, or None if a model has none."""
        learners = {c.config.name: c.with_images for c in self.candidates[:count] if c.images}
        tasks = [learners.get(task.name, task) for task in only_models_learn(self.tasks(count))]
        lacks_images = any(task.checkpoint and task.adapt is None for task in tasks)
        return None if lacks_images else tuple(tasks)


def only_models_learn(tasks: Sequence[TaskConfig]) -> tuple[TaskConfig, ...]:
    """Return the tasks without images to learn from where there is no checkpoint.

    Only Frank-Wolfe can learn for a task without a model; other methods only test it.
    """
    no_images = {"adapt": None}
    return tuple(t if t.checkpoint else t.model_copy(update=no_images) for t in tasks)


def _drop_model(task: TaskConfig) -> TaskConfig:
    return task.model_copy(update={"checkpoint": None})


def candidate_counts(most: int) -> list[int]:
    """Return 4, 8, 16, … up to ``most``: the numbers of candidates that are added in turn."""
    doubled = [4 * 2**i for i in range(most.bit_length()) if 4 * 2**i < most]
    return [*doubled, most] if most else []


def growing_pools(bench: Bench, options: FwScaling) -> list[GrowingPool]:
    """Return a pool that grows by relevant models and one that grows by others.

    Relevant are first the models of tested tasks that the pool starts without. For the demo world
    further models of both kinds are trained; any other base has its models without images as the
    others. Raises :class:`UserError` if there is no candidate.
    """
    # The models that the pools start with.
    tested = [task for task in bench.base.tasks if task.adapt or task.test]
    merged = [task for task in tested if task.checkpoint]
    own = _initial_tasks(bench, merged, options)

    # The candidates of either kind.
    others = [Candidate(task, task if task.adapt else None) for task in merged if task not in own]
    others = others[: options.relevant]
    root = demo_root(bench)
    if root is not None:
        more = _train_candidates(bench, root, extras("relevant", options.relevant - len(others)))
        less = _train_candidates(bench, root, extras("irrelevant", options.irrelevant))
        kind = "irrelevant"
    else:
        untested = [task for task in bench.base.models if task not in merged]
        more, less, kind = [], [Candidate(task) for task in untested], "untested"
    pools = [
        GrowingPool("relevant", tested, own, [*others, *more], [len(others)]),
        GrowingPool(kind, tested, merged, less),
    ]
    pools = [pool for pool in pools if pool.candidates]
    if not pools:
        raise UserError(
            "experiment: fw_scaling has no candidates to add; list more tested tasks than "
            "experiment.own in the base config, or models without images (a name and a checkpoint "
            "each), or take `base: demo`"
        )
    return pools


def _initial_tasks(
    bench: Bench, merged: Sequence[TaskConfig], options: FwScaling
) -> list[TaskConfig]:
    """Return the tested tasks whose models the pool starts with, in the base's order."""
    if isinstance(options.own, int):
        return list(merged[: options.own])
    tasks = bench.tasks(options.own)
    for task in tasks:
        if task not in merged:
            raise UserError(
                f"experiment: own: task {task.name!r} has no checkpoint or no images to test; "
                "name tested tasks with a model"
            )
    return [task for task in merged if task in tasks]


def demo_root(bench: Bench) -> Path | None:
    """Return the folder of the demo world that the base is of, or None."""
    root = Path(bench.base.model.arch.removeprefix("local-dir:")).parent
    return root if (root / "zoo.fingerprint").exists() else None


def _train_candidates(bench: Bench, root: Path, models: Sequence[Extra]) -> list[Candidate]:
    """Return further models of the demo world, each with its task's images."""
    if not models:
        return []
    seed = bench.base.seed
    if (root / "zoo.fingerprint").read_text().strip() != ZooRecipe().fingerprint(seed):
        raise UserError(f"experiment: {root} is not the demo world of seed {seed}; set its seed")
    began = time.perf_counter()
    paths = build_extras(root, models, seed=seed, workers=min(len(models), os.cpu_count() or 1))
    report_line(f"{len(paths)} more models ({time.perf_counter() - began:.0f} s)")
    images = {task.name: task for task in bench.base.tasks}
    return [
        Candidate(
            TaskConfig(name=extra.name, checkpoint=str(paths[extra.name])), images[extra.task]
        )
        for extra in models
    ]
