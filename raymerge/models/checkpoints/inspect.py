"""Describe a checkpoint from its header: format, architecture, tensors, dtypes, activation."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raymerge.errors import escape_unprintable
from raymerge.models.checkpoints.checkpoint import Checkpoint, TensorSpec, other_prefixes
from raymerge.models.checkpoints.huggingface import HuggingFaceCheckpoint
from raymerge.models.checkpoints.locate import files_of, read_json
from raymerge.models.checkpoints.lora import LoraCheckpoint
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.checkpoints.recognise import prefixes_of

# Names of a tower: a ViT's, a ResNet's; those of timm follow "trunk.".
_TOWER = ("conv1.weight", "class_embedding", "ln_post.weight", "attnpool.positional_embedding")
_TRUNK = re.compile(r"(?:^|\.)trunk\.")


def inspect_checkpoint(reference: str) -> dict[str, Any]:
    """Return a JSON-ready summary. Raises :class:`~raymerge.errors.CheckpointError`."""
    checkpoint = container = open_checkpoint(reference)
    if isinstance(checkpoint, HuggingFaceCheckpoint | LoraCheckpoint):
        container = checkpoint.container
    specs = container.specs
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.kind,
        "container": container.kind,
        "layout": getattr(checkpoint, "layout", None),
        "bytes": sum(file.stat().st_size for file in files_of(checkpoint.path)),
        "tensors": len(specs),
        "parameters": sum(spec.numel for spec in specs.values()),
        "dtypes": dict(Counter(map(_dtype_name, specs.values()))),
        "visual": _visual(checkpoint),
        "activation": _activation(checkpoint),
        "keys": {
            key: {"shape": list(spec.shape), "dtype": _dtype_name(spec)}
            for key, spec in specs.items()
        },
    }


def _dtype_name(spec: TensorSpec) -> str:
    return str(spec.dtype).removeprefix("torch.")


# --- as text -------------------------------------------------------------------------------------


def inspection_text(inspection: Mapping[str, Any], keys: int = 12) -> str:
    """Return the summary as lines of text, with the first ``keys`` tensors."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in inspection["dtypes"].items())
    lines = [
        f"file        {inspection['path']} ({inspection['bytes'] / 1e6:.1f} MB)",
        f"format      {_format_text(inspection)}",
        f"tensors     {inspection['tensors']} ({dtypes}), {inspection['parameters']:,} numbers",
        f"visual      {_visual_text(inspection['visual'])}",
        f"activation  {inspection['activation']}",
    ]
    names = [(escape_unprintable(name), spec) for name, spec in inspection["keys"].items()]
    width = max((len(name) for name, _ in names[:keys]), default=0)
    lines += [f"  {name:<{width}}  {spec['dtype']} {spec['shape']}" for name, spec in names[:keys]]
    if len(names) > keys:
        lines.append(f"  … and {len(names) - keys} more (--json lists all)")
    return "\n".join(lines)


def _format_text(inspection: Mapping[str, Any]) -> str:
    kind, container, layout = (inspection[key] for key in ("format", "container", "layout"))
    return f"{kind}: {layout}, in {container}" if layout else str(kind)


def _visual_text(visual: Mapping[str, Any] | None) -> str:
    if visual is None:
        return "none with open_clip's names"
    text = (
        f"{visual['tensors']} tensors, {visual['parameters']:,} numbers, keys {visual['prefix']}*"
    )
    if visual["others"]:
        text += f"; also {', '.join(f'{prefix}*' for prefix in visual['others'])}"
    if "width" not in visual:
        return text
    return (
        f"ViT, width {visual['width']}, {visual['layers']} layers, patch {visual['patch']}, "
        f"{visual['image_size']} px; {text}"
    )


# --- the visual tower and its activation ---------------------------------------------------------


def _visual(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return prefix, sizes and a ViT's dimensions of the visual tower; None if it has no tower
    with open_clip's names."""
    specs = checkpoint.specs
    prefixes = prefixes_of(specs, _TOWER)
    if not prefixes or prefixes[0] + "conv1.weight" not in specs:
        trunks = [key.rpartition("trunk.")[0] for key in specs if _TRUNK.search(key)]
        prefixes = list(dict.fromkeys(trunks))
    if not prefixes:
        return None
    prefix, *others = prefixes
    others += other_prefixes(checkpoint)
    tower = {k.removeprefix(prefix): s for k, s in specs.items() if k.startswith(prefix)}
    parameters = sum(spec.numel for spec in tower.values())
    sizes = {"prefix": prefix, "others": others, "tensors": len(tower), "parameters": parameters}
    return {**sizes, **_vit(tower)}


def _vit(tower: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Return a ViT's dimensions from its shapes; none of another architecture."""
    patches, positions = (tower.get(key) for key in ("conv1.weight", "positional_embedding"))
    if "class_embedding" not in tower or patches is None or positions is None:
        return {}
    if len(patches.shape) != 4 or len(positions.shape) != 2:
        return {}
    width, _, patch, _ = patches.shape
    blocks = {name.split(".")[2] for name in tower if name.startswith("transformer.resblocks.")}
    return {
        "width": width,
        "patch": patch,
        "layers": len(blocks),
        "image_size": patch * math.isqrt(max(0, positions.shape[0] - 1)),
    }


def _activation(checkpoint: Checkpoint) -> str:
    """Return the GELU that the model was trained with: only a config beside the weights tells."""
    if isinstance(checkpoint, HuggingFaceCheckpoint):
        return _hidden_act(checkpoint.path.parent / "config.json")
    if isinstance(checkpoint, LoraCheckpoint):
        return "the pretrained model's"
    config = checkpoint.path.parent / "open_clip_config.json"
    if not config.is_file() or not checkpoint.path.name.startswith("open_clip"):
        return "not recorded in the file (OpenAI's weights need QuickGELU: arch …-quickgelu)"
    content = read_json(config)
    model_cfg = content.get("model_cfg") if isinstance(content, dict) else None
    is_quick = isinstance(model_cfg, dict) and model_cfg.get("quick_gelu")
    return "QuickGELU" if is_quick else "GELU"


def _hidden_act(config: Path) -> str:
    """Return the activation in the config of a ``CLIPModel`` or of a vision tower alone.

    Without the key it is QuickGELU, as in transformers.
    """
    if not config.is_file():
        return "not recorded in the file (hidden_act of its config.json; OpenAI's is QuickGELU)"
    content = read_json(config)
    tower = content.get("vision_config", content) if isinstance(content, dict) else {}
    act = str(tower.get("hidden_act", "quick_gelu") if isinstance(tower, dict) else tower)[:40]
    return {"quick_gelu": "QuickGELU", "gelu": "GELU"}.get(act, act)
