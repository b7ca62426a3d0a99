"""FW-Merging with more and more candidate models: accuracy, and the memory of a merge.

The pools of models come from :mod:`~raymerge.apps.experiments.fw_candidates`, the memory from
:mod:`~raymerge.apps.experiments.fw_memory`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from raymerge.apps.experiments.bench import FAST, Bench, Changes, mean_top1
from raymerge.apps.experiments.findings import Cell, Curves, Findings, Table
from raymerge.apps.experiments.fw_candidates import (
    GrowingPool,
    demo_root,
    growing_pools,
    only_models_learn,
)
from raymerge.apps.experiments.fw_memory import Peaks, measure_memory, memory_curves, memory_tables
from raymerge.config import TaskConfig
from raymerge.config.experiments import FwScaling
from raymerge.data.sources import labelled_images
from raymerge.errors import DataError
from raymerge.files.atomic import write_json
from raymerge.merging.registry import needed_images
from raymerge.runs.merge import MergeResult

METHODS: Mapping[str, Changes] = {
    "task_arithmetic": {"method": {"name": "task_arithmetic", "scaling": 0.3}},
    "ties": {"method": {"name": "ties", "density": 0.2, "scaling": 0.3}},
    "adamerging": {"method": {"name": "adamerging"}, **FAST},
    "fw_hard": {"method": {"name": "fw_hard", "iterations": 20, "step_size": 0.1, "scaling": 1.0}},
    "fw_soft": {"method": {"name": "fw_soft", "iterations": 3}, **FAST},
}
START: Changes = {"method": {"name": "adamerging"}, **FAST}
"""The merge that hard Frank-Wolfe starts from: the models that the pool starts with."""


def run(bench: Bench, options: FwScaling) -> Findings:
    # Accuracy: every method at every size of every pool.
    pools = growing_pools(bench, options)
    objective = objective_of(bench)
    starts = [_merge_start(bench, pool) for pool in pools]
    top1 = [
        _accuracies(bench, pool, objective, start)
        for pool, start in zip(pools, starts, strict=True)
    ]

    # Memory: the same models, repeated until there are enough.
    memory = measure_memory(bench, _all_models(pools), objective)
    return Findings(
        "FW-Merging with more candidate models",
        tables=[
            *(_accuracy_table(pool, rows) for pool, rows in zip(pools, top1, strict=True)),
            *memory_tables(memory),
        ],
        curves=[
            *(_accuracy_curves(pool, rows) for pool, rows in zip(pools, top1, strict=True)),
            *memory_curves(memory),
        ],
        notes=_notes(bench, pools, objective, starts, memory),
        data={
            "top1": {
                pool.kind: {str(n): row for n, row in zip(pool.counts, rows, strict=True)}
                for pool, rows in zip(pools, top1, strict=True)
            },
            "peak_anonymous_bytes": {
                location: {str(models): value for models, value in peaks.items()}
                for location, peaks in memory.items()
            },
        },
    )


def _all_models(pools: Sequence[GrowingPool]) -> list[TaskConfig]:
    """Return every model of any pool once."""
    configs = [c for pool in pools for c in pool.own]
    configs += [c.config for pool in pools for c in pool.candidates]
    return list({config.name: config for config in configs}.values())


def objective_of(bench: Bench) -> str:
    """Return ``cross_entropy`` if all images to adapt on are labelled, else ``entropy``."""
    for task in bench.base.tasks:
        if task.adapt is not None:
            try:
                labelled_images(task.adapt, task.classnames, "adapt")
            except DataError:
                return "entropy"
    return "cross_entropy"


def _accuracies(
    bench: Bench, pool: GrowingPool, objective: str, start: MergeResult | None
) -> list[dict[str, float | None]]:
    """Return the mean top-1 over the tested tasks of every method, at each number of candidates."""
    methods = bench.methods or METHODS
    rows: list[dict[str, float | None]] = []
    for count in pool.counts:
        row: dict[str, float | None] = dict.fromkeys(methods)
        for need, tasks in _tasks_by_need(pool, count).items():
            subset = {n: c for n, c in methods.items() if _image_need(bench, c, pool.own) == need}
            if not subset or tasks is None:
                continue
            with bench.workers(tasks) as group:
                for name, changes in subset.items():
                    run_name = f"{name}_{pool.kind}_{count}"
                    if need == "frank_wolfe":
                        starts = bench.output / "runs" / "starts" / run_name
                        changes = _complete_frank_wolfe(changes, objective, start, tasks, starts)
                    if need == "images":
                        changes = _share_batch(bench, changes, pool, tasks)
                    row[name] = mean_top1(bench.merge(run_name, changes, group, tasks).scores)
        rows.append(row)
    return rows


def _tasks_by_need(pool: GrowingPool, count: int) -> dict[str, tuple[TaskConfig, ...] | None]:
    """Return the tasks by what a method needs: nothing, images for every model, Frank-Wolfe's."""
    tasks = pool.tasks(count)
    return {
        "none": only_models_learn(tasks),
        "images": pool.with_images(count),
        "frank_wolfe": tasks,
    }


def _image_need(bench: Bench, changes: Changes, own: Sequence[TaskConfig]) -> str:
    if _is_frank_wolfe(changes):
        return "frank_wolfe"
    return "none" if needed_images(bench.config(changes, "check", own)) == "none" else "images"


