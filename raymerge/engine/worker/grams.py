"""What RegMean needs to see of open_clip's vision transformer: Gram matrices of the inputs of its
linear weights, through one expert at once or block by block behind a merged prefix (RegMean++).

Covered are the four weights of every transformer block and ``proj``. The patch convolution and the
weights of an attentional pooler are not: they are averaged like everything else.

Legend: B images, b images of one chunk, T tokens, W width of the tower, H heads, I input features
of one weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raymerge.errors import UserError

_CHUNK = 32
"""Images in one forward pass."""


def grams(visual: nn.Module, images_B3HW: Tensor, chunk: int = _CHUNK) -> dict[str, Tensor]:
    """G = XᵀX / tokens (I, I) of every linear weight, by name, through the weights now loaded.

    ``visual``: open_clip's tower in evaluation mode; :class:`~raymerge.errors.UserError` for
    another kind. ``images_B3HW``: normalised. Each block runs once.
    """
    states = HiddenStates(visual, images_B3HW, chunk)
    found: dict[str, Tensor] = {}
    for index in range(states.blocks):
        with _captured(visual, index) as captured:
            states.advance(index)
        found |= captured.grams()
    return found | states.head_grams()


def in_by_out(name: str, weight: Tensor) -> Tensor:
    """The weight as y = xW has it, (I, O); on the result, the way back. open_clip stores (O, I)."""
    return weight if name == "proj" else weight.t()


class HiddenStates:
    """One task's images inside the tower: ``chunks_bTW`` is the input of block ``depth``.

    Construction runs the stem (patches, class token, positions, ``ln_pre``). For RegMean++, at each
    block: load an expert's block, ``block_grams`` of its task; once all tasks have theirs, load the
    merged block and ``advance`` every task. All of it uses the weights loaded at that time. Asking
    for another block than ``depth`` is a ValueError.

    Raises :class:`~raymerge.errors.UserError` for a tower that is not open_clip's.
    """

    def __init__(self, visual: nn.Module, images_B3HW: Tensor, chunk: int = _CHUNK) -> None:
        if not isinstance(visual, VisionTransformer):
            kind = f"{type(visual).__module__}.{type(visual).__qualname__}"
            raise UserError(
                "model: RegMean supports open_clip's vision transformers, and this image encoder "
                f"is a {kind}; choose another method"
            )
        self._visual: Any = visual
        self.depth = 0
        with torch.no_grad():
            self.chunks_bTW = [visual._embeds(images) for images in images_B3HW.split(chunk)]

    @property
    def blocks(self) -> int:
        return len(self._visual.transformer.resblocks)

    def block_grams(self, index: int) -> dict[str, Tensor]:
        """The Grams of block ``index`` = ``depth``; the hidden states stay."""
        self._expect(index)
        with _captured(self._visual, index) as captured:
            for _ in self._outputs(index):
                pass
        return captured.grams()

    def advance(self, index: int) -> None:
        """Replace the hidden states by the outputs of block ``index`` = ``depth``."""
        self.chunks_bTW = list(self._outputs(index))
        self.depth += 1

    def head_grams(self) -> dict[str, Tensor]:
        """After the last block: the Gram of the pooled token, which ``proj`` multiplies."""
        self._expect(self.blocks)
        gram = _GramSum()
        with torch.no_grad():
            for hidden_bTW in self.chunks_bTW:
                gram.add(self._visual._pool(hidden_bTW)[0])
        return {} if self._visual.proj is None else {"proj": gram.mean()}

    def _outputs(self, index: int) -> Iterator[Tensor]:
        self._expect(index)
        transformer = self._visual.transformer
        block = transformer.resblocks[index]
        for hidden_bTW in self.chunks_bTW:
            with torch.no_grad():
                if transformer.batch_first:
                    output_bTW = block(hidden_bTW)
                else:
                    output_bTW = block(hidden_bTW.transpose(0, 1)).transpose(0, 1)
            yield output_bTW

    def _expect(self, index: int) -> None:
        if index != self.depth:
            raise ValueError(f"at the input of block {self.depth}, not of block {index}")


class _GramSum:
    """Σ xxᵀ over tokens, in float32 or the finer precision of the inputs."""

    def __init__(self) -> None:
        self._tokens = 0
        self._sum_II: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """``inputs`` (..., I)."""
        inputs_nI = inputs.flatten(0, -2)
        inputs_nI = inputs_nI.to(torch.promote_types(inputs.dtype, torch.float32))
        self._tokens += len(inputs_nI)
        if self._sum_II is None:
            self._sum_II = inputs_nI.t() @ inputs_nI
        else:
            self._sum_II.addmm_(inputs_nI.t(), inputs_nI)

    def mean(self) -> Tensor:
        """G = XᵀX / tokens, (I, I). At least one token was added."""
        assert self._sum_II is not None
        return self._sum_II / self._tokens


class _Captured:
    """The Grams of one block's linear weights, from hooks on the modules that see their inputs."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._sums: dict[str, _GramSum] = {}

    def see(self, name: str, inputs: Tensor) -> None:
        self._sums.setdefault(name, _GramSum()).add(inputs)

    def grams(self) -> dict[str, Tensor]:
        return {f"{self._prefix}{name}": gram.mean() for name, gram in self._sums.items()}

    def hook(self, block: Any) -> list[RemovableHandle]:
        """Watch the inputs of the block's weights; returns the hooks' handles."""
        attn, mlp = block.attn, block.mlp
        fused = isinstance(attn, nn.MultiheadAttention)
        watched = {"mlp.c_fc.weight": mlp.c_fc, "mlp.c_proj.weight": mlp.c_proj}
        if not fused:  # open_clip's own Attention calls its out_proj
            watched["attn.out_proj.weight"] = attn.out_proj

        def see_attention(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.see("attn.in_proj_weight", args[0])
            if fused:
                self.see("attn.out_proj.weight", attended(attn, args[0]))

        handles = [attn.register_forward_pre_hook(see_attention)]
        for name, module in watched.items():
            handles.append(module.register_forward_pre_hook(self._seer(name)))
        return handles

    def _seer(self, name: str) -> Any:
        return lambda _, args: self.see(name, args[0])


@contextmanager
def _captured(visual: Any, index: int) -> Iterator[_Captured]:
    captured = _Captured(f"transformer.resblocks.{index}.")
    handles = captured.hook(visual.transformer.resblocks[index])
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def attended(attn: nn.MultiheadAttention, x_BTW: Tensor) -> Tensor:
    """What ``attn.out_proj`` multiplies, (B, T, W): torch computes it inside one function.

    ``x_BTW`` is the self-attention's input, (T, B, W) unless ``attn.batch_first``.
    """
    if not attn.batch_first:
        x_BTW = x_BTW.transpose(0, 1)
    packed_BTV = nn.functional.linear(x_BTW, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = (
        part_BTW.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        for part_BTW in packed_BTV.chunk(3, dim=-1)
    )
    mixed_BHTw = nn.functional.scaled_dot_product_attention(q, k, v)
    return mixed_BHTw.transpose(1, 2).flatten(2)
