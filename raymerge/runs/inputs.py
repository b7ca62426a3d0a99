"""A run's config and files in terms of the maths: θ₀, experts, basis, layers and a first λ.

Legend: K models, J rows of coefficients (K, or one), L layers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from raymerge.config import (
    AdaMerging,
    Config,
    FwHard,
    FwSoft,
    Ties,
)
from raymerge.engine.driver.groups import WorkerGroup
from raymerge.engine.driver.monitor import Watch
from raymerge.engine.messages import LoadRequest, Loss
from raymerge.merging.bases import basis_of
from raymerge.merging.basis import Basis, Given
from raymerge.merging.layout import LayerMap
from raymerge.merging.optimizer import Adam
from raymerge.merging.registry import (
    granularity_of,
    merged_checkpoints,
    method_of,
    needed_images,
)
from raymerge.merging.ties import TiesStatistics
from raymerge.models.checkpoints.task_vectors import ties_statistics
from raymerge.models.checkpoints.visual_tower import open_visual
from raymerge.models.pretrained import open_pretrained, unmerged_tensors
from raymerge.models.write_merged import write_merged
from raymerge.runs.lambdas import read_lambdas
from raymerge.runs.plan.make import make_plan
from raymerge.runs.plan.plan import Plan
from raymerge.runs.workers import known_resources


class Merging:
    """A config and its files as θ₀, experts, basis, layers and a first λ."""

    def __init__(self, config: Config, plan: Plan | None = None) -> None:
        plan = plan or make_plan(config, known_resources(config))
        self.config, self.plan, self.resolved = config, plan, plan.resolved
        self.method = method_of(config.method)
        self.merges = self.method.merges
        self.needs_images = needed_images(config) != "none"
        self.slots = plan.step_images or None
        self.pretrained, _ = open_pretrained(plan.resolved)
        self._experts = [
            open_visual(reference, self.pretrained.layout, self.pretrained)
            for reference in merged_checkpoints(config)
        ]
        self.granularity = granularity_of(config.method)
        self.layers: LayerMap = self.pretrained.layout.layers(self.granularity)
        self.basis: Basis | None = basis_of(
            config.method, config.model_names, config.seed, self._ties
        )

    def _ties(self) -> TiesStatistics:
        method = self.config.method
        assert isinstance(method, Ties | AdaMerging)
        return ties_statistics(
            self.pretrained,
            self._experts,
            density=method.density,
            scope=method.trim_scope,
            extra_zeros=self.plan.leftovers,
            mean=isinstance(method, Ties) and method.merge == "mean",
            count_signs=self.method.learned,
        )

    def gather(self, group: WorkerGroup) -> None:
        """Find the merged vector of a method of statistics."""
        from raymerge.engine.driver.statistics import merged_delta

        delta_P = merged_delta(self.config, group, self.pretrained, self._experts)
        self.basis, self._experts = Given(delta_P), []

    def require_finite(self) -> None:
        """Raise :class:`UserError` for NaN and Inf that would be found only after long work."""
        if self.needs_images or not self.merges:
            for _ in unmerged_tensors(self.pretrained):
                pass
        if not self.merges:
            for expert in self._experts:
                for piece in expert.layout.shard(0, 1).pieces():
                    expert.read(piece, torch.empty(piece.stop - piece.start))

    def start(self) -> Tensor:
        """The method's constant λ, or the first one of learning: (J, L) float64."""
        method = self.config.method
        if isinstance(method, FwHard | FwSoft) and method.start is not None:
            return read_lambdas(method.start, self.config.model_names, self.layers.names)
        models = len(self.config.models)
        scaling = self.method.scaling(method, models)
        rows = models if self.method.rows else 1
        return torch.full((rows, len(self.layers.names)), scaling, dtype=torch.float64)

    @property
    def steps_key(self) -> str:
        given = isinstance(self.config.method, FwHard | FwSoft)
        return "method.iterations" if given else "optimizer.steps"

    def optimizer(self) -> Adam:
        given, method = self.config.optimizer, self.config.method
        decay_steps = given.steps if given.schedule == "cosine" else None
        clamp = method.clamp if isinstance(method, AdaMerging) else "projected"
        return Adam(given.lr, given.betas, given.eps, clamp, decay_steps, given.sharpness)

    def watch(self) -> Watch:
        method, names = self.config.method, self.config.model_names
        rows = [
            names.index(task.name) if task.checkpoint is not None else -1
            for task in self.config.tasks
        ]
        if not isinstance(method, AdaMerging):
            return Watch(self.config.task_names, rows, "ignore")
        return Watch(
            self.config.task_names,
            rows,
            method.collapse,
            infomax=method.objective == "infomax",
            nonfinite=self.config.optimizer.nonfinite,
        )

    def load_request(self) -> LoadRequest:
        method, given = self.config.method, self.config.optimizer
        if isinstance(method, FwHard | FwSoft):
            loss = Loss(method.objective)
            return self._load_request(loss, method.images, 1, method.iterations)
        assert isinstance(method, AdaMerging)
        loss = Loss(method.objective, method.temperature, method.normalise, method.filter)
        return self._load_request(loss, given.images_per_step, given.batches, given.steps)

    def inner_load_request(self) -> LoadRequest:
        """Of the mergings within soft Frank-Wolfe: AdaMerging's own."""
        given = self.config.optimizer
        return self._load_request(Loss(), given.images_per_step, given.batches, given.steps)

    def _load_request(self, loss: Loss, images: int, batches: int, steps: int) -> LoadRequest:
        return LoadRequest(
            models=merged_checkpoints(self.config),
            granularity=self.granularity,
            loss=loss,
            images_per_step=images,
            batches=batches,
            steps=steps,
            seed=self.config.seed,
            autocast=self.config.precision == "bfloat16",
            basis=self.basis,
            storage=self.plan.storage,
        )

    def write(self, path: Path, lambdas_JL: Tensor) -> None:
        """Write the merged model's weights; reads every expert."""
        write_merged(path, self.pretrained, self._experts, lambdas_JL, self.layers, self.basis)
