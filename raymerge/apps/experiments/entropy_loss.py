"""Entropy against loss of every test image under a merged model: AdaMerging's Figs 3 and 11."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from raymerge.apps.experiments.bench import FAST, Bench, Changes
from raymerge.apps.experiments.entropy_bins import BIN_NAMES, ENTROPY_EDGES, entropy_against_loss
from raymerge.apps.experiments.entropy_bins import EntropyLoss as Relation
from raymerge.apps.experiments.findings import Curves, Findings, Table
from raymerge.config.experiments import EntropyLoss
from raymerge.engine.driver.groups import WorkerGroup
from raymerge.engine.messages import EvaluateRequest
from raymerge.engine.scores import Samples, samples
from raymerge.errors import RunError, UserError
from raymerge.merging.registry import method_of
from raymerge.runs.merge import MergeResult

METHODS: Mapping[str, Changes] = {
    "task_arithmetic": {"method": {"name": "task_arithmetic", "scaling": 0.3}},
    "adamerging": {"method": {"name": "adamerging"}, **FAST},
}
PUBLISHED = "published (ViT-B/32)"
PUBLISHED_ALL = "0.87"
"""Spearman over the eight data sets of the AdaMerging paper (Fig. 3), under its merged ViT-B/32."""
ALL = "all"
_X = (*(edge - 0.05 for edge in ENTROPY_EDGES), ENTROPY_EDGES[-1] + 0.05)


def run(bench: Bench, options: EntropyLoss) -> Findings:
    methods = bench.methods or METHODS
    tasks = [task.name for task in bench.base.tasks if task.test is not None]
    if not tasks:
        raise UserError("experiment: entropy_loss needs test images; name tasks[].test in the base")
    # The workers that merged also score every test image on the merged model.
    by_method: dict[str, dict[str, Relation]] = {}
    with bench.workers() as group:
        for name, changes in methods.items():
            result = bench.merge(name, changes, group)
            by_method[name] = relations(sample_values(result, group), name)
    # One curve per method over all images, and one per task for each method.
    return Findings(
        "Entropy against loss",
        tables=[_correlations(by_method, tasks), _bins(by_method)],
        curves=[
            _curves("All tasks", {name: each[ALL] for name, each in by_method.items()}),
            *(
                _curves(f"Each task, {name}", {task: each[task] for task in tasks})
                for name, each in by_method.items()
            ),
        ],
        notes=[
            f"base: {len(bench.base.models)} models of {bench.base.model.reference}, "
            f"{sum(next(iter(by_method.values()))[ALL].counts)} test images",
            f"Spearman {PUBLISHED_ALL} is published for CLIP ViT-B/32 on the eight data sets of "
            "the AdaMerging paper, not for this world.",
        ],
        data={
            name: {task: relation.to_json() for task, relation in each.items()}
            for name, each in by_method.items()
        },
    )


def sample_values(result: MergeResult, group: WorkerGroup) -> dict[str, Samples]:
    """Return each test image's entropy and loss under the merged model, by task.

    If the method merges nothing, each task is scored on its own expert.
    """
    is_merge = method_of(result.config.method).merges
    experts = {task.name: task.checkpoint for task in result.config.tasks}
    checkpoints = {
        task.name: str(result.output) if is_merge else str(experts[task.name])
        for task in result.config.tasks
        if task.test is not None and (is_merge or task.checkpoint is not None)
    }
    autocast = result.config.precision == "bfloat16"
    request = EvaluateRequest(checkpoints, autocast, per_sample=True)
    return samples(group.evaluate(request), result.config.task_names)


def relations(by_task: Mapping[str, Samples], name: str = "") -> dict[str, Relation]:
    """Return the relation for every task, and for all images together as ``all``.

    Raises :class:`RunError` if a value is not finite.
    """
    everything = Samples(
        np.concatenate([each.entropy_N for each in by_task.values()]),
        np.concatenate([each.loss_N for each in by_task.values()]),
    )
    try:
        return {
            task: entropy_against_loss(each.entropy_N, each.loss_N)
            for task, each in {**by_task, ALL: everything}.items()
        }
    except ValueError as error:
        raise RunError(f"experiment: {name}: {error}; its λ may be too large; lower it") from error


def _correlations(by_method: Mapping[str, Mapping[str, Relation]], tasks: list[str]) -> Table:
    columns = [*tasks, ALL]
    rows = {
        name: [_number(each[task].spearman if task in each else None) for task in columns]
        for name, each in by_method.items()
    }
    rows[PUBLISHED] = [*([_number(None)] * len(tasks)), PUBLISHED_ALL]
    return Table("Spearman's rank correlation of entropy and loss", columns, rows)


def _bins(by_method: Mapping[str, Mapping[str, Relation]]) -> Table:
    columns = [f"{what}, {name}" for name in by_method for what in ("images", "mean loss")]
    rows = {
        label: [
            cell
            for each in by_method.values()
            for cell in (f"{each[ALL].counts[i]:,}", _number(each[ALL].mean_loss[i]))
        ]
        for i, label in enumerate(BIN_NAMES)
    }
    caption = "Entropy and loss in nats; the images of all tasks."
    return Table("Mean loss by entropy", columns, rows, caption)


def _curves(title: str, lines: Mapping[str, Relation]) -> Curves:
    return Curves(
        title,
        x_label="entropy, nats",
        y_label="mean loss, nats",
        x=_X,
        series={name: relation.mean_loss for name, relation in lines.items()},
        caption="One point for each tenth of a nat; the last is for all entropies above 1.",
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
