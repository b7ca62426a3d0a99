"""A run's config and files in terms of the maths: θ₀, experts, basis, layers and a first λ.

Legend: K models, J rows of coefficients (K, or one), L layers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from raymerge.config import Config, OptimizerConfig
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
    """A config and its files as θ₀, experts, basis, layers and a first λ."""

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
        ties = partial(ties_statistics, self.pretrained, self._experts, extra_zeros=plan.leftovers)
        inputs = BasisInputs(config.model_names, config.seed, ties)
        self.basis: Basis | None = self.method.basis(self.options, inputs)

    def gather(self, group: WorkerGroup) -> None:
        """Find the merged vector of a method of statistics."""
        assert self.method.statistics is not None
        tasks = [k for k, task in enumerate(self.config.tasks) if task.checkpoint is not None]
        delta_P = merged_delta(
            self.method.statistics, self.options, group, tasks, self.pretrained, self._experts,
            self.config.seed,
        )  # fmt: skip
        self.basis, self._experts = ConstantRow(delta_P), []

    def require_finite(self) -> None:
        """Raise :class:`UserError` for NaN and Inf that would be found only after long work."""
        if self.needs_images or not self.method.merges:
            for _ in unmerged_tensors(self.pretrained):
                pass
        if not self.method.merges:
            for expert in self._experts:
                for piece in expert.layout.shard(0, 1).pieces():
                    expert.read(piece, torch.empty(piece.stop - piece.start))

    def initial_lambdas(self) -> Tensor:
        """The method's constant λ, or the first one of learning: (J, L) float64."""
        run = self.method.start(self.options)
        if run is not None:
            return read_lambdas(run, self.config.model_names, self.layers.names)
        return first_lambdas(self.method, self.options, len(self.config.models), self.layers)

    def learning(self, group: WorkerGroup) -> Learning:
        """The inputs of the method's loop."""
        config, options = self.config, self.options
        names = config.model_names
        objective = self.method.objective(options)
        monitor = Monitor(
            config.task_names,
            [names.index(t.name) if t.checkpoint is not None else -1 for t in config.tasks],
            self.method.monitoring(options, config.optimizer),
            infomax=objective.name == "infomax",
        )
        return Learning(
            group=group,
            options=options,
            optimizer=make_optimizer(self.method, options, config.optimizer),
            steps=schedule_of(config).steps,
            inner_steps=config.optimizer.steps,
            monitor=monitor,
            adapted_tasks=[m for m, task in enumerate(config.tasks) if task.adapt is not None],
            load=self.load_request(),
            inner_load=self._load_request(Objective(), self._inner_schedule()),
        )

    def load_request(self) -> LoadRequest:
        return self._load_request(self.method.objective(self.options), schedule_of(self.config))

    def _inner_schedule(self) -> Schedule:
        """AdaMerging's own steps."""
        given = self.config.optimizer
        return Schedule(given.steps, given.images_per_step, given.batches)

    def _load_request(self, objective: Objective, schedule: Schedule) -> LoadRequest:
        return LoadRequest(
            models=merged_checkpoints(self.config),
            granularity=self.granularity,
            objective=objective,
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


def first_lambdas(method: Method, options: object, models: int, layers: LayerMap) -> Tensor:
    """(J, L) float64 of the method's one scaling."""
    rows = models if method.rows else 1
    scaling = method.scaling(options, models)
    return torch.full((rows, len(layers.names)), scaling, dtype=torch.float64)


def make_optimizer(method: Method, options: object, optimizer: OptimizerConfig) -> Adam:
    decay_steps = optimizer.steps if optimizer.schedule == "cosine" else None
    return Adam(
        optimizer.lr,
        optimizer.betas,
        optimizer.eps,
        method.clamp(options),
        decay_steps,
        optimizer.sharpness,
    )
