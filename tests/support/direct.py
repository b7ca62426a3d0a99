"""A reference for raymerge by open_clip and torch alone: one model, its heads, its images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, normalize

State = Mapping[str, Tensor]
"""A visual tower's tensors, named as open_clip's ``visual`` names them."""


class Direct:
    """open_clip's own model in a ``local-dir:`` folder, in float64."""

    def __init__(self, folder: Path) -> None:
        self.model, _, self._preprocess = open_clip.create_model_and_transforms(
            f"local-dir:{folder}"
        )
        self.model.eval()
        self.visual: Any = self.model.visual.double()
        self._tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        self.heads: dict[str, Tensor] = {}

    @torch.no_grad()
    def head(self, task: Mapping[str, Any]) -> Tensor:
        """Return the head (D, C): e^s times the normalised text features."""
        if task["name"] not in self.heads:
            texts = self._tokenizer([f"a photo of a {name}." for name in task["classnames"]])
            rows_CD = normalize(self.model.encode_text(texts), dim=-1)
            self.heads[task["name"]] = (rows_CD.t() * self.model.logit_scale.exp()).double()
        return self.heads[task["name"]]

    def images(self, folder: str) -> Tensor:
        """Return every image below the folder, (N, 3, H, W), in sorted order."""
        return torch.stack([self._preprocess(Image.open(p)) for p in paths(folder)]).double()

    def logits(self, state: State, images: Tensor, head_DC: Tensor) -> Tensor:
        return normalize(functional_call(self.visual, dict(state), (images,)), dim=-1) @ head_DC

    def gradient(self, state: State, tasks: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return ∂/∂θ of the sum of the tasks' mean cross-entropies on their adapt images."""
        leaves = {name: t.double().clone().requires_grad_() for name, t in state.items()}
        loss = sum(
            cross_entropy(
                self.logits(leaves, self.images(task["adapt"]), self.head(task)), labels(task)
            )
            for task in tasks
        )
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def paths(folder: str) -> list[Path]:
    return sorted(Path(folder).rglob("*.png"))


def labels(task: Mapping[str, Any]) -> Tensor:
    return torch.tensor([task["classnames"].index(p.parent.name) for p in paths(task["adapt"])])


def tower(file: Path | str) -> dict[str, Tensor]:
    """Return the visual tensors of a checkpoint, in float64."""
    return {
        key.removeprefix("visual."): t.double()
        for key, t in load_file(file).items()
        if key.startswith("visual.")
    }
