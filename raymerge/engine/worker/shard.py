"""One worker's share of the work: its columns of θ₀ and V, and its slots of every step.

Legend: K models, M tasks, L layers, N columns of this worker's shard, P parameters, B images,
b images of one task, C classes (or cells of the shard), D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymerge.data.decoding import PinnedImages
from raymerge.data.slots import SlotRange, slot_counts, split_slots, step_images
from raymerge.data.sources import labels_in_order, unlabeled_images
from raymerge.engine.memory import micro_batch, pass_images
from raymerge.engine.messages import FloatArray, LoadRequest, StepRequest, WorkerSpec
from raymerge.engine.worker.evaluation import load_weights
from raymerge.engine.worker.vectors import Vectors, read_vectors
from raymerge.merging.layout import CELL, Piece
from raymerge.merging.merge import cell_products, sum_cells
from raymerge.merging.objectives import entropy, image_losses, probability_sum
from raymerge.models.checkpoints.task_vectors import stream
from raymerge.models.checkpoints.visual_tower import open_visual
from raymerge.models.encoder import FlatEncoder, build_model
from raymerge.models.heads import saved_head, zero_shot_head
from raymerge.models.pretrained import open_pretrained
from raymerge.models.resolve import ResolvedModel, resolve_model
from raymerge.models.skeleton import OpenClipModel, activation_bytes, build_skeleton, make_tokenizer

_TEACHER_BATCH = 64


class ServedModel:
    """The pretrained model as a worker keeps it: an encoder over flat θ, one head per task."""

    def __init__(self, spec: WorkerSpec) -> None:
        resolved = resolve_model(spec.model)
        self.pretrained, _ = open_pretrained(resolved)
        self.bytes_per_image = activation_bytes(build_skeleton(resolved, "meta").visual)
        self.layout = self.pretrained.layout
        model = build_model(resolved, self.pretrained).to(choose_device(spec))
        self._heads = _heads(spec, resolved, model)
        padded = self.layout.shard(spec.shard, spec.shards).padded_columns
        self.encoder = FlatEncoder(model, self.layout, choose_device(spec), padded)
        self.encoder.drop_text()

    def head(self, task: int) -> Tensor:
        """(D, C) of the task with this index, which has classes."""
        head = self._heads[task]
        assert head is not None
        return head

    @property
    def classes(self) -> int:
        """Of the task with the most."""
        return max((head.shape[1] for head in self._heads if head is not None), default=0)


def _heads(spec: WorkerSpec, resolved: ResolvedModel, model: OpenClipModel) -> list[Tensor | None]:
    """(D, C) of every task that has classes; a tokenizer is made only where one is needed."""
    heads: list[Tensor | None] = []
    tokenizer = None
    for k, task in enumerate(spec.tasks):
        if task.head is not None:
            head_DC = saved_head(task, f"tasks[{k}]", resolved.features)
            heads.append(head_DC.to(choose_device(spec)))
        elif task.classnames:
            tokenizer = tokenizer or make_tokenizer(resolved)
            heads.append(zero_shot_head(model, tokenizer, task.classnames, task.templates))
        else:
            heads.append(None)
    return heads


def choose_device(spec: WorkerSpec) -> torch.device:
    """Ray's GPUs are logical (tests declare fake ones), so the device is what torch can see.

    A worker that was given no GPU does not take one: Ray does not hide them from it.
    """
    cuda = spec.use_gpu and torch.cuda.is_available()
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


@dataclass(frozen=True)
class Target:
    """What the loss compares the predictions of some images with."""

    images: NDArray[np.int64]
    """Sorted, as the task's folder lists them."""
    values: Tensor

    def of(self, images: NDArray[np.int64]) -> Tensor:
        return self.values[np.searchsorted(self.images, images)]


@dataclass(frozen=True)
class Sums:
    """One worker's parts of the tasks' means, (M,) and (M, C); see ``StepResult``."""

    loss: FloatArray
    entropy: FloatArray
    probabilities: FloatArray

    @classmethod
    def zero(cls, tasks: int, classes: int) -> Sums:
        return cls(np.zeros(tasks), np.zeros(tasks), np.zeros((tasks, classes)))


