"""Training one target: the plain function that runs in this process or as a Ray task.

A step is decided by the config, the target and the step number alone, so an interrupted training
continues from its newest state to the same weights. The steps themselves are taken by
:func:`raymerge.apps.finetune.loop.train`.

Legend: T tasks, B images of one task in a step, b images of one task in a pass, C classes,
D features.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raymerge.apps.finetune.images import TrainingImages, make_augment, may_keep
from raymerge.apps.finetune.loop import Schedule, train
from raymerge.apps.finetune.targets import FINGERPRINT, Target, recipe_of
from raymerge.config import Config, TaskConfig
from raymerge.data.sources import labelled_images
from raymerge.engine.memory import pass_images
from raymerge.engine.messages import WorkerSpec
from raymerge.engine.worker.clip_model import ClipModel
from raymerge.engine.worker.evaluation import load_weights
from raymerge.errors import RunError
from raymerge.files.atomic import write_atomically
from raymerge.files.threads import torch_threads
from raymerge.runs.folder import keep_lines
from raymerge.runs.state import SavedTensors, StateStore

Batch = Sequence[tuple[Tensor, Tensor]]
"""For each task: (B, 3, H, W) uint8 images and their (B,) labels."""


@dataclass(frozen=True)
class TrainingJob:
    """One target of a run, to be trained by one process.

    ``attempt``: the number that the run has claimed. ``threads``: CPU threads; None leaves the
    choice to torch.
    """

    config: Config
    target: Target
    attempt: int
    threads: int | None = None
    use_gpu: bool = True


@dataclass(frozen=True)
class BatchScore:
    """Mean loss and top-1 (T,) of each task on a step's images, before the update."""

    loss: tuple[float, ...]
    top1: tuple[float, ...]


def train_target(job: TrainingJob, progress: Callable[[int], None] | None = None) -> str:
    """Train ``job.target`` from its newest state on, write its file and return the target's name.

    An interrupted training leaves a state at most ``finetune.state_every_steps`` steps old. Raises
    :class:`~raymerge.errors.UserError` for a damaged image, :class:`RunError` if the gradient is
    not finite or the disk is full.
    """
    with torch_threads(job.threads), torch.random.fork_rng(devices=[]):
        trainer = Trainer(job.config, job.target, _spec(job))
        target, states = job.target, job.target.states()
        states.claim(job.attempt)
        start, tensors = states.newest() or (0, {})
        if tensors:
            trainer.restore(tensors)
        keep_lines(target.metrics, start)
        if progress is not None:
            progress(start)
        try:
            trainer.run(states, start, progress or (lambda steps: None))
        except RunError as error:
            raise RunError(f"{target.place}: {error}") from error
        trainer.write()
        states.clear()
    return target.place


def _spec(job: TrainingJob) -> WorkerSpec:
    config = job.config
    return WorkerSpec(
        threads=job.threads,
        micro_batch=config.cluster.micro_batch,
        use_gpu=job.use_gpu,
    )


