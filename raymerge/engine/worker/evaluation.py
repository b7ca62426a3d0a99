"""Top-1, cross-entropy and entropy on labelled test images, in fixed chunks.

A task's test images are cut into chunks of fixed size; chunks are dealt to workers and their sums
are added in chunk order, so the result does not depend on how many workers there are. Adding them
up is left to ``engine.scores``.

Legend: B images of a chunk, N of a task, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raymerge.config import TaskConfig
from raymerge.data.decoding import decode_batches
from raymerge.data.images import ImageList
from raymerge.data.sources import labelled_images
from raymerge.engine.messages import ChunkScore, EvaluateRequest
from raymerge.merging.objectives import entropy
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint, open_visual

if TYPE_CHECKING:
    from raymerge.models.encoder import FlatEncoder

CHUNK = 64
_CACHE_BYTES = 1 << 28
"""A worker keeps its decoded test images for the next evaluation if they take no more than this."""


@dataclass(frozen=True)
class ChunkRange:
    """Chunks ``start:stop`` of one task's test images."""

    task: int
    start: int
    stop: int


def test_images(tasks: Sequence[TaskConfig]) -> dict[int, ImageList]:
    """Return labelled test images by task index, for the tasks that have any."""
    return {
        i: labelled_images(task.test, task.classnames, f"tasks[{i}].test")
        for i, task in enumerate(tasks)
        if task.test is not None
    }


def deal_chunks(sizes: Mapping[int, int], workers: int) -> list[list[ChunkRange]]:
    """Deal all tasks' chunks to the workers, evenly and contiguously.

    ``sizes``: the number of images by task index.
    """
    chunks = [(task, c) for task, n in sorted(sizes.items()) for c in range(-(-n // CHUNK))]
    bounds = [len(chunks) * w // workers for w in range(workers + 1)]
    return [_ranges(chunks[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def _ranges(chunks: Sequence[tuple[int, int]]) -> list[ChunkRange]:
    tasks = sorted({task for task, _ in chunks})
    spans = {task: [c for t, c in chunks if t == task] for task in tasks}
    return [ChunkRange(task, span[0], span[-1] + 1) for task, span in spans.items()]


class Evaluator:
    """One worker's chunks of every task's test images, and the sums over them."""

    def __init__(
        self,
        encoder: FlatEncoder,
        pretrained: VisualCheckpoint,
        tasks: Sequence[TaskConfig],
        rank: int,
        workers: int,
    ) -> None:
        self._encoder, self._pretrained = encoder, pretrained
        self._names = [task.name for task in tasks]
        images = test_images(tasks)
        sizes = {task: len(of_task) for task, of_task in images.items()}
        ranges = deal_chunks(sizes, workers)[rank]
        self._ranges = [(span, _cut(images[span.task], span)) for span in ranges]
        height, width = encoder.preprocess.size
        pixels = sum(len(own) for _, own in self._ranges) * 3 * height * width
        self._may_cache = pixels <= _CACHE_BYTES
        self._cache: dict[ChunkRange, list[Tensor]] = {}

    def scores(
        self,
        request: EvaluateRequest,
        head: Callable[[int], Tensor],
        progress: Callable[[int], None] | None = None,
    ) -> list[ChunkScore]:
        """Score this worker's chunks, each on the checkpoint requested for its task."""
        out: list[ChunkScore] = []
        loaded_reference = None
        for span, images in self._ranges:
            reference = request.checkpoints.get(self._names[span.task])
            if reference is None:
                continue
            # Tasks of one checkpoint follow each other, so its weights are loaded once.
            if reference != loaded_reference:
                load_weights(self._encoder, self._pretrained, reference)
                loaded_reference = reference
            labels = torch.tensor(images.labels)
            for i, pixels_B3HW in enumerate(self._chunks(span, images)):
                target_B = labels[i * CHUNK : i * CHUNK + len(pixels_B3HW)]
                logits_BC = self._logits(pixels_B3HW, head(span.task), request.autocast)
                chunk = span.start + i
                out.append(_score(span.task, chunk, logits_BC, target_B, request.per_sample))
                if progress is not None:
                    progress(len(target_B))
        return out

    @torch.no_grad()
    def _logits(self, pixels_B3HW: Tensor, head_DC: Tensor, autocast: bool) -> Tensor:
        return self._encoder.features(pixels_B3HW, autocast) @ head_DC

    def _chunks(self, span: ChunkRange, images: ImageList) -> Iterable[Tensor]:
        """Return the pixels (B, 3, H, W) of each chunk, from the cache if they are there."""
        if span in self._cache:
            return self._cache[span]
        batches = (
            pixels for _, pixels in decode_batches(images.items, self._encoder.preprocess, CHUNK)
        )
        return self._remember(span, batches) if self._may_cache else batches

    def _remember(self, span: ChunkRange, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        pixels = []
        for batch in batches:
            pixels.append(batch)
            yield batch
        self._cache[span] = pixels


def load_weights(encoder: FlatEncoder, pretrained: VisualCheckpoint, reference: str) -> None:
    """Fill the encoder's θ from a checkpoint that fits the pretrained model."""
    checkpoint = open_visual(reference, pretrained.layout, pretrained)
    encoder.theta_P.copy_(checkpoint.flat(len(encoder.theta_P)))


def _cut(images: ImageList, span: ChunkRange) -> ImageList:
    rows = slice(span.start * CHUNK, span.stop * CHUNK)
    return ImageList(images.items[rows], images.labels[rows])


def _score(
    task: int, chunk: int, logits_BC: Tensor, target_B: Tensor, per_sample: bool = False
) -> ChunkScore:
    logits_BC = logits_BC.cpu()
    loss_B = torch.nn.functional.cross_entropy(logits_BC, target_B, reduction="none").double()
    entropy_B = entropy(logits_BC).double()
    return ChunkScore(
        task=task,
        chunk=chunk,
        examples=len(target_B),
        correct=int((logits_BC.argmax(-1) == target_B).sum()),
        loss=float(loss_B.sum()),
        entropy=float(entropy_B.sum()),
        losses=loss_B.numpy() if per_sample else None,
        entropies=entropy_B.numpy() if per_sample else None,
    )
