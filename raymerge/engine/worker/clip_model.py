"""A CLIP model as workers serve it: its image encoder over a flat θ, one head a task, its images.

All tasks share the encoder, so the images of all tasks are one batch and only the heads differ.
Images are decoded once and pinned as uint8.

Legend: B images, D features, C classes, P columns of the flat vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import proxy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymerge.config import ModelConfig, TaskConfig
from raymerge.data.decoding import PinnedImages
from raymerge.data.images import ImageList
from raymerge.data.sources import labels_in_order, unlabeled_images
from raymerge.engine.memory import micro_batch
from raymerge.engine.messages import ChunkScore, EvaluateRequest, StatisticsRequest, WorkerSpec
from raymerge.engine.worker.clip_statistics import ExpertStatistics
from raymerge.engine.worker.evaluation import Evaluator, load_weights
from raymerge.engine.worker.served import Examples, Pinned, choose_device
from raymerge.files.progress import Progress
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint, open_visual
from raymerge.models.encoder import FlatEncoder, build_model
from raymerge.models.heads import saved_head, zero_shot_head
from raymerge.models.pretrained import open_pretrained
from raymerge.models.resolve import ResolvedModel, resolve_model
from raymerge.models.skeleton import OpenClipModel, activation_bytes, build_skeleton, make_tokenizer


class ClipModel:
    """The served CLIP model. ``pinned``: the decoded images by task, which the worker keeps."""

    def __init__(
        self,
        config: ModelConfig,
        tasks: tuple[TaskConfig, ...],
        spec: WorkerSpec,
        pinned: Pinned,
    ) -> None:
        self.tasks, self._pinned = tasks, pinned
        resolved = resolve_model(config)
        self.pretrained, _ = open_pretrained(resolved)
        self.layout = self.pretrained.layout
        device = choose_device(spec)
        self.slots_per_pass = micro_batch(
            spec.micro_batch,
            activation_bytes(build_skeleton(resolved, "meta").visual),
            gpu=device.type == "cuda",
        )
        # The heads are made from the whole model; then only the visual tower is kept.
        model = build_model(resolved, self.pretrained).to(device)
        self._heads = _heads(tasks, resolved, model, device)
        padded = self.layout.shard(spec.shard, spec.shards).padded_columns
        self.encoder = FlatEncoder(model, self.layout, device, padded)
        self.encoder.drop_text()
        self.theta_P, self.gradient_P = self.encoder.theta_P, self.encoder.gradient_P
        self._sources: list[ImageList | None] | None = None
        self._statistics = ExpertStatistics(proxy(self))  # a cycle would outlive the model
        self._evaluator: tuple[tuple[int, int], Evaluator] | None = None

    def head(self, task: int) -> Tensor:
        """Return the head (D, C) of a task that has classes."""
        head = self._heads[task]
        assert head is not None
        return head

    @property
    def classes(self) -> int:
        return max((head.shape[1] for head in self._heads if head is not None), default=0)

    def open_expert(self, reference: str) -> VisualCheckpoint:
        return open_visual(reference, self.layout, self.pretrained)

    def load_expert(self, task: int) -> None:
        load_weights(self.encoder, self.pretrained, str(self.tasks[task].checkpoint))

    # --- examples ------------------------------------------------------------------------------

    def _images(self) -> list[ImageList | None]:
        if self._sources is None:
            self._sources = [
                unlabeled_images(task.adapt, f"tasks[{k}].adapt") if task.adapt else None
                for k, task in enumerate(self.tasks)
            ]
        return self._sources

    def populations(self) -> list[int]:
        return [len(images) if images else 0 for images in self._images()]

    def pin(
        self, needed: Mapping[int, NDArray[np.int64]], progress: Progress, threads: int
    ) -> None:
        """Decode the images of these tasks that are not in memory already."""
        for task, images in needed.items():
            source, pinned = self._images()[task], self._pinned.get(task)
            if source and (pinned is None or not pinned.holds(images)):
                self._pinned[task] = PinnedImages(
                    source, images, self.encoder.preprocess, progress, threads
                )
        self._sources = None  # some sources hold their whole data once they are read

    def pinned_bytes(self) -> int:
        return sum(images.nbytes for images in self._pinned.values())

    def outputs(self, examples: Sequence[Examples], autocast: bool) -> list[Tensor]:
        pixels = [self._pinned[task].take(images) for task, images in examples]
        features_BD = self.encoder.features(torch.cat(pixels), autocast)
        parts = features_BD.split([len(p) for p in pixels])
        return [
            features_bD @ self.head(task)
            for (task, _), features_bD in zip(examples, parts, strict=True)
        ]

    def labels(self, task: int) -> Tensor:
        entry, key = self.tasks[task], f"tasks[{task}].adapt"
        return torch.tensor(labels_in_order(str(entry.adapt), entry.classnames, key))

    # --- statistics and scores -----------------------------------------------------------------

    def statistics(self, request: StatisticsRequest) -> dict[str, Tensor]:
        return self._statistics.gather(request)

    def scores(
        self, request: EvaluateRequest, rank: int, workers: int, progress: Progress | None
    ) -> list[ChunkScore]:
        if self._evaluator is None or self._evaluator[0] != (rank, workers):
            evaluator = Evaluator(self.encoder, self.pretrained, self.tasks, rank, workers)
            self._evaluator = (rank, workers), evaluator
        return self._evaluator[1].scores(request, self.head, progress)


def _heads(
    tasks: Sequence[TaskConfig],
    resolved: ResolvedModel,
    model: OpenClipModel,
    device: torch.device,
) -> list[Tensor | None]:
    """Return the head (D, C) of each task, None without classes; a tokenizer only if needed."""
    heads: list[Tensor | None] = []
    tokenizer = None
    for k, task in enumerate(tasks):
        if task.head is not None:
            heads.append(saved_head(task, f"tasks[{k}]", resolved.features).to(device))
        elif task.classnames:
            tokenizer = tokenizer or make_tokenizer(resolved)
            heads.append(zero_shot_head(model, tokenizer, task.classnames, task.templates))
        else:
            heads.append(None)
    return heads
