"""Statistics of one CLIP expert on its own task's images: Fisher diagonals and Gram matrices.

Merging from them is left to the driver (``engine.driver.statistics``).

Legend: N images, P columns of the flat vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from raymerge.config import TaskConfig
from raymerge.data.decoding import PinnedImages
from raymerge.data.slots import step_images
from raymerge.data.sources import unlabeled_images
from raymerge.engine.messages import StatisticsRequest
from raymerge.engine.worker.grams import HiddenStates, grams
from raymerge.merging.fisher import fisher_diagonal
from raymerge.merging.layout import ParameterLayout
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint
from raymerge.models.encoder import FlatEncoder


class ExpertModel(Protocol):
    """The part of a served CLIP model that the statistics use."""

    encoder: FlatEncoder
    layout: ParameterLayout
    tasks: tuple[TaskConfig, ...]

    def head(self, task: int) -> Tensor: ...

    def load_expert(self, task: int) -> None: ...

    def open_expert(self, reference: str) -> VisualCheckpoint: ...


class ExpertStatistics:
    """Gathers the statistics of a request, one task at a time.

    For RegMean++ the requests of a task come block by block, and the hidden states of its images
    are kept between them.
    """

    def __init__(self, model: ExpertModel) -> None:
        self._model = model
        self._states: dict[int, HiddenStates] = {}

    def gather(self, request: StatisticsRequest) -> dict[str, Tensor]:
        """Return the requested statistics by tensor name.

        Raises :class:`~raymerge.errors.UserError` for a damaged file or an unfit tower.
        """
        functions = {"fisher": self._fisher, "grams": self._grams, "block_grams": self._block_grams}
        return functions[request.kind](request)

    def _fisher(self, request: StatisticsRequest) -> dict[str, Tensor]:
        """Return the diagonal (P,), zero for the tower's buffers."""
        encoder, layout = self._model.encoder, self._model.layout
        self._model.load_expert(request.task)
        head_DC, visual = self._model.head(request.task), encoder.visual

        def logits(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
            features: Tensor = functional_call(visual, parameters, (images,))
            return nn.functional.normalize(features, dim=-1) @ head_DC

        diagonal = fisher_diagonal(
            logits,
            dict(visual.named_parameters()),
            self._images(request),
            samples=request.samples,
            generator=torch.Generator().manual_seed(request.seed),
        )
        fisher_P = torch.zeros(layout.columns)
        for name, view in layout.views(fisher_P).items():
            if name in diagonal:
                view.copy_(diagonal[name])
        return {"fisher": fisher_P}

    def _grams(self, request: StatisticsRequest) -> dict[str, Tensor]:
        self._model.load_expert(request.task)
        return grams(self._model.encoder.visual, self._images(request))

    def _block_grams(self, request: StatisticsRequest) -> dict[str, Tensor]:
        """Advance through the merged blocks; return the Grams of the expert's next block."""
        visual = self._model.encoder.visual
        self._set_tensors(request.merged)
        if request.block == 0:
            self._states[request.task] = HiddenStates(visual, self._images(request))
        states = self._states[request.task]
        if request.block > 0:
            states.advance(request.block - 1)
        if request.block == states.blocks:
            return self._states.pop(request.task).head_grams()
        self._load_block(self._checkpoint(request), request.block)
        return states.block_grams(request.block)

    def _set_tensors(self, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        views = self._model.layout.views(self._model.encoder.theta_P)
        for name, values in tensors.items():
            views[name].copy_(torch.from_numpy(np.array(values)))

    def _load_block(self, reference: str, block: int) -> None:
        layout = self._model.layout
        checkpoint = self._model.open_expert(reference)
        theta_P = self._model.encoder.theta_P
        for t, name in enumerate(layout.names):
            if name.startswith(f"transformer.resblocks.{block}."):
                piece = layout.whole_piece(t)
                values_n = torch.empty(layout.sizes[t])
                checkpoint.read(piece, values_n)
                theta_P[piece.start : piece.stop].copy_(values_n)

    def _checkpoint(self, request: StatisticsRequest) -> str:
        return str(self._model.tasks[request.task].checkpoint)

    def _images(self, request: StatisticsRequest) -> Tensor:
        """Return images (N, 3, H, W), normalised, on the device; all of a task with fewer."""
        task, encoder = self._model.tasks[request.task], self._model.encoder
        source = unlabeled_images(str(task.adapt), f"tasks[{request.task}].adapt")
        count = min(request.images, len(source))
        indices = np.sort(step_images(request.seed, task.name, 0, count, len(source)))
        pixels = PinnedImages(source, indices, encoder.preprocess).take(indices)
        return encoder.preprocess.normalise(pixels.to(encoder.device))
