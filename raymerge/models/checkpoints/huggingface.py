"""Hugging Face's CLIP under open_clip's names: a view, so no tensor is copied to be renamed.

Reads ``CLIPModel`` and ``CLIPVisionModel(WithProjection)`` as transformers 4 and 5 write them. The
keys tell which one a file holds: those of version 5's ``CLIPVisionModel`` do not start with
``vision_model.``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from raymerge.errors import CheckpointError
from raymerge.models.checkpoints.checkpoint import (
    Checkpoint,
    TensorSpec,
    ViewCheckpoint,
    read_tensor,
)
from raymerge.models.checkpoints.recognise import prefixes_of

_PATCHES = "embeddings.patch_embedding.weight"
_VISION_KEYS = (_PATCHES, "embeddings.class_embedding", "pre_layrnorm.weight")

# open_clip's names → Hugging Face's keys: of whole models, of one tower, of one block.
_WHOLE = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_VISION = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": _PATCHES,
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_TEXT = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TRANSPOSED = ("visual.proj", "text_projection")
_QKV = re.compile(r"self_attn\.[qkv]_proj")


@dataclass(frozen=True)
class StoredKeys:
    """Hugging Face's keys of one of open_clip's tensors: several whose columns follow one another,
    or one whose matrix is transposed."""

    keys: tuple[str, ...]
    is_transposed: bool = False


def stored_keys(
    name: str, vision: str = "vision_model.", text: str = "text_model."
) -> StoredKeys | None:
    """Return Hugging Face's keys for open_clip's ``name``; None if there are none.

    ``vision``, ``text``: the prefixes of the towers' keys.
    """
    if name in _WHOLE:
        return StoredKeys((_WHOLE[name],), name in _TRANSPOSED)
    in_tower = name.removeprefix("visual.")
    prefix, table = (text, _TEXT) if in_tower == name else (vision, _VISION)
    if in_tower in table:
        return StoredKeys((prefix + table[in_tower],))
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", in_tower)
    if match is None:
        return None
    layer, module, leaf = match.groups()
    block = f"{prefix}encoder.layers.{layer}."
    if module == "attn.in_proj":
        return StoredKeys(tuple(f"{block}self_attn.{part}_proj.{leaf}" for part in "qkv"))
    return StoredKeys((f"{block}{_BLOCK[module]}.{leaf}",)) if module in _BLOCK else None


def open_clip_name(
    key: str, vision: str = "vision_model.", text: str = "text_model."
) -> str | None:
    """Return the open_clip name of the tensor that holds ``key``; None if there is none."""
    if (name := _inverse(_WHOLE).get(key)) is not None:
        return name
    for tower, prefix, table in (("", text, _TEXT), ("visual.", vision, _VISION)):
        if not key.startswith(prefix):
            continue
        in_tower = key.removeprefix(prefix)
        if (name := _inverse(table).get(in_tower)) is not None:
            return tower + name
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", in_tower)
        if match is not None:
            layer, module, leaf = match.groups()
            block = f"{tower}transformer.resblocks.{layer}."
            if _QKV.fullmatch(module):
                return f"{block}attn.in_proj_{leaf}"
            if (name := _inverse(_BLOCK).get(module)) is not None:
                return f"{block}{name}.{leaf}"
    return None


def _inverse(table: Mapping[str, str]) -> Mapping[str, str]:
    return {key: name for name, key in table.items()}


def vision_prefixes(keys: Mapping[str, object]) -> list[str]:
    """Return the prefixes of the vision towers' keys, the one to take first; none if the keys are
    not Hugging Face's."""
    prefixes = prefixes_of(keys.keys(), _VISION_KEYS)
    is_whole = prefixes and all(prefixes[0] + each in keys for each in _VISION_KEYS)
    return prefixes if is_whole else []


def is_huggingface(keys: Mapping[str, object]) -> bool:
    """Return whether the keys are those of a CLIP that transformers has saved."""
    return bool(vision_prefixes(keys))


