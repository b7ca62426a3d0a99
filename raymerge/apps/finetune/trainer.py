"""Trains one target, in this process or as a Ray task: the plain function behind both.

Legend: T tasks, B images of one task in a step, b images of one task in a pass, C classes,
D features.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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
from raymerge.engine.worker.clip_model import ClipModel, ClipSource
from raymerge.engine.worker.evaluation import load_weights
from raymerge.errors import RunError
from raymerge.files.atomic import write_atomically, write_text
from raymerge.runs.state import SavedTensors, StateStore

Batch = Sequence[tuple[Tensor, Tensor]]
"""Of each task: (B, 3, H, W) uint8 images and their (B,) labels."""


@dataclass(frozen=True)
class TrainingJob:
    """One target of a run. ``attempt``: the run's number, see ``attempts.claim_attempt``.
    ``threads``: CPU threads; None leaves torch's own choice."""

    config: Config
    target: Target
    attempt: int
    threads: int | None = None
    use_gpu: bool = True


@dataclass(frozen=True)
class BatchScore:
    """Of a step's images, before its update: mean loss and top-1 of each task, (T,)."""

    loss: tuple[float, ...]
    top1: tuple[float, ...]


def train_target(job: TrainingJob, progress: Callable[[int], None] | None = None) -> str:
    """Train ``job.target`` from its newest state on, and write its file; returns its place.

    Interrupted at any time, it leaves a state no older than ``finetune.state_every_steps`` steps.
    Raises :class:`~raymerge.errors.UserError` for a damaged image, :class:`RunError` when the
    gradient is not finite or the disk is full.
    """
    with _threads(job.threads), torch.random.fork_rng(devices=[]):
        trainer = Trainer(job.config, job.target, _spec(job))
        target, states = job.target, job.target.states()
        states.claim(job.attempt)
        start, tensors = states.newest() or (0, {})
        if tensors:
            trainer.restore(tensors)
        _keep_lines(target.metrics, start)
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

    Batch statistics and dropout are off, as in evaluation: nothing random is left in a step.
    """

    def __init__(self, config: Config, target: Target, spec: WorkerSpec) -> None:
        self._recipe, self._target = recipe_of(config), target
        self._autocast = config.precision == "bfloat16"
        tasks = tuple(config.tasks[k] for k in target.tasks)
        self._model = ClipModel(ClipSource(config.model, tasks), spec, {})
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
        listed = [
            labelled_images(str(task.train), task.classnames, f"tasks[{k}].train")
            for k, task in zip(self._target.tasks, tasks, strict=True)
        ]
        keep = may_keep(sum(map(len, listed)), preprocess, recipe.augment)
        augment = make_augment(self._encoder.visual) if recipe.augment == "open_clip" else None
        return [
            TrainingImages(
                task.name, images, config.seed, recipe.batch_size, preprocess, augment, keep
            )
            for task, images in zip(tasks, listed, strict=True)
        ]

    def run(
        self, states: StateStore[SavedTensors], start: int, progress: Callable[[int], None]
    ) -> None:
        """The steps from ``start``, a line of metrics for each and now and then a state."""
        recipe, steps = self._recipe, self._target.steps
        schedule = Schedule(steps, recipe.warmup_steps)
        began = time.perf_counter()

        def observe(step: int, score: BatchScore) -> None:
            nonlocal began
            now = time.perf_counter()
            rate = recipe.lr * schedule.factor(step)
            metrics.write(json.dumps(self._line(step, score, rate, now - began)) + "\n")
            metrics.flush()
            began = now
            done = step + 1
            if done % recipe.state_every_steps == 0 and done < steps:
                states.save((done, self.tensors()))
            progress(1)

        self._target.metrics.parent.mkdir(parents=True, exist_ok=True)
        with (
            self._target.metrics.open("a", encoding="utf-8") as metrics,
            _Ahead(self._batch, start, steps) as batches,
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
        """Of ``metrics.jsonl``; ``step`` counts from 1 there."""
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

    # --- what a state holds --------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The weights and the optimiser's moments, on the CPU, sharing memory where they can."""
        out = {f"weights.{name}": tensor for name, tensor in self._weights().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            out |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
        return {name: tensor.cpu().contiguous() for name, tensor in out.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what ``tensors`` gave."""
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
        """Views into θ, by the tower's own names."""
        return self._model.layout.views(self._encoder.theta_P)

    def write(self) -> None:
        """The target's file: the visual tower in float32, keys as in the whole model."""
        state = {f"visual.{k}": v.cpu().contiguous() for k, v in self._weights().items()}
        # One entry alone: safetensors writes several in a random order, and the bytes would differ.
        metadata = {FINGERPRINT: self._target.fingerprint}
        path = self._target.weights
        write_atomically(path, lambda temporary: save_file(state, temporary, metadata=metadata))


class _Ahead:
    """The batches of the steps in their order; the next one decodes while one is used."""

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

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _parts(counts: Sequence[int], first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(task, start, stop) of each task's run within images ``first`` to ``stop`` of a step."""
    offset = 0
    for task, count in enumerate(counts):
        a, b = max(first, offset), min(stop, offset + count)
        if a < b:
            yield task, a, b
        offset += count


def _keep_lines(metrics: Path, steps: int) -> None:
    """Drop the lines of steps that are taken again after a resume, and a torn last line."""
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines()[:steps]
        write_text(metrics, "".join(f"{line}\n" for line in lines))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Run with ``count`` threads inside torch and give the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