class Share:
    """What one worker pins for learning λ, and its three computations of a step.

    ``merge``, ``backward`` and ``inner_products`` are called in this order, with the collectives of
    the group between them. None keeps state between steps. Construction reads the files and raises
    :class:`~raymerge.errors.UserError` for a damaged checkpoint or image. ``vectors``: V, if an
    earlier share of the same has read it.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        request: LoadRequest,
        model: ServedModel,
        images: MutableMapping[int, PinnedImages],
        progress: Callable[[int], None] | None = None,
        vectors: Vectors | None = None,
    ) -> None:
        self._spec, self.request, self._model = spec, request, model
        self._shard = model.layout.shard(spec.shard, spec.shards)
        self._layers = model.layout.layers(request.granularity)
        self.device = device = model.encoder.device
        self._micro_batch = micro_batch(
            spec.micro_batch, model.bytes_per_image, gpu=device.type == "cuda"
        )
        self._layer_of_cell = self._layers.of_cells(self._shard)
        self._images = images
        self._models = [
            open_visual(reference, model.layout, model.pretrained) for reference in request.models
        ]
        self.vectors = self._read(vectors, progress)
        self._targets = self._read_targets()
        self._model_square_KL: FloatArray | None = None

    def _read(self, held: Vectors | None, progress: Callable[[int], None] | None) -> Vectors:
        """Read V, if not held, while the images decode. A bad checkpoint stops the decoding."""
        stopped = Event()

        def advance(count: int) -> None:
            if stopped.is_set():
                raise CancelledError
            if progress is not None:
                progress(count)

        with ThreadPoolExecutor(1) as aside:
            pinned = aside.submit(self._pin_images, advance, torch.get_num_threads())
            try:
                vectors = held or read_vectors(
                    self.request.storage,
                    self._model.pretrained,
                    self._models,
                    self.request.basis,
                    self._shard,
                    self._layers,
                    self.device,
                )
            except BaseException:
                stopped.set()
                raise
            pinned.result()
        return vectors

    def _pin_images(self, progress: Callable[[int], None], threads: int) -> None:
        """Decode the images that this worker's slots will show, unless they are held already."""
        spec = self._spec
        sources = [
            unlabeled_images(task.adapt, f"tasks[{k}].adapt") if task.adapt else None
            for k, task in enumerate(spec.tasks)
        ]
        self._populations = [len(source) if source else 0 for source in sources]
        self._counts = slot_counts(self._populations, self.request.images_per_step)
        self.slots = split_slots(self._counts, spec.workers)[spec.rank]
        for part in self.slots:
            needed, source = self._needed(part), sources[part.task]
            held = self._images.get(part.task)
            if source and (held is None or not held.holds(needed)):
                self._images[part.task] = PinnedImages(
                    source, needed, self._model.encoder.preprocess, progress, threads
                )

    def _read_targets(self) -> Mapping[int, Target]:
        """What the loss compares predictions with, by task: the experts' logits, or the labels."""
        objective = self.request.objective.name
        if objective == "kl":
            return {part.task: self._teach(part) for part in self.slots}
        if objective == "cross_entropy":
            return {part.task: self._labels(part.task) for part in self.slots}
        return {}

    def _labels(self, task: int) -> Target:
        given = self._spec.tasks[task]
        where = f"tasks[{task}].adapt"
        labels = torch.tensor(labels_in_order(str(given.adapt), given.classnames, where))
        return Target(np.arange(len(labels)), labels)

    @torch.no_grad()
    def _teach(self, part: SlotRange) -> Target:
        """The logits of the task's own expert on all images that the part will show."""
        given, encoder, images = (
            self._spec.tasks[part.task],
            self._model.encoder,
            self._needed(part),
        )
        load_weights(encoder, self._model.pretrained, str(given.checkpoint))
        head_DC = self._model.head(part.task)
        logits = [
            encoder.features(self._images[part.task].take(some), self.request.autocast) @ head_DC
            for some in np.split(images, range(_TEACHER_BATCH, len(images), _TEACHER_BATCH))
        ]
        return Target(images, torch.cat(logits))

    def merge(self, lambdas_KL: FloatArray, theta_N: Tensor) -> None:
        """θ = θ₀ + Σ λ V on this worker's own columns, ``theta_N`` (padding at the end is left)."""
        self.vectors.merge(torch.from_numpy(lambdas_KL), theta_N)

    def backward(self, request: StepRequest) -> Sums:
        """Set the encoder's flat gradient to ∂ℒ/∂θ of this worker's slots.

        Returns this worker's parts of the tasks' means; the parts of all workers sum to the whole.
        """
        self._model.encoder.gradient_P.zero_()
        sums = Sums.zero(len(self._spec.tasks), self._model.classes)
        weights = request.weights
        slots = [part for part in self.slots if weights is None or weights[part.task]]
        images = pass_images(sum(part.stop - part.start for part in slots), self._micro_batch)
        for parts in _passes(slots, images):
            self._one_pass(request, parts, sums)
        return sums

    def inner_products(self, gradient_N: Tensor, rows: Sequence[int] | None = None) -> FloatArray:
        """⟨∂ℒ/∂θ, V_k⟩ per layer over this worker's columns: (K, L) float64."""
        return self._per_layer(self.vectors.inner_products(gradient_N, rows))

    def details(self, gradient_N: Tensor, theta_N: Tensor) -> dict[str, FloatArray]:
        """See ``StepResult.details``; for task vectors as they are."""
        if self._model_square_KL is None:
            self._model_square_KL = self._squares()
        return {
            "gradient_base": self._per_layer(self.vectors.base_products(gradient_N))[0],
            "gradient_square": self._per_layer(cell_products(gradient_N, gradient_N))[0],
            "theta_square": self._per_layer(cell_products(theta_N, theta_N))[0],
            "model_square": self._model_square_KL,
        }

    def _squares(self) -> FloatArray:
        """‖θ_k‖² per layer: (K, L). Read once: no candidate changes."""
        out_CK = torch.zeros(self._shard.cells, len(self._models))

        def square(piece: Piece, base_n: Tensor, vectors_Kn: Tensor) -> None:
            first = (piece.start - self._shard.start) // CELL
            squares_Kn = vectors_Kn.add_(base_n).square_()
            for c, cell_Kn in enumerate(squares_Kn.split(CELL, dim=1)):
                out_CK[first + c] = cell_Kn.sum(1)

        for _ in stream(square, self._model.pretrained, self._models, self._shard.pieces()):
            pass
        return self._per_layer(out_CK)

    def _per_layer(self, per_cell_CK: Tensor) -> FloatArray:
        layers = len(self._layers.names)
        out_KL: FloatArray = sum_cells(per_cell_CK, self._layer_of_cell, layers).numpy()
        return out_KL

    def _one_pass(self, request: StepRequest, parts: Sequence[SlotRange], sums: Sums) -> None:
        """One forward and backward of all tasks' images as one batch: only the heads differ."""
        images = [self._slot_images(request.step, part) for part in parts]
        pixels = [
            self._images[part.task].take(some) for part, some in zip(parts, images, strict=True)
        ]
        features_BD = self._model.encoder.features(torch.cat(pixels), self.request.autocast)
        losses: list[Tensor] = []
        entropies: list[Tensor] = []
        predictions: list[Tensor] = []
        for part, some, features_bD in zip(
            parts, images, features_BD.split([len(p) for p in pixels]), strict=True
        ):
            logits_bC = features_bD @ self._model.head(part.task)
            count = self._counts[part.task]
            loss_b = self._loss(request, part.task, some, logits_bC)
            losses.append(loss_b.sum() * (self.request.batches / count))
            entropies.append(entropy(logits_bC.detach()).double().sum() / count)
            predictions.append(probability_sum(logits_bC) / count)
        torch.stack(losses).sum().backward()
        # Read once, after all work is queued: each read would make a GPU wait.
        tasks = [part.task for part in parts]
        np.add.at(sums.loss, tasks, torch.stack(losses).detach().double().cpu().numpy())
        np.add.at(sums.entropy, tasks, torch.stack(entropies).cpu().numpy())
        for task, mean_p_C in zip(tasks, predictions, strict=True):
            sums.probabilities[task, : len(mean_p_C)] += mean_p_C.cpu().numpy()

    def _loss(
        self, request: StepRequest, task: int, images: NDArray[np.int64], logits_bC: Tensor
    ) -> Tensor:
        """(b,): the objective, times the task's weight."""
        held, marginals = self._targets.get(task), request.marginals
        target = None if held is None else held.of(images)
        marginal_C = None
        if marginals is not None:
            marginal_C = torch.from_numpy(marginals[task, : logits_bC.shape[1]])
        weight = 1.0 if request.weights is None else float(request.weights[task])
        return image_losses(self.request.objective, logits_bC, target, marginal_C) * weight

    def _slot_images(self, step: int, part: SlotRange) -> NDArray[np.int64]:
        name = self._spec.task_names[part.task]
        count, population = self._counts[part.task], self._populations[part.task]
        images = step_images(self.request.seed, name, step, count, population)
        return images[part.start : part.stop]

    def _needed(self, part: SlotRange) -> NDArray[np.int64]:
        """Every image that these slots will show in any step, once."""
        seen = np.zeros(self._populations[part.task], dtype=bool)
        whole = self._populations[part.task] <= self._counts[part.task]
        for step in range(1 if whole else self.request.steps):
            seen[self._slot_images(step, part)] = True
            if seen.all():
                break
        return np.flatnonzero(seen)


def _passes(slots: Sequence[SlotRange], images: int) -> Iterator[list[SlotRange]]:
    """Cut the slots into runs of ``images`` (the last may have fewer)."""
    run: list[SlotRange] = []
    room = images
    for part in slots:
        start = part.start
        while start < part.stop:
            stop = min(part.stop, start + room)
            run.append(SlotRange(part.task, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield run
                run, room = [], images
    if run:
        yield run
