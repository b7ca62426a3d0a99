"""Hugging Face's CLIP under open_clip's names: a view, no tensor is copied to be renamed.

``CLIPModel`` and ``CLIPVisionModel(WithProjection)``, as transformers 4 and 5 write them: from 5 on
a ``CLIPVisionModel`` has no ``vision_model.`` in front of its keys. Which one it is, is seen from
the keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from raymerge.errors import CheckpointError
from raymerge.models.checkpoints.checkpoint import Checkpoint, TensorSpec, read_tensor
from raymerge.models.checkpoints.locate import weight_map

_PATCHES = "embeddings.patch_embedding.weight"
_MARKS = (_PATCHES, "embeddings.class_embedding", "pre_layrnorm.weight")

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
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
_WHOLE = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = ("visual.proj", "text_projection")
_QKV = re.compile(r"self_attn\.[qkv]_proj")


@dataclass(frozen=True)
class Source:
    """Where the numbers of one of open_clip's tensors are: keys whose columns follow one another,
    or one key whose matrix is transposed."""

    keys: tuple[str, ...]
    transposed: bool = False


def source_of(name: str, vision: str = "vision_model.", text: str = "text_model.") -> Source | None:
    """Hugging Face's keys for open_clip's ``name``; None if there are none.

    ``vision``, ``text``: what the keys of the towers start with.
    """
    if name in _WHOLE:
        return Source((_WHOLE[name],), name in _TRANSPOSED)
    in_tower = name.removeprefix("visual.")
    prefix, table = (text, _TEXT) if in_tower == name else (vision, _VISION)
    if in_tower in table:
        return Source((prefix + table[in_tower],))
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", in_tower)
    if found is None:
        return None
    layer, module, leaf = found.groups()
    block = f"{prefix}encoder.layers.{layer}."
    if module == "attn.in_proj":
        return Source(tuple(f"{block}self_attn.{part}_proj.{leaf}" for part in "qkv"))
    return Source((f"{block}{_BLOCK[module]}.{leaf}",)) if module in _BLOCK else None


def name_of(key: str, vision: str = "vision_model.", text: str = "text_model.") -> str | None:
    """open_clip's name for the tensor that holds Hugging Face's ``key``; None if there is none."""
    for name, whole in _WHOLE.items():
        if key == whole:
            return name
    for tower, prefix, table in (("", text, _TEXT), ("visual.", vision, _VISION)):
        if not key.startswith(prefix):
            continue
        in_tower = key.removeprefix(prefix)
        for name, other in table.items():
            if in_tower == other:
                return tower + name
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", in_tower)
        if found is not None:
            layer, module, leaf = found.groups()
            block = f"{tower}transformer.resblocks.{layer}."
            if _QKV.fullmatch(module):
                return f"{block}attn.in_proj_{leaf}"
            for name, other in _BLOCK.items():
                if module == other:
                    return f"{block}{name}.{leaf}"
    return None


def vision_prefix(keys: Mapping[str, object]) -> str | None:
    """What the keys of the vision tower start with; None if this is no CLIP of Hugging Face's."""
    for key in keys:
        prefix = key.removesuffix(_PATCHES)
        if prefix != key and all(prefix + mark in keys for mark in _MARKS):
            return prefix
    return None


