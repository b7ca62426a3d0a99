"""open_clip's image encoder over a flat vector θ, and the pretrained model that it is built from.

The tower's weights and gradients are views into two flat vectors, so that a merge is one write and
a backward pass one read. What a merge does not change stays in the module.

Legend: P parameters, B images, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raymerge.data.preprocess import make_preprocess
from raymerge.merging.layout import ParameterLayout
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint
from raymerge.models.flat import view_flat
from raymerge.models.pretrained import unmerged_tensors
from raymerge.models.resolve import ResolvedModel
from raymerge.models.skeleton import OpenClipModel, build_skeleton

# --- open_clip's module ------------------------------------------------------------------------


def build_model(resolved: ResolvedModel, pretrained: VisualCheckpoint) -> OpenClipModel:
    """Return the pretrained model on the CPU, in float32 and evaluation mode, without gradients.

    The merged tensors of its visual tower are not set: :class:`FlatEncoder` replaces them.
    """
    with _NoRandomWeights():
        model = build_skeleton(resolved)
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in unmerged_tensors(pretrained)
    }
    model.load_state_dict(state, strict=False, assign=True)  # the names have been checked
    return model.eval().requires_grad_(False)


class _NoRandomWeights(TorchFunctionMode):
    """Skips the drawing of random weights where a module is built (seconds at ViT-B)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        in_place = func in (Tensor.normal_, Tensor.uniform_)
        if in_place or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            func = torch.empty
        return func(*args, **(kwargs or {}))


# --- images in, features out -------------------------------------------------------------------


class FlatEncoder:
    """An image encoder whose weights are views into ``theta_P``, gradients into ``gradient_P``.

    ``columns``: the length of both, by default the layout's.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ParameterLayout,
        device: torch.device,
        columns: int | None = None,
    ) -> None:
        columns = layout.columns if columns is None else columns
        self.theta_P = torch.zeros(columns, device=device)
        self.gradient_P = torch.zeros(columns, device=device)
        self.preprocess = make_preprocess(model.visual)
        self.device = device
        self._model: OpenClipModel = model.to(device).eval()
        view_flat(self.visual, layout, self.theta_P, self.gradient_P)

    @property
    def visual(self) -> nn.Module:
        """The visual tower."""
        visual: nn.Module = self._model.visual
        return visual

    def drop_text(self) -> None:
        """Free everything but the visual tower, once the heads exist."""
        for name, _ in list(self._model.named_children()):
            if name != "visual":
                delattr(self._model, name)

    def features(self, pixels_B3HW: Tensor, autocast: bool = False) -> Tensor:
        """Return (B, D) float32 features of norm 1 for uint8 images; ``autocast``: compute in
        bfloat16."""
        images = self.preprocess.normalise(pixels_B3HW.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast):
            features_BD = self._model.encode_image(images)
        return nn.functional.normalize(features_BD.float(), dim=-1)
