"""Gram matrices of the inputs of the linear weights of open_clip's vision transformer.

RegMean takes them from one pass through an expert, RegMean++ block by block behind merged blocks.
Covered are the four weights of every transformer block and ``proj``. The patch convolution and the
weights of an attentional pooler are not: they are averaged like everything else. Solving for the
merged weights is left to ``merging.regmean``.

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
    """Return G = XᵀX / tokens (I, I) of every linear weight, by name, with the weights now loaded.

    ``visual``: open_clip's tower in evaluation mode; :class:`~raymerge.errors.UserError` for
    another kind. ``images_B3HW``: normalised. Each block runs once.
    """
    states = HiddenStates(visual, images_B3HW, chunk)
    by_name: dict[str, Tensor] = {}
    for index in range(states.blocks):
        with _hooked_block(visual, index) as block:
            states.advance(index)
        by_name |= block.grams()
    return by_name | states.head_grams()


def in_by_out(name: str, weight: Tensor) -> Tensor:
    """Return the weight as y = xW has it, (I, O), and the stored one from that.

    open_clip stores ``proj`` as (I, O) and all other weights as (O, I).
    """
    return weight if name == "proj" else weight.t()


class HiddenStates:
    """One task's images inside the tower: ``chunks_bTW`` is the input of block ``depth``.

    Construction runs the stem (patches, class token, positions, ``ln_pre``). For RegMean++, at each
    block: load an expert's block and call ``block_grams`` of its task; once all tasks have theirs,
    load the merged block and ``advance`` every task. Every call uses the weights loaded at that
    time, and raises ValueError for another block than ``depth``.

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
        """Return the Grams of block ``index`` = ``depth``; the hidden states stay."""
        self._expect(index)
        with _hooked_block(self._visual, index) as block:
            for _ in self._outputs(index):
                pass
        return block.grams()

    def advance(self, index: int) -> None:
        """Replace the hidden states by the outputs of block ``index`` = ``depth``."""
        self.chunks_bTW = list(self._outputs(index))
        self.depth += 1

    def head_grams(self) -> dict[str, Tensor]:
        """Return, after the last block, the Gram of the pooled token, which ``proj`` multiplies."""
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
            raise ValueError(
                f"the images are at the input of block {self.depth}, not of block {index}"
            )


class _GramSum:
    """The sum Σ xxᵀ over tokens, in float32 or the finer precision of the inputs."""

    def __init__(self) -> None:
        self._tokens = 0
        self._sum_II: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Add ``inputs`` (..., I)."""
        inputs_nI = inputs.flatten(0, -2)
        inputs_nI = inputs_nI.to(torch.promote_types(inputs.dtype, torch.float32))
        self._tokens += len(inputs_nI)
        if self._sum_II is None:
            self._sum_II = inputs_nI.t() @ inputs_nI
        else:
            self._sum_II.addmm_(inputs_nI.t(), inputs_nI)

    def mean(self) -> Tensor:
        """Return G = XᵀX / tokens, (I, I); at least one token must have been added."""
        assert self._sum_II is not None
        return self._sum_II / self._tokens


class _HookedBlock:
    """The Grams of one block's linear weights, from hooks on the modules that take their inputs."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._sums: dict[str, _GramSum] = {}

    def add(self, name: str, inputs: Tensor) -> None:
        self._sums.setdefault(name, _GramSum()).add(inputs)

    def grams(self) -> dict[str, Tensor]:
        return {f"{self._prefix}{name}": gram.mean() for name, gram in self._sums.items()}

    def hook(self, block: Any) -> list[RemovableHandle]:
        """Register hooks on the inputs of the block's weights; return their handles."""
        attn, mlp = block.attn, block.mlp
        fused = isinstance(attn, nn.MultiheadAttention)
        modules = {"mlp.c_fc.weight": mlp.c_fc, "mlp.c_proj.weight": mlp.c_proj}
        if not fused:  # open_clip's own Attention calls its out_proj
            modules["attn.out_proj.weight"] = attn.out_proj

        def add_attention(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.add("attn.in_proj_weight", args[0])
            if fused:
                self.add("attn.out_proj.weight", projection_input(attn, args[0]))

        handles = [attn.register_forward_pre_hook(add_attention)]
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(self._adder(name)))
        return handles

    def _adder(self, name: str) -> Any:
        return lambda _, args: self.add(name, args[0])


@contextmanager
def _hooked_block(visual: Any, index: int) -> Iterator[_HookedBlock]:
    hooked = _HookedBlock(f"transformer.resblocks.{index}.")
    handles = hooked.hook(visual.transformer.resblocks[index])
    try:
        yield hooked
    finally:
        for handle in handles:
            handle.remove()


def projection_input(attn: nn.MultiheadAttention, x_BTW: Tensor) -> Tensor:
    """Return the input of ``attn.out_proj``, (B, T, W), which torch computes out of reach.

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
