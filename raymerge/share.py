"""One worker's share of the work: its columns of θ₀ and V, and its slots of every step.

Legend: K tasks, L layers, T tensors, N columns of this worker's shard, P parameters, B images,
b images of one task, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from threading import Event

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymerge.architecture import open_pretrained, resolve_model
from raymerge.checkpoints.task_vectors import read_shard
from raymerge.checkpoints.visual import open_visual
from raymerge.data.cache import PinnedImages
from raymerge.data.folder import unlabeled_images
from raymerge.data.slots import SlotRange, slot_counts, split_slots, step_images
from raymerge.heads import zero_shot_head
from raymerge.memory import micro_batch
from raymerge.merging.merge import inner_products, merge_into, sum_cells
from raymerge.merging.objectives import OBJECTIVES, entropy
from raymerge.messages import FloatArray, LoadRequest, WorkerSpec
from raymerge.models import (
    FlatEncoder,
    activation_bytes,
    build_model,
    build_skeleton,
    make_tokenizer,
)
from raymerge.vectors import allocate


class ServedModel:
    """The pretrained model as a worker keeps it: an encoder over flat θ, one head per task."""

    def __init__(self, spec: WorkerSpec) -> None:
        resolved = resolve_model(spec.model)
        self.pretrained, _ = open_pretrained(resolved)
        self.bytes_per_image = activation_bytes(build_skeleton(resolved, "meta").visual)
        self.layout = self.pretrained.layout
        model = build_model(resolved, self.pretrained).to(choose_device(spec))
        tokenizer = make_tokenizer(resolved)
        self._heads = [
            zero_shot_head(model, tokenizer, task.classnames, task.templates) for task in spec.tasks
        ]
        padded = self.layout.shard(spec.shard, spec.shards).padded_columns
        self.encoder = FlatEncoder(model, self.layout, choose_device(spec), padded)
        self.encoder.drop_text()

    def head(self, task: int) -> Tensor:
        """(D, C) of the task with this index."""
        return self._heads[task]


def choose_device(spec: WorkerSpec) -> torch.device:
    """Ray's GPUs are logical (tests declare fake ones), so the device is what torch can see.

    A worker that was given no GPU does not take one: Ray does not hide them from it.
    """
    cuda = spec.use_gpu and torch.cuda.is_available()
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


class Share:
    """What one worker pins for learning λ, and its three computations of a step.

    ``merge``, ``backward`` and ``inner_products`` are called in this order, with the collectives of
    the group between them. None keeps state between steps. Construction reads the files and raises
    :class:`~raymerge.errors.UserError` for a damaged checkpoint or image.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        request: LoadRequest,
        model: ServedModel,
        images: MutableMapping[int, PinnedImages],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._spec, self._request, self._model = spec, request, model
        self._shard = model.layout.shard(spec.shard, spec.shards)
        self._layers = model.layout.layers(request.granularity)
        self.device = device = model.encoder.device
        self._micro_batch = micro_batch(
            spec.micro_batch, model.bytes_per_image, gpu=device.type == "cuda"
        )
        self.vectors_CKn = allocate(request.storage, self._shard.cells, len(spec.tasks), device)
        self._layer_of_cell = self._layers.of_cells(self._shard)
        self._images = images
        self._pretrained_N = self._read(progress)

    def _read(self, progress: Callable[[int], None] | None) -> Tensor:
        """Fill V while the images decode; returns θ₀ (N,). A bad checkpoint stops the decoding."""
        stopped = Event()

        def advance(count: int) -> None:
            if stopped.is_set():
                raise CancelledError
            if progress is not None:
                progress(count)

        experts = [open_visual(task.checkpoint, self._model.layout) for task in self._spec.tasks]
        with ThreadPoolExecutor(1) as aside:
            pinned = aside.submit(self._pin_images, advance, torch.get_num_threads())
            try:
                pretrained_N = read_shard(
                    self._model.pretrained,
                    experts,
                    self._shard,
                    self._request.ties,
                    self.vectors_CKn,
                    self.device,
                )
            except BaseException:
                stopped.set()
                raise
            pinned.result()
        return pretrained_N

    def _pin_images(self, progress: Callable[[int], None], threads: int) -> None:
        """Decode the images that this worker's slots will show, unless they are held already."""
        spec = self._spec
        sources = [
            unlabeled_images(str(task.adapt), f"tasks[{k}].adapt")
            for k, task in enumerate(spec.tasks)
        ]
        self._populations = [len(source) for source in sources]
        self._counts = slot_counts(self._populations, self._request.images_per_step)
        self.slots = split_slots(self._counts, spec.workers)[spec.rank]
        for part in self.slots:
            needed = self._needed(part)
            held = self._images.get(part.task)
            if held is None or not held.holds(needed):
                self._images[part.task] = PinnedImages(
                    sources[part.task], needed, self._model.encoder.preprocess, progress, threads
                )

    def merge(self, lambdas_KL: FloatArray, theta_N: Tensor) -> None:
        """θ = θ₀ + Σ λ V on this worker's own columns, ``theta_N`` (padding at the end is left)."""
        lambdas_KC = torch.from_numpy(lambdas_KL)[:, self._layer_of_cell].to(theta_N)
        merge_into(theta_N, self._pretrained_N, self.vectors_CKn, lambdas_KC)

    def backward(self, step: int) -> tuple[FloatArray, FloatArray]:
        """Set the encoder's flat gradient to ∂ℒ/∂θ of this worker's slots.

        Returns per task (K,) this worker's part of the loss and of the mean entropy; the parts of
        all workers sum to the whole.
        """
        self._model.encoder.gradient_P.zero_()
        loss_K, entropy_K = np.zeros((2, len(self._spec.tasks)))
        for parts in _passes(self.slots, self._micro_batch):
            self._one_pass(step, parts, loss_K, entropy_K)
        return loss_K, entropy_K

    def inner_products(self, gradient_N: Tensor) -> FloatArray:
        """⟨∂ℒ/∂θ, V_k⟩ per layer over this worker's columns: (K, L) float64."""
        per_cell_CK = inner_products(gradient_N, self.vectors_CKn)
        layers = len(self._layers.names)
        gradient_KL: FloatArray = sum_cells(per_cell_CK, self._layer_of_cell, layers).numpy()
        return gradient_KL

    def _one_pass(
        self, step: int, parts: Sequence[SlotRange], loss_K: FloatArray, entropy_K: FloatArray
    ) -> None:
        """One forward and backward of all tasks' images as one batch: only the heads differ."""
        request = self._request
        pixels = [self._pixels(step, part) for part in parts]
        features_BD = self._model.encoder.features(torch.cat(pixels), request.autocast)
        losses: list[Tensor] = []
        entropies: list[Tensor] = []
        for part, features_bD in zip(
            parts, features_BD.split([len(p) for p in pixels]), strict=True
        ):
            logits_bC = features_bD @ self._model.head(part.task)
            count = self._counts[part.task]
            loss_b = OBJECTIVES[request.objective](logits_bC)
            losses.append(loss_b.sum() * (request.batches / count))
            entropies.append(entropy(logits_bC.detach()).double().sum() / count)
        torch.stack(losses).sum().backward()
        # Read once, after all work is queued: each read would make a GPU wait.
        tasks = [part.task for part in parts]
        np.add.at(loss_K, tasks, torch.stack(losses).detach().double().cpu().numpy())
        np.add.at(entropy_K, tasks, torch.stack(entropies).cpu().numpy())

    def _pixels(self, step: int, part: SlotRange) -> Tensor:
        return self._images[part.task].take(self._slot_images(step, part))

    def _slot_images(self, step: int, part: SlotRange) -> NDArray[np.int64]:
        name = self._spec.task_names[part.task]
        count, population = self._counts[part.task], self._populations[part.task]
        images = step_images(self._request.seed, name, step, count, population)
        return images[part.start : part.stop]

    def _needed(self, part: SlotRange) -> NDArray[np.int64]:
        """Every image that these slots will show in any step, once."""
        seen = np.zeros(self._populations[part.task], dtype=bool)
        whole = self._populations[part.task] <= self._counts[part.task]
        for step in range(1 if whole else self._request.steps):
            seen[self._slot_images(step, part)] = True
            if seen.all():
                break
        return np.flatnonzero(seen)


def _passes(slots: Sequence[SlotRange], micro_batch: int | None) -> Iterator[list[SlotRange]]:
    """Cut the slots into runs of at most ``micro_batch`` images."""
    if micro_batch is None:
        if slots:
            yield list(slots)
        return
    run: list[SlotRange] = []
    room = micro_batch
    for part in slots:
        start = part.start
        while start < part.stop:
            stop = min(part.stop, start + room)
            run.append(SlotRange(part.task, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield run
                run, room = [], micro_batch
    if run:
        yield run
