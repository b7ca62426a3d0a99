"""Top-1, cross-entropy and entropy on labelled test images, in fixed chunks.

A task's test images are cut into chunks of fixed size; chunks are dealt to workers and their sums
are added in chunk order, so the result does not depend on how many workers there are.

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
_KEEP_BYTES = 1 << 28
"""Decoded test images are kept for the next evaluation while a worker's share stays below this."""


@dataclass(frozen=True)
class ChunkRange:
    """Chunks ``start:stop`` of one task's test images."""

    task: int
    start: int
    stop: int


def test_images(tasks: Sequence[TaskConfig]) -> dict[int, ImageList]:
    """Labelled test images by task index, for the tasks that have any."""
    return {
        i: labelled_images(task.test, task.classnames, f"tasks[{i}].test")
        for i, task in enumerate(tasks)
        if task.test is not None
    }


def deal_chunks(sizes: Mapping[int, int], workers: int) -> list[list[ChunkRange]]:
    """All tasks' chunks, contiguous, dealt evenly: ``sizes`` is images by task index."""
    chunks = [(task, c) for task, n in sorted(sizes.items()) for c in range(-(-n // CHUNK))]
    bounds = [len(chunks) * w // workers for w in range(workers + 1)]
    return [_shares(chunks[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def _shares(chunks: Sequence[tuple[int, int]]) -> list[ChunkRange]:
    tasks = sorted({task for task, _ in chunks})
    spans = {task: [c for t, c in chunks if t == task] for task in tasks}
    return [ChunkRange(task, span[0], span[-1] + 1) for task, span in spans.items()]


class Evaluator:
    """One worker's share of every task's test images, and the sums over its chunks."""

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
        sizes = {task: len(listed) for task, listed in images.items()}
        shares = deal_chunks(sizes, workers)[rank]
        self._shares = [(share, _cut(images[share.task], share)) for share in shares]
        height, width = encoder.preprocess.size
        self._keep = sum(len(i) for _, i in self._shares) * 3 * height * width <= _KEEP_BYTES
        self._kept: dict[ChunkRange, list[Tensor]] = {}

    def scores(
        self,
        request: EvaluateRequest,
        head: Callable[[int], Tensor],
        progress: Callable[[int], None] | None = None,
    ) -> list[ChunkScore]:
        """Score this worker's chunks, each on the checkpoint requested for its task."""
        out: list[ChunkScore] = []
        loaded = None
        for share, images in self._shares:
            reference = request.checkpoints.get(self._names[share.task])
            if reference is None:
                continue
            if reference != loaded:
                load_weights(self._encoder, self._pretrained, reference)
                loaded = reference
            labels = torch.tensor(images.labels)
            for i, pixels_B3HW in enumerate(self._chunks(share, images)):
                target_B = labels[i * CHUNK : i * CHUNK + len(pixels_B3HW)]
                logits_BC = self._logits(pixels_B3HW, head(share.task), request.autocast)
                chunk = share.start + i
                out.append(_score(share.task, chunk, logits_BC, target_B, request.per_sample))
                if progress is not None:
                    progress(len(target_B))
        return out

    @torch.no_grad()
    def _logits(self, pixels_B3HW: Tensor, head_DC: Tensor, autocast: bool) -> Tensor:
        return self._encoder.features(pixels_B3HW, autocast) @ head_DC

    def _chunks(self, share: ChunkRange, images: ImageList) -> Iterable[Tensor]:
        if share in self._kept:
            return self._kept[share]
        batches = (
            pixels for _, pixels in decode_batches(images.items, self._encoder.preprocess, CHUNK)
        )
        if not self._keep:
            return batches
        return self._remember(share, batches)

    def _remember(self, share: ChunkRange, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        kept = []
        for batch in batches:
            kept.append(batch)
            yield batch
        self._kept[share] = kept


def load_weights(encoder: FlatEncoder, pretrained: VisualCheckpoint, reference: str) -> None:
    """Fill the encoder's θ from a checkpoint that fits the pretrained model."""
    checkpoint = open_visual(reference, pretrained.layout, pretrained)
    encoder.theta_P.copy_(checkpoint.flat(len(encoder.theta_P)))


def _cut(images: ImageList, share: ChunkRange) -> ImageList:
    here = slice(share.start * CHUNK, share.stop * CHUNK)
    return ImageList(images.items[here], images.labels[here])


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