class HuggingFaceCheckpoint:
    """Hugging Face's tensors under open_clip's names. What has no such name keeps its own.

    Raises :class:`CheckpointError` where tensors that open_clip packs do not fit together.
    """

    kind = "huggingface"

    def __init__(self, source: Checkpoint, vision: str) -> None:
        self.source, self.path = source, source.path
        self._root = vision.removesuffix("vision_model.")
        self._vision = vision.removeprefix(self._root)
        self.layout = self._layout()
        self._sources: dict[str, Source] = {}
        for key in source.specs:
            self._place(key)
        self.specs: Mapping[str, TensorSpec] = {
            name: self._spec(found) for name, found in self._sources.items()
        }

    def _layout(self) -> str:
        keys, root = self.source.specs, self._root
        whole = any(key.startswith(f"{root}text_model.") for key in keys)
        projected = f"{root}visual_projection.weight" in keys
        kind = "CLIPModel" if whole else "CLIPVisionModel" + "WithProjection" * projected
        return f"{kind}, keys {root}{self._vision}*"

    def _place(self, key: str) -> None:
        bare = key.removeprefix(self._root)
        if bare.endswith("position_ids"):  # a buffer that counts from 0
            return
        name = name_of(bare, self._vision) if key.startswith(self._root) else None
        if name is None:
            inside = self._vision and bare.startswith(self._vision)
            own = "visual." + bare.removeprefix(self._vision) if inside else key
            self._sources[own] = Source((key,))
        elif name not in self._sources:
            found = source_of(name, self._vision)
            assert found is not None
            keys = tuple(self._root + k for k in found.keys)
            self._require(keys)
            self._sources[name] = Source(keys, found.transposed)

    def _require(self, keys: tuple[str, ...]) -> None:
        missing = [key for key in keys if key not in self.source.specs]
        if missing:
            raise CheckpointError(
                f"checkpoint {self.path}: {', '.join(missing)} missing; q, k and v belong together"
            )

    def _spec(self, found: Source) -> TensorSpec:
        specs = [self.source.specs[key] for key in found.keys]
        dtype = reduce(torch.promote_types, [spec.dtype for spec in specs])
        shape = specs[0].shape
        if found.transposed:
            return TensorSpec(shape[::-1], dtype)
        if len(specs) > 1:
            if any(not spec.shape or spec.shape[1:] != shape[1:] for spec in specs):
                sizes = ", ".join(f"{k} {list(self.source.specs[k].shape)}" for k in found.keys)
                raise CheckpointError(f"checkpoint {self.path}: cannot be packed: {sizes}")
            shape = (sum(spec.shape[0] for spec in specs), *shape[1:])
        return TensorSpec(shape, dtype)

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        found = self._sources[key]
        if found.transposed:
            whole = read_tensor(self.source, found.keys[0]).t().reshape(-1)
            out_n.copy_(whole[start : start + len(out_n)])
            return
        sizes = [math.prod(self.source.specs[k].shape) for k in found.keys]
        for part, (inside, here) in columns(sizes, start, len(out_n)):
            self.source.fill(found.keys[part], inside, out_n[here])

    def over(self, base: Checkpoint, prefix: str) -> Checkpoint:
        """With the pretrained model's projection, where this model has none."""
        key = f"{prefix}proj"
        if "visual.proj" in self.specs or key not in base.specs:
            return self
        return _WithProjection(self, base, key)


class _WithProjection:
    """A ``CLIPVisionModel`` whose projection is the pretrained model's."""

    kind = HuggingFaceCheckpoint.kind

    def __init__(self, tower: Checkpoint, base: Checkpoint, key: str) -> None:
        self.path, self._tower, self._base, self._key = tower.path, tower, base, key
        self.specs: Mapping[str, TensorSpec] = {**tower.specs, "visual.proj": base.specs[key]}

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        if key == "visual.proj":
            self._base.fill(self._key, start, out_n)
        else:
            self._tower.fill(key, start, out_n)


def columns(sizes: list[int], start: int, count: int) -> Iterator[tuple[int, tuple[int, slice]]]:
    """Which parts, laid end to end, hold columns ``start:start + count``: the part, the first
    column in it, and where they go."""
    first = 0
    for part, size in enumerate(sizes):
        low, high = max(start, first), min(start + count, first + size)
        if low < high:
            yield part, (low - first, slice(low - start, high - start))
        first += size


class ShardedCheckpoint:
    """The files that an index, such as ``model.safetensors.index.json``, names."""

    def __init__(self, path: Path, open_file: Callable[[Path], Checkpoint]) -> None:
        self.path = path
        shard_of = weight_map(path)
        for name in shard_of.values():
            if not (path.parent / name).is_file():
                raise CheckpointError(
                    f"checkpoint {path}: {name} is missing beside it; fetch it again"
                )
        shards = {name: open_file(path.parent / name) for name in sorted(set(shard_of.values()))}
        self.kind = f"sharded {next(iter(shards.values())).kind}"
        self._shard_of = {key: shards[name] for key, name in shard_of.items()}
        for key, shard in self._shard_of.items():
            if key not in shard.specs:
                raise CheckpointError(
                    f"checkpoint {path}: says that {key} is in {shard.path.name}, which does not "
                    "hold it; fetch both again"
                )
        self.specs: Mapping[str, TensorSpec] = {
            key: shard.specs[key] for key, shard in self._shard_of.items()
        }
        self.files = tuple(shard.path for shard in shards.values())

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        self._shard_of[key].fill(key, start, out_n)
