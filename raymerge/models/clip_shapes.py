"""The state dict of a plain CLIP ViT by name and shape, without building the model.

Most merges are of this architecture, and skipping the build saves two seconds; any other one is
left to open_clip's module. A test compares the shapes with that module for every configuration
that they are returned for.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

Shape = tuple[int, ...]

_MODEL_KEYS = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
_VISION_KEYS = {"image_size", "patch_size", "width", "layers", "head_width"}
_TEXT_KEYS = {"context_length", "vocab_size", "width", "layers", "heads"}


def clip_vit_shapes(model_cfg: Mapping[str, Any]) -> dict[str, Shape] | None:
    """Return every tensor's shape, in the order of open_clip's state dict.

    None if the configuration has any setting besides a plain ViT's sizes.
    """
    vision, text = model_cfg.get("vision_cfg"), model_cfg.get("text_cfg")
    if not (isinstance(vision, dict) and isinstance(text, dict)):
        return None
    # An unknown setting could add or change a tensor.
    if not (
        set(model_cfg) <= _MODEL_KEYS
        and _all_counts(vision, _VISION_KEYS, optional={"head_width"})
        and _all_counts(text, _TEXT_KEYS)
        and _all_counts({"embed_dim": model_cfg.get("embed_dim")}, {"embed_dim"})
    ):
        return None
    width, dimension = text["width"], model_cfg["embed_dim"]
    return {
        "positional_embedding": (text["context_length"], width),
        "text_projection": (width, dimension),
        "logit_scale": (),
        **{f"visual.{name}": shape for name, shape in _visual(vision, dimension).items()},
        **_blocks(width, text["layers"]),
        "token_embedding.weight": (text["vocab_size"], width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }


def _all_counts(cfg: Mapping[str, Any], keys: Set[str], optional: Set[str] = frozenset()) -> bool:
    """Return whether a section has these keys and no others, each a positive integer."""
    return keys - optional <= set(cfg) <= keys and all(
        isinstance(value, int) and not isinstance(value, bool) and value > 0
        for value in cfg.values()
    )


def _visual(vision: Mapping[str, int], dimension: int) -> dict[str, Shape]:
    width, patch = vision["width"], vision["patch_size"]
    tokens = (vision["image_size"] // patch) ** 2 + 1
    return {
        "class_embedding": (width,),
        "positional_embedding": (tokens, width),
        "proj": (width, dimension),
        "conv1.weight": (width, 3, patch, patch),
        "ln_pre.weight": (width,),
        "ln_pre.bias": (width,),
        **_blocks(width, vision["layers"]),
        "ln_post.weight": (width,),
        "ln_post.bias": (width,),
    }


def _blocks(width: int, layers: int) -> dict[str, Shape]:
    block = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
    }
    return {
        f"transformer.resblocks.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in block.items()
    }
