"""A run's config and files in terms of the maths: θ₀, experts, basis, layers and a first λ.

The method's row says what it needs; this module opens it and builds the inputs of the loop. Running
the loop and writing the folder are left to ``runs.merge`` and ``runs.merge_module``.

Legend: K models, J rows of coefficients (K, or one), L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from raymerge.config import Config, MethodConfig, OptimizerConfig
from raymerge.engine.driver.groups import WorkerGroup
from raymerge.engine.driver.loop import Learning
from raymerge.engine.driver.monitor import Monitor
from raymerge.engine.driver.statistics import merged_delta
from raymerge.engine.messages import LoadRequest
from raymerge.merging.basis import Basis, BasisInputs, ConstantRow
from raymerge.merging.layout import LayerMap
from raymerge.merging.method import Method, Objective, Schedule
from raymerge.merging.optimizer import Adam
from raymerge.merging.registry import merged_checkpoints, method_of, needed_images, schedule_of
from raymerge.models.checkpoints.task_vectors import ties_statistics
from raymerge.models.checkpoints.visual_tower import open_visual
from raymerge.models.pretrained import open_pretrained, unmerged_tensors
from raymerge.models.write_merged import write_merged
from raymerge.runs.lambdas import read_lambdas
from raymerge.runs.plan.make import make_plan
from raymerge.runs.plan.plan import Plan
from raymerge.runs.workers import known_resources


class MergeInputs:
    """A config and its files as θ₀, experts, basis, layers and a first λ.

    ``slots``: the images of one step, None without steps. ``plan``: made from the config by
    default. Raises :class:`UserError` if a file does not fit.
    """

    def __init__(self, config: Config, plan: Plan | None = None) -> None:
        plan = plan or make_plan(config, known_resources(config))
        self.config, self.plan, self.resolved = config, plan, plan.resolved
        self.options, self.method = config.method, method_of(config.method)
        self.needs_images = needed_images(config) != "none"
        self.slots = plan.step_images or None
        self.pretrained, _ = open_pretrained(plan.resolved)
        self._experts = [
            open_visual(reference, self.pretrained.layout, self.pretrained)
            for reference in merged_checkpoints(config)
        ]
        self.granularity = self.method.granularity(self.options)
        self.layers: LayerMap = self.pretrained.layout.layers(self.granularity)
        # Writing a merge finds the signs in its own pass; a loop's basis asks for them here.
        ties = partial(
            ties_statistics,
            self.pretrained,
            self._experts,
            extra_zeros=plan.leftovers,
            count_signs=False,
        )
        inputs = BasisInputs(config.model_names, config.seed, ties)
        self.basis: Basis | None = self.method.basis(self.options, inputs)

    def solve_statistics(self, group: WorkerGroup) -> None:
        """Compute the merged vector of a method with statistics; it becomes the basis."""
        assert self.method.statistics is not None
        tasks = [k for k, task in enumerate(self.config.tasks) if task.checkpoint is not None]
        delta_P = merged_delta(
            self.method.statistics, self.options, group, tasks, self.pretrained, self._experts,
            self.config.seed,
        )  # fmt: skip
        self.basis, self._experts = ConstantRow(delta_P), []

    def require_finite(self) -> None:
        """Raise :class:`UserError` for NaN and Inf in tensors that a merge reads last or never."""
        # Writing the model reads the tensors that are not merged, after all learning.
        if self.needs_images or not self.method.merges:
            for _ in unmerged_tensors(self.pretrained):
                pass
        # A method that writes no model reads the experts only in its workers.
        if not self.method.merges:
            for expert in self._experts:
                for piece in expert.layout.shard(0, 1).pieces():
                    expert.read(piece, torch.empty(piece.stop - piece.start))

    def initial_lambdas(self) -> Tensor:
        """Return the method's constant λ, or the first λ of its loop: (J, L) float64."""
        earlier_run = self.method.start(self.options)
        if earlier_run is not None:
            return read_lambdas(earlier_run, self.config.model_names, self.layers.names)
        return uniform_lambdas(self.method, self.options, len(self.config.models), self.layers)

    def learning(self, group: WorkerGroup) -> Learning:
        """Return the inputs of the method's loop."""
        config, names, optimizer = self.config, self.config.model_names, self.config.optimizer
        return make_learning(
            self.method,
            self.options,
            optimizer,
            group,
            tasks=config.task_names,
            rows=[names.index(t.name) if t.checkpoint is not None else -1 for t in config.tasks],
            adapted_tasks=[m for m, task in enumerate(config.tasks) if task.adapt is not None],
            load=self.load_request(),
            inner=Schedule(optimizer.steps, optimizer.images_per_step, optimizer.batches),
        )

    def load_request(self) -> LoadRequest:
        """Return the request that makes the workers ready for the method's loop."""
        schedule = schedule_of(self.config)
        return LoadRequest(
            models=merged_checkpoints(self.config),
            granularity=self.granularity,
            objective=self.method.objective(self.options),
            slots_per_step=schedule.images,
            batches=schedule.batches,
            steps=schedule.steps,
            seed=self.config.seed,
            autocast=self.config.precision == "bfloat16",
            basis=self.basis,
            storage=self.plan.storage,
        )

    def write(self, path: Path, lambdas_JL: Tensor) -> None:
        """Write the merged model's weights; reads every expert."""
        write_merged(path, self.pretrained, self._experts, lambdas_JL, self.layers, self.basis)


def uniform_lambdas(method: Method, options: object, models: int, layers: LayerMap) -> Tensor:
    """Return λ (J, L) float64 with the method's one scaling everywhere."""
    rows = models if method.rows else 1
    scaling = method.scaling(options, models)
    return torch.full((rows, len(layers.names)), scaling, dtype=torch.float64)


def make_learning(
    method: Method,
    options: MethodConfig,
    optimizer: OptimizerConfig,
    group: WorkerGroup,
    *,
    tasks: Sequence[str],
    rows: Sequence[int],
    adapted_tasks: Sequence[int],
    load: LoadRequest,
    inner: Schedule,
) -> Learning:
    """Return the inputs of the method's loop over tasks of any kind of model.

    ``rows``: the row of λ of each task, -1 for a task that is not merged. ``adapted_tasks``: the
    indices of the tasks with examples. ``load``: the request for the loop's own steps; ``inner``:
    the schedule of the optimizer's steps within each of them.
    """
    infomax = load.objective.name == "infomax"
    decay_steps = optimizer.steps if optimizer.schedule == "cosine" else None
    return Learning(
        group=group,
        options=options,
        optimizer=Adam(
            optimizer.lr,
            optimizer.betas,
            optimizer.eps,
            method.clamp(options),
            decay_steps,
            optimizer.sharpness,
        ),
        steps=load.steps,
        inner_steps=optimizer.steps,
        monitor=Monitor(tasks, rows, method.monitoring(options, optimizer), infomax=infomax),
        adapted_tasks=adapted_tasks,
        load=load,
        # The inner steps minimise the entropy, whatever objective chooses the directions.
        inner_load=replace(
            load,
            objective=Objective(),
            slots_per_step=inner.images,
            batches=inner.batches,
            steps=inner.steps,
        ),
    )
