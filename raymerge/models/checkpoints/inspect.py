"""What is in a checkpoint, from its header: format, architecture, tensors, dtypes, activation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raymerge.errors import escape_unprintable
from raymerge.models.checkpoints.checkpoint import Checkpoint, TensorSpec
from raymerge.models.checkpoints.huggingface import HuggingFaceCheckpoint
from raymerge.models.checkpoints.locate import files_of, read_json
from raymerge.models.checkpoints.lora import LoraCheckpoint
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.checkpoints.visual_tower import PREFIXES


def inspect_checkpoint(reference: str) -> dict[str, Any]:
    """A JSON-ready summary. Raises :class:`~raymerge.errors.CheckpointError`."""
    checkpoint = open_checkpoint(reference)
    stored = checkpoint
    if isinstance(checkpoint, HuggingFaceCheckpoint | LoraCheckpoint):
        stored = checkpoint.source
    specs = stored.specs
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.kind,
        "container": stored.kind,
        "layout": getattr(checkpoint, "layout", None),
        "bytes": sum(file.stat().st_size for file in files_of(checkpoint.path)),
        "tensors": len(specs),
        "parameters": sum(math.prod(spec.shape) for spec in specs.values()),
        "dtypes": dict(Counter(str(s.dtype).removeprefix("torch.") for s in specs.values())),
        "visual": _visual(checkpoint.specs),
        "activation": _activation(checkpoint),
        "keys": {
            key: {"shape": list(s.shape), "dtype": str(s.dtype).removeprefix("torch.")}
            for key, s in specs.items()
        },
    }


def inspection_text(inspection: Mapping[str, Any], keys: int = 12) -> str:
    """The summary for a person, with the first few tensors."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in inspection["dtypes"].items())
    visual = inspection["visual"]
    lines = [
        f"file        {inspection['path']} ({inspection['bytes'] / 1e6:.1f} MB)",
        f"format      {_format_text(inspection)}",
        f"tensors     {inspection['tensors']} ({dtypes}), {inspection['parameters']:,} numbers",
        f"visual      {_visual_text(visual)}",
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


def _visual(specs: Mapping[str, TensorSpec]) -> dict[str, Any] | None:
    """The visual tower, if the keys are open_clip's: prefix, tensors, and a ViT's dimensions."""
    for prefix in PREFIXES:
        names = {k.removeprefix(prefix): s for k, s in specs.items() if k.startswith(prefix)}
        if "conv1.weight" in names or any(name.startswith("trunk.") for name in names):
            parameters = sum(math.prod(spec.shape) for spec in names.values())
            found = {"prefix": prefix, "tensors": len(names), "parameters": parameters}
            return {**found, **_vit(names)}
    return None


def _vit(names: Mapping[str, TensorSpec]) -> dict[str, int]:
    patches, positions = (names.get(key) for key in ("conv1.weight", "positional_embedding"))
    if "class_embedding" not in names or patches is None or positions is None:
        return {}
    if len(patches.shape) != 4 or len(positions.shape) != 2:
        return {}
    width, _, patch, _ = patches.shape
    tokens = positions.shape[0] - 1
    blocks = {name.split(".")[2] for name in names if name.startswith("transformer.resblocks.")}
    return {
        "width": width,
        "patch": patch,
        "layers": len(blocks),
        "image_size": patch * math.isqrt(tokens),
    }


def _visual_text(visual: Mapping[str, Any] | None) -> str:
    if visual is None:
        return "none with open_clip's names"
    text = (
        f"{visual['tensors']} tensors, {visual['parameters']:,} numbers, keys {visual['prefix']}*"
    )
    if "width" not in visual:
        return text
    return (
        f"ViT, width {visual['width']}, {visual['layers']} layers, patch {visual['patch']}, "
        f"{visual['image_size']} px; {text}"
    )


def _activation(checkpoint: Checkpoint) -> str:
    """Weights do not say which GELU they were trained with; a config beside them may."""
    if isinstance(checkpoint, HuggingFaceCheckpoint):
        return _hidden_act(checkpoint.path.parent / "config.json")
    if isinstance(checkpoint, LoraCheckpoint):
        return "the pretrained model's"
    config = checkpoint.path.parent / "open_clip_config.json"
    if not config.is_file() or not Path(checkpoint.path).name.startswith("open_clip"):
        return "not recorded in the file (OpenAI's weights need QuickGELU: arch …-quickgelu)"
    content = read_json(config)
    model_cfg = content.get("model_cfg") if isinstance(content, dict) else None
    quick = isinstance(model_cfg, dict) and model_cfg.get("quick_gelu")
    return "QuickGELU" if quick else "GELU"


def _hidden_act(config: Path) -> str:
    """Of a ``CLIPModel``, or of a vision tower alone; transformers' default is QuickGELU."""
    if not config.is_file():
        return "not recorded in the file (hidden_act of its config.json; OpenAI's is QuickGELU)"
    content = read_json(config)
    tower = content.get("vision_config", content) if isinstance(content, dict) else {}
    given = str(tower.get("hidden_act", "quick_gelu") if isinstance(tower, dict) else tower)[:40]
    return {"quick_gelu": "QuickGELU", "gelu": "GELU"}.get(given, given)
