"""On a worker: what one expert makes of its own task's images, Fisher diagonals or Gram matrices.

Legend: N images, P columns of the flat vector.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from raymerge.data.decoding import PinnedImages
from raymerge.data.slots import step_images
from raymerge.data.sources import unlabeled_images
from raymerge.engine.messages import StatisticsRequest, StatisticsResult, WorkerSpec
from raymerge.engine.worker.evaluation import load_weights
from raymerge.engine.worker.grams import HiddenStates, grams
from raymerge.engine.worker.shard import ServedModel
from raymerge.merging.fisher import fisher_diagonal
from raymerge.models.checkpoints.visual_tower import open_visual


class ExpertStatistics:
    """Gathers what a request asks for, one task at a time."""

    def __init__(self, spec: WorkerSpec, model: ServedModel) -> None:
        self._spec, self._model = spec, model
        self._states: dict[int, HiddenStates] = {}

    def gather(self, request: StatisticsRequest) -> StatisticsResult:
        """Raises :class:`~raymerge.errors.UserError` for a damaged file or an unfit tower."""
        work = {"fisher": self._fisher, "grams": self._grams, "block_grams": self._block_grams}
        found = work[request.kind](request)
        return StatisticsResult(request.task, {name: t.cpu().numpy() for name, t in found.items()})

    def _fisher(self, request: StatisticsRequest) -> dict[str, Tensor]:
        """The diagonal (P,), zero where the tower has buffers."""
        encoder, layout = self._model.encoder, self._model.layout
        load_weights(encoder, self._model.pretrained, self._checkpoint(request))
        head_DC, visual = self._model.head(request.task), encoder.visual

        def logits(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
            features: Tensor = functional_call(visual, parameters, (images,))
            return nn.functional.normalize(features, dim=-1) @ head_DC

        found = fisher_diagonal(
            logits,
            dict(visual.named_parameters()),
            self._images(request),
            samples=request.samples,
            generator=torch.Generator().manual_seed(request.seed),
        )
        fisher_P = torch.zeros(layout.columns)
        for name, view in layout.views(fisher_P).items():
            if name in found:
                view.copy_(found[name])
        return {"fisher": fisher_P}

    def _grams(self, request: StatisticsRequest) -> dict[str, Tensor]:
        load_weights(self._model.encoder, self._model.pretrained, self._checkpoint(request))
        return grams(self._model.encoder.visual, self._images(request))

    def _block_grams(self, request: StatisticsRequest) -> dict[str, Tensor]:
        """Advance through what is merged by now, then the Grams of the expert's next block."""
        visual = self._model.encoder.visual
        self._set(request.merged)
        if request.block == 0:
            self._states[request.task] = HiddenStates(visual, self._images(request))
        states = self._states[request.task]
        if request.block > 0:
            states.advance(request.block - 1)
        if request.block == states.blocks:
            return self._states.pop(request.task).head_grams()
        self._load_block(self._checkpoint(request), request.block)
        return states.block_grams(request.block)

    def _set(self, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        views = self._model.layout.views(self._model.encoder.theta_P)
        for name, values in tensors.items():
            views[name].copy_(torch.from_numpy(np.array(values)))

    def _load_block(self, reference: str, block: int) -> None:
        layout = self._model.layout
        checkpoint = open_visual(reference, layout, self._model.pretrained)
        theta_P = self._model.encoder.theta_P
        for t, name in enumerate(layout.names):
            if name.startswith(f"transformer.resblocks.{block}."):
                piece = layout.whole_piece(t)
                values_n = torch.empty(layout.sizes[t])
                checkpoint.read(piece, values_n)
                theta_P[piece.start : piece.stop].copy_(values_n)

    def _checkpoint(self, request: StatisticsRequest) -> str:
        return str(self._spec.tasks[request.task].checkpoint)

    def _images(self, request: StatisticsRequest) -> Tensor:
        """(N, 3, H, W), normalised, on the device; all of a task that has no more."""
        task, encoder = self._spec.tasks[request.task], self._model.encoder
        source = unlabeled_images(str(task.adapt), f"tasks[{request.task}].adapt")
        count = min(request.images, len(source))
        chosen = np.sort(step_images(request.seed, task.name, 0, count, len(source)))
        pixels = PinnedImages(source, chosen, encoder.preprocess).take(chosen)
        return encoder.preprocess.normalise(pixels.to(encoder.device))