def _share_batch(
    bench: Bench, changes: Changes, pool: GrowingPool, tasks: Sequence[TaskConfig]
) -> Changes:
    """Return smaller batches if several models learn from one task's images.

    A step then has at most as many images in all as with one model for each tested task, and costs
    no more than Frank-Wolfe's.
    """
    models = sum(task.checkpoint is not None for task in tasks)
    most = len(pool.tested)
    if models <= most:
        return changes
    batch = bench.config(changes, "check", pool.own).optimizer.batch_size * most // models
    return {**changes, "optimizer": {**changes.get("optimizer", {}), "batch_size": max(1, batch)}}


def _is_frank_wolfe(changes: Changes) -> bool:
    method = changes.get("method")
    return isinstance(method, Mapping) and str(method.get("name")).startswith("fw_")


def _needs_start(changes: Changes) -> bool:
    """Return True for hard Frank-Wolfe without a start of its own.

    Soft Frank-Wolfe starts from the pretrained model.
    """
    method = changes["method"] if _is_frank_wolfe(changes) else {}
    return method.get("name") == "fw_hard" and "start" not in method


def _merge_start(bench: Bench, pool: GrowingPool) -> MergeResult | None:
    """Merge the models that the pool starts with, from their own images alone, if it is needed."""
    methods = bench.methods or METHODS
    is_needed = any(_needs_start(changes) for changes in methods.values())
    if not is_needed or any(task.adapt is None for task in pool.own):
        return None
    tasks = only_models_learn(pool.tasks(0))
    with bench.workers(tasks) as group:
        return bench.merge(f"start_{pool.kind}", START, group, tasks)


def _complete_frank_wolfe(
    changes: Changes,
    objective: str,
    start: MergeResult | None,
    tasks: Sequence[TaskConfig],
    folder: Path,
) -> Changes:
    """Return Frank-Wolfe's options with the base's objective and a start without candidates."""
    options = {"objective": objective, **changes["method"]}
    if _needs_start(changes) and start is not None:
        options["start"] = _pad_start(start, tasks, folder)
    return {**changes, "method": options}


def _pad_start(start: MergeResult, tasks: Sequence[TaskConfig], folder: Path) -> str:
    """Write the start's ``lambdas.json`` with rows of 0 for further models; return its path."""
    assert start.output is not None
    content = json.loads((start.output / "lambdas.json").read_text(encoding="utf-8"))
    rows = dict(zip(content["tasks"], content["values"], strict=True))
    names = [task.name for task in tasks if task.checkpoint is not None]
    zeros = [0.0] * len(content["layers"])
    path = folder / "lambdas.json"
    folder.mkdir(parents=True, exist_ok=True)
    values = [rows.get(name, zeros) for name in names]
    write_json(path, {"tasks": names, "layers": content["layers"], "values": values})
    return str(path)


# --- tables, curves and notes ------------------------------------------------------------------


def _accuracy_table(pool: GrowingPool, top1: Sequence[Mapping[str, float | None]]) -> Table:
    columns = [f"{len(pool.own)} models", *(f"+{count}" for count in pool.counts[1:])]
    rows: dict[str, list[Cell]] = {name: [each[name] for each in top1] for name in top1[0]}
    caption = (
        f"Mean top-1 in % over the {len(pool.tested)} tested tasks, the same in every column; the "
        f"pool starts with the models of {', '.join(task.name for task in pool.own)}."
    )
    return Table(f"Accuracy with more {pool.title}", columns, rows, caption)


def _accuracy_curves(pool: GrowingPool, top1: Sequence[Mapping[str, float | None]]) -> Curves:
    return Curves(
        f"More {pool.title}",
        x_label="candidate models",
        y_label="mean top-1",
        x=[len(pool.own) + count for count in pool.counts],
        series={name: [each[name] for each in top1] for name in top1[0]},
    )


def _notes(
    bench: Bench,
    pools: Sequence[GrowingPool],
    objective: str,
    starts: Sequence[MergeResult | None],
    memory: Peaks,
) -> list[str]:
    objectives = {
        "entropy": "entropy of unlabeled images",
        "cross_entropy": "labelled cross-entropy",
    }
    added = (f"{len(p.candidates)} {p.kind} beside {len(p.own)}" for p in pools)
    # The settings that all pools share.
    notes = [
        f"base: {bench.base.model.reference}; candidates added: {', '.join(added)}.",
        f"FW-Merging minimises the {objectives[objective]} of all tested tasks, whether a model of "
        "the pool was trained for them or not.",
        "AdaMerging can learn only from images of its models' tasks: it gets those of the tested "
        "tasks whose model is in the pool, and for every further model a tested task's again. A "
        "step has at most as many images in all as with one model for each tested task. "
        "Every λ starts at 0.3 however many models there are, as in the paper.",
    ]
    # What differs by pool: the start of hard Frank-Wolfe, and the kind of candidates.
    for pool, start in zip(pools, starts, strict=True):
        if start is not None and start.top1 is not None:
            notes.append(
                f"{pool.title}: hard FW-Merging starts from an AdaMerging of the first "
                f"{len(pool.own)} models, which scores {start.top1:.1%}; soft from the pretrained "
                "model, with every point's whole pool."
            )
    notes += [_describe_pool(pool, demo=demo_root(bench) is not None) for pool in pools]
    if not memory:
        notes.append("Memory was not measured: this system has no /proc.")
    return notes


def _describe_pool(pool: GrowingPool, *, demo: bool) -> str:
    if pool.kind == "irrelevant":
        return "irrelevant: fine-tuned to tell turned and tinted images apart."
    if pool.kind != "relevant":
        return f"{pool.kind}: the base's models without images."
    others = len(pool.tested) - len(pool.own)
    text = f"relevant: first the models of the {others} tested tasks that the pool starts without"
    more = ", then more of all tested tasks, fine-tuned from other images in a shorter training"
    return f"{text}{more if demo else ''}."