class Trainer:
    """The pretrained encoder with its frozen heads, the images, and AdamW on the visual tower.

    The model is in evaluation mode (no batch statistics, no dropout), so no step is random.
    """

    def __init__(self, config: Config, target: Target, spec: WorkerSpec) -> None:
        self._recipe, self._target = recipe_of(config), target
        self._autocast = config.precision == "bfloat16"
        tasks = tuple(config.tasks[k] for k in target.tasks)
        self._model = ClipModel(config.model, tasks, spec, {})
        self._encoder = self._model.encoder
        self._device = self._encoder.device
        reference = str(self._model.pretrained.checkpoint.path)
        load_weights(self._encoder, self._model.pretrained, reference)
        self._images = self._open_images(config, tasks)
        self.parameters = list(self._encoder.visual.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self._recipe.lr,
            betas=self._recipe.betas,
            weight_decay=self._recipe.weight_decay,
        )

    def _open_images(self, config: Config, tasks: Sequence[TaskConfig]) -> list[TrainingImages]:
        recipe, preprocess = self._recipe, self._encoder.preprocess
        image_lists = [
            labelled_images(str(task.train), task.classnames, f"tasks[{k}].train")
            for k, task in zip(self._target.tasks, tasks, strict=True)
        ]
        keep = may_keep(sum(map(len, image_lists)), preprocess, recipe.augment)
        augment = make_augment(self._encoder.visual) if recipe.augment == "open_clip" else None
        return [
            TrainingImages(
                task.name, images, config.seed, recipe.batch_size, preprocess, augment, keep
            )
            for task, images in zip(tasks, image_lists, strict=True)
        ]

    def run(
        self, states: StateStore[SavedTensors], start: int, progress: Callable[[int], None]
    ) -> None:
        """Take the steps from ``start`` on; each writes a line of metrics, some a state."""
        recipe, steps = self._recipe, self._target.steps
        schedule = Schedule(steps, recipe.warmup_steps)
        began = time.perf_counter()

        def observe(step: int, score: BatchScore) -> None:
            nonlocal began
            # The line comes first: a resumed run drops lines after its state, never lacks one.
            now = time.perf_counter()
            rate = recipe.lr * schedule.factor(step)
            metrics.write(json.dumps(self._line(step, score, rate, now - began)) + "\n")
            metrics.flush()
            began = now
            done = step + 1
            if done % recipe.state_every_steps == 0 and done < steps:
                states.save((done, self.tensors()))
            progress(1)

        # The next batch is decoded while the current one is used.
        self._target.metrics.parent.mkdir(parents=True, exist_ok=True)
        with (
            self._target.metrics.open("a", encoding="utf-8") as metrics,
            _Prefetcher(self._batch, start, steps) as batches,
        ):
            train(
                self.parameters,
                self.optimizer,
                schedule,
                lambda step: self.backward(batches.take(step)),
                observe,
                start=start,
                clip_norm=recipe.clip_norm,
            )

    def _batch(self, step: int) -> Batch:
        return [images.batch(step) for images in self._images]

    def backward(self, batch: Batch) -> BatchScore:
        """Add the gradient of the tasks' mean loss, in passes of as many images as fit."""
        counts = [len(labels) for _, labels in batch]
        pixels = torch.cat([pixels for pixels, _ in batch])
        labels = torch.cat([labels for _, labels in batch]).to(self._device)
        loss_T = torch.zeros(len(batch), device=self._device)
        correct_T = torch.zeros(len(batch), device=self._device)
        size = pass_images(len(pixels), self._model.slots_per_pass)
        for first in range(0, len(pixels), size):
            stop = min(len(pixels), first + size)
            features_BD = self._encoder.features(pixels[first:stop], self._autocast)
            losses = []
            for task, a, b in _parts(counts, first, stop):
                logits_bC = features_BD[a - first : b - first] @ self._model.head(task)
                target_b = labels[a:b]
                loss = nn.functional.cross_entropy(logits_bC, target_b, reduction="sum")
                losses.append(loss / counts[task])
                loss_T[task] += losses[-1].detach()
                correct_T[task] += (logits_bC.argmax(-1) == target_b).sum() / counts[task]
            (torch.stack(losses).sum() / len(batch)).backward()
        return BatchScore(tuple(loss_T.tolist()), tuple(correct_T.tolist()))

    def _line(self, step: int, score: BatchScore, rate: float, seconds: float) -> dict[str, Any]:
        """Return a line of ``metrics.jsonl``, in which ``step`` counts from 1."""
        line: dict[str, Any] = {
            "step": step + 1,
            "loss": sum(score.loss) / len(score.loss),
            "top1": sum(score.top1) / len(score.top1),
            "lr": rate,
            "seconds": seconds,
        }
        if self._target.is_joint:
            names = [images.task for images in self._images]
            rows = zip(names, score.loss, score.top1, strict=True)
            line["tasks"] = {name: {"loss": loss, "top1": top1} for name, loss, top1 in rows}
        return line

    # --- state -----------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights and the optimiser's moments on the CPU, sharing memory if possible."""
        out = {f"weights.{name}": tensor for name, tensor in self._weights().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            out |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
        return {name: tensor.cpu().contiguous() for name, tensor in out.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`tensors` returned."""
        state: dict[int, dict[str, Tensor]] = {}
        weights = self._weights()
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "weights":
                weights[rest].copy_(tensor)
            else:
                index, _, key = rest.partition(".")
                state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _weights(self) -> dict[str, Tensor]:
        """Return views into θ by the tower's own names."""
        return self._model.layout.views(self._encoder.theta_P)

    def write(self) -> None:
        """Write the target's file: the visual tower in float32, keys as in the whole model."""
        state = {f"visual.{k}": v.cpu().contiguous() for k, v in self._weights().items()}
        # A single entry: safetensors writes several in random order, and the bytes would differ.
        metadata = {FINGERPRINT: self._target.fingerprint}
        path = self._target.weights
        write_atomically(path, lambda temporary: save_file(state, temporary, metadata=metadata))


class _Prefetcher:
    """Yields the steps' batches in order and decodes the next one while one is used."""

    def __init__(self, make: Callable[[int], Batch], start: int, stop: int) -> None:
        self._make, self._stop = make, stop
        self._pool = ThreadPoolExecutor(1)
        self._next: Future[Batch] | None = None
        if start < stop:
            self._next = self._pool.submit(make, start)

    def take(self, step: int) -> Batch:
        assert self._next is not None
        batch = self._next.result()
        self._next = self._pool.submit(self._make, step + 1) if step + 1 < self._stop else None
        return batch

    def __enter__(self) -> _Prefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _parts(counts: Sequence[int], first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (task, start, stop) of each task's images within ``first`` to ``stop`` of a step."""
    offset = 0
    for task, count in enumerate(counts):
        a, b = max(first, offset), min(stop, offset + count)
        if a < b:
            yield task, a, b
        offset += count
