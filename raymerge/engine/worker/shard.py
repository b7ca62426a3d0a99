"""One worker's shard of the work: its columns of θ₀ and V, and its slots of every step.

It computes the three parts of a step over any served model. The collectives between them are left
to the worker.

Legend: K models, M tasks, L layers, N columns of this worker's shard, P parameters, b rows of
logits of one task, C classes (or cells of the shard).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymerge.data.slots import SlotRange, slot_counts, split_slots, step_images
from raymerge.engine.memory import pass_images
from raymerge.engine.messages import FloatArray, LoadRequest, StepRequest, WorkerSpec
from raymerge.engine.worker.served import ServedModel
from raymerge.engine.worker.vectors import TaskVectorStore, open_task_vector_store
from raymerge.merging.layout import CELL, Piece
from raymerge.merging.merge import cell_products, sum_cells
from raymerge.merging.objectives import entropy, image_losses, probability_sum
from raymerge.models.checkpoints.task_vectors import stream

_TEACHER_BATCH = 64


@dataclass(frozen=True)
class Target:
    """The expert's logits or the labels with which the objective compares predictions.

    ``examples``: sorted indices; ``values``: one label for each, or one tensor for each, of as many
    rows as its logits.
    """

    examples: NDArray[np.int64]
    values: Tensor | Sequence[Tensor]

    def of(self, examples: NDArray[np.int64]) -> Tensor:
        """Return the rows of these examples, one after the other."""
        rows = np.searchsorted(self.examples, examples)
        if isinstance(self.values, Tensor):
            return self.values[rows]
        return torch.cat([self.values[i] for i in rows])


@dataclass(frozen=True)
class Sums:
    """One worker's parts of the tasks' means, (M,) and (M, C); see ``StepResult``."""

    loss: FloatArray
    entropy: FloatArray
    probabilities: FloatArray

    @classmethod
    def zero(cls, tasks: int, classes: int) -> Sums:
        return cls(np.zeros(tasks), np.zeros(tasks), np.zeros((tasks, classes)))


class WorkerShard:
    """The data that one worker holds for learning λ, and its three computations of a step.

    ``merge``, ``backward`` and ``inner_products`` are called in this order, with the collectives of
    the group between them. None keeps state between steps. Construction reads the files and raises
    :class:`~raymerge.errors.UserError` for a damaged checkpoint or example. ``store``: that of an
    earlier shard with the same vectors and columns.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        task_names: Sequence[str],
        request: LoadRequest,
        model: ServedModel,
        progress: Callable[[int], None] | None = None,
        store: TaskVectorStore | None = None,
    ) -> None:
        self.request, self._model, self._task_names = request, model, task_names
        self._columns = model.layout.shard(spec.shard, spec.shards)
        self._layers = model.layout.layers(request.granularity)
        self._layer_of_cell = self._layers.of_cells(self._columns)
        self.device = model.theta_P.device
        self._experts = [model.open_expert(reference) for reference in request.models]
        self._populations = model.populations()
        self._counts = slot_counts(self._populations, request.slots_per_step)
        self.slots = split_slots(self._counts, spec.workers)[spec.rank]
        self.store = self._open_store(store, progress)
        self._targets = self._read_targets()
        self._model_square_KL: FloatArray | None = None

    def _open_store(
        self, store: TaskVectorStore | None, progress: Callable[[int], None] | None
    ) -> TaskVectorStore:
        """Open the store, unless there is one, while the examples load on another thread.

        A damaged checkpoint stops the loading of the examples.
        """
        # The loading thread asks after every example whether it is still needed.
        stopped = Event()

        def advance(count: int) -> None:
            if stopped.is_set():
                raise CancelledError
            if progress is not None:
                progress(count)

        needed = {part.task: self._needed(part) for part in self.slots}
        with ThreadPoolExecutor(1) as executor:
            loading = executor.submit(self._model.pin, needed, advance, torch.get_num_threads())
            # This thread opens the store meanwhile; its error ends the loading at once.
            try:
                store = store or open_task_vector_store(
                    self.request.storage,
                    self._model.pretrained,
                    self._experts,
                    self.request.basis,
                    self._columns,
                    self._layers,
                    self.device,
                )
            except BaseException:
                stopped.set()
                raise
            loading.result()
        return store

    def _read_targets(self) -> Mapping[int, Target]:
        """Return the objective's targets by task, where it has some."""
        objective = self.request.objective.name
        if objective == "kl":
            return {part.task: self._expert_target(part) for part in self.slots}
        if objective == "cross_entropy":
            return {part.task: self._label_target(part.task) for part in self.slots}
        return {}

    def _label_target(self, task: int) -> Target:
        labels = self._model.labels(task)
        return Target(np.arange(len(labels)), labels)

    @torch.no_grad()
    def _expert_target(self, part: SlotRange) -> Target:
        """Return the logits of the task's own expert on all examples of these slots."""
        self._model.load_expert(part.task)
        examples = self._needed(part)
        size = min(_TEACHER_BATCH, self._model.slots_per_pass or _TEACHER_BATCH)
        values: list[Tensor] = []
        for batch in np.split(examples, range(size, len(examples), size)):
            (logits_bC,) = self._model.outputs([(part.task, batch)], self.request.autocast)
            values += logits_bC.split(len(logits_bC) // len(batch))
        return Target(examples, values)

    def merge(self, lambdas_KL: FloatArray, theta_N: Tensor) -> None:
        """Write θ₀ + Σ λ V into this worker's columns ``theta_N``, except padding at the end."""
        self.store.merge(torch.from_numpy(lambdas_KL), theta_N)

    def backward(self, request: StepRequest) -> Sums:
        """Set the model's flat gradient to ∂ℒ/∂θ of this worker's slots.

        Returns this worker's parts of the tasks' means; the parts of all workers sum to the whole.
        """
        self._model.gradient_P.zero_()
        sums = Sums.zero(len(self._task_names), self._model.classes)
        weights = request.weights
        slots = [part for part in self.slots if weights is None or weights[part.task]]
        count = sum(part.stop - part.start for part in slots)
        for parts in _passes(slots, pass_images(count, self._model.slots_per_pass)):
            self._one_pass(request, parts, sums)
        return sums

    def inner_products(self, gradient_N: Tensor, rows: Sequence[int] | None = None) -> FloatArray:
        """Return ⟨∂ℒ/∂θ, V_k⟩ per layer over this worker's columns, (K, L) float64."""
        return self._per_layer(self.store.inner_products(gradient_N, rows))

    def details(self, gradient_N: Tensor, theta_N: Tensor) -> dict[str, FloatArray]:
        """Return ``StepResult.details``, which are defined for plain task vectors only."""
        if self._model_square_KL is None:
            self._model_square_KL = self._squares()
        return {
            "gradient_base": self._per_layer(self.store.base_products(gradient_N))[0],
            "gradient_square": self._per_layer(cell_products(gradient_N, gradient_N))[0],
            "theta_square": self._per_layer(cell_products(theta_N, theta_N))[0],
            "model_square": self._model_square_KL,
        }

    def _squares(self) -> FloatArray:
        """Return ‖θ_k‖² per layer, (K, L); read once, because the candidates do not change."""
        out_CK = torch.zeros(self._columns.cells, len(self._experts))

        def square(piece: Piece, base_n: Tensor, vectors_Kn: Tensor) -> None:
            first = (piece.start - self._columns.start) // CELL
            squares_Kn = vectors_Kn.add_(base_n).square_()
            for c, cell_Kn in enumerate(squares_Kn.split(CELL, dim=1)):
                out_CK[first + c] = cell_Kn.sum(1)

        for _ in stream(square, self._model.pretrained, self._experts, self._columns.pieces()):
            pass
        return self._per_layer(out_CK)

    def _per_layer(self, per_cell_CK: Tensor) -> FloatArray:
        layers = len(self._layers.names)
        out_KL: FloatArray = sum_cells(per_cell_CK, self._layer_of_cell, layers).numpy()
        return out_KL

    def _one_pass(self, request: StepRequest, parts: Sequence[SlotRange], sums: Sums) -> None:
        """Run one forward and backward pass of the slots ``parts``, and add to ``sums``."""
        # All tasks share one forward pass; the losses are then each task's own.
        examples = [(part.task, self._slot_examples(request.step, part)) for part in parts]
        outputs = self._model.outputs(examples, self.request.autocast)
        losses: list[Tensor] = []
        entropies: list[Tensor] = []
        predictions: list[Tensor] = []
        for (task, indices), logits_bC in zip(examples, outputs, strict=True):
            # Every slot counts the same, however many rows its example has.
            count = self._counts[task] * len(logits_bC) / len(indices)
            loss_b = self._loss(request, task, indices, logits_bC)
            losses.append(loss_b.sum() * (self.request.batches / count))
            entropies.append(entropy(logits_bC.detach()).double().sum() / count)
            predictions.append(probability_sum(logits_bC) / count)
        torch.stack(losses).sum().backward()
        # Read the sums once, after all work is queued: each read makes a GPU wait.
        tasks = [part.task for part in parts]
        np.add.at(sums.loss, tasks, torch.stack(losses).detach().double().cpu().numpy())
        np.add.at(sums.entropy, tasks, torch.stack(entropies).cpu().numpy())
        for task, mean_p_C in zip(tasks, predictions, strict=True):
            sums.probabilities[task, : len(mean_p_C)] += mean_p_C.cpu().numpy()

    def _loss(
        self, request: StepRequest, task: int, examples: NDArray[np.int64], logits_bC: Tensor
    ) -> Tensor:
        """Return the objective of each row times the task's weight, (b,)."""
        targets, marginals = self._targets.get(task), request.marginals
        target = None if targets is None else targets.of(examples)
        marginal_C = None
        if marginals is not None:
            marginal_C = torch.from_numpy(marginals[task, : logits_bC.shape[1]])
        weight = 1.0 if request.weights is None else float(request.weights[task])
        return image_losses(self.request.objective, logits_bC, target, marginal_C) * weight

    def _slot_examples(self, step: int, part: SlotRange) -> NDArray[np.int64]:
        name = self._task_names[part.task]
        count, population = self._counts[part.task], self._populations[part.task]
        examples = step_images(self.request.seed, name, step, count, population)
        return examples[part.start : part.stop]

    def _needed(self, part: SlotRange) -> NDArray[np.int64]:
        """Return every example that these slots show in any step, once each."""
        mask = np.zeros(self._populations[part.task], dtype=bool)
        always_all = self._populations[part.task] <= self._counts[part.task]
        for step in range(1 if always_all else self.request.steps):
            mask[self._slot_examples(step, part)] = True
            if mask.all():
                break
        return np.flatnonzero(mask)


def _passes(slots: Sequence[SlotRange], size: int) -> Iterator[list[SlotRange]]:
    """Cut the slots into runs of ``size`` (the last may have fewer)."""
    run: list[SlotRange] = []
    room = size
    for part in slots:
        start = part.start
        while start < part.stop:
            stop = min(part.stop, start + room)
            run.append(SlotRange(part.task, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield run
                run, room = [], size
    if run:
        yield run