class HuggingFaceCheckpoint:
    """Hugging Face's tensors under open_clip's names; a tensor without such a name keeps its own.

    ``outside``: what the file holds beside the model, such as an optimizer's state. Raises
    :class:`CheckpointError` where tensors that open_clip packs into one do not fit together.
    """

    kind = "huggingface"

    def __init__(self, container: Checkpoint) -> None:
        self.container, self.path = container, container.path
        prefix, *others = vision_prefixes(container.specs)  # is_huggingface
        self.chosen, self.others = prefix, tuple(others)
        self._root = prefix.removesuffix("vision_model.")
        self._vision = prefix.removeprefix(self._root)
        self._stored: dict[str, StoredKeys] = {}
        self.outside: Mapping[str, TensorSpec] = {
            key: spec for key, spec in container.specs.items() if not key.startswith(self._root)
        }
        for key in container.specs:
            if key not in self.outside:
                self._add(key)
        self.specs: Mapping[str, TensorSpec] = {
            name: self._spec(stored) for name, stored in self._stored.items()
        }

    @property
    def layout(self) -> str:
        """The class that was saved and the prefix of its keys, for ``raymerge inspect``."""
        keys, root = self.container.specs, self._root
        is_whole = any(key.startswith(f"{root}text_model.") for key in keys)
        has_projection = f"{root}visual_projection.weight" in keys
        kind = "CLIPModel" if is_whole else "CLIPVisionModel" + "WithProjection" * has_projection
        return f"{kind}, keys {root}{self._vision}*"

    def _add(self, key: str) -> None:
        """Enter the tensor that holds ``key`` under its name in open_clip, or under its own."""
        bare = key.removeprefix(self._root)
        if bare.endswith("position_ids"):  # a buffer that counts from 0
            return
        name = open_clip_name(bare, self._vision)
        if name is None:
            in_tower = self._vision and bare.startswith(self._vision)
            own = "visual." + bare.removeprefix(self._vision) if in_tower else key
            self._stored[own] = StoredKeys((key,))
        elif name not in self._stored:
            stored = stored_keys(name, self._vision)
            assert stored is not None
            keys = tuple(self._root + each for each in stored.keys)
            missing = [each for each in keys if each not in self.container.specs]
            if missing:
                raise CheckpointError(
                    f"checkpoint {self.path}: {', '.join(missing)} missing; q, k and v belong "
                    "together: export it again"
                )
            self._stored[name] = StoredKeys(keys, stored.is_transposed)

    def _spec(self, stored: StoredKeys) -> TensorSpec:
        specs = [self.container.specs[key] for key in stored.keys]
        dtype = reduce(torch.promote_types, [spec.dtype for spec in specs])
        shape = specs[0].shape
        if stored.is_transposed:
            return TensorSpec(shape[::-1], dtype)
        if len(specs) > 1:
            if any(not spec.shape or spec.shape[1:] != shape[1:] for spec in specs):
                shapes = zip(stored.keys, specs, strict=True)
                sizes = ", ".join(f"{key} {list(spec.shape)}" for key, spec in shapes)
                raise CheckpointError(
                    f"checkpoint {self.path}: cannot be packed: {sizes}; export it again"
                )
            shape = (sum(spec.shape[0] for spec in specs), *shape[1:])
        return TensorSpec(shape, dtype)

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        stored = self._stored[key]
        if stored.is_transposed:
            whole = read_tensor(self.container, stored.keys[0]).t().reshape(-1)
            out_n.copy_(whole[start : start + len(out_n)])
            return
        sizes = [self.container.specs[each].numel for each in stored.keys]
        for part, first, columns in _parts_of(sizes, start, len(out_n)):
            self.container.fill(stored.keys[part], first, out_n[columns])

    def complete(self, base: Checkpoint, prefix: str) -> Checkpoint:
        """Return the tower with the pretrained model's projection, where it has none of its own."""
        key = f"{prefix}proj"
        if "visual.proj" in self.specs or key not in base.specs:
            return self
        own = {name: (self, name) for name in self.specs}
        return ViewCheckpoint(self.path, self.kind, {**own, "visual.proj": (base, key)})


def _parts_of(sizes: list[int], start: int, count: int) -> Iterator[tuple[int, int, slice]]:
    """Yield the parts that hold columns ``start:start + count`` of parts laid end to end.

    Each as its index, its first column that is held, and where its columns lie among ``count``.
    """
    offset = 0
    for part, size in enumerate(sizes):
        low, high = max(start, offset), min(start + count, offset + size)
        if low < high:
            yield part, low - offset, slice(low - start, high - start)
        offset += size
