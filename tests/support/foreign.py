"""Small state dicts and the files of other tools that merge them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

BASE = {"a": [1.0, 1.0, 1.0, 1.0], "layers.0.w": [[0.0, 2.0]], "layers.2.w": [[4.0, 4.0]]}
# Task vectors: (0.1, −0.2, 0.3, −0.4) and (0.4, 0.1, −0.3, 0) for a.
ONE = {"a": [1.1, 0.8, 1.3, 0.6], "layers.0.w": [[1.0, 2.0]], "layers.2.w": [[4.0, 5.0]]}
TWO = {"a": [1.4, 1.1, 0.7, 1.0], "layers.0.w": [[1.0, 0.0]], "layers.2.w": [[5.0, 4.0]]}


def save(path: Path, state: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)
        for key, value in state.items()
    }
    save_file(tensors, path)
    return path


def three(root: Path) -> None:
    """Write ``base``, ``one`` and ``two``, which differ by two task vectors."""
    for name, state in (("base", BASE), ("one", ONE), ("two", TWO)):
        save(root / f"{name}.safetensors", state)


def mergekit(root: Path, method: str, *own: Mapping[str, Any], **keys: Any) -> Path:
    """Write a mergekit file over ``three``; ``own``: the parameters of one and two."""
    names = ("one", "two", "three")
    data = {
        "merge_method": method,
        "base_model": "base.safetensors",
        "models": [
            {"model": f"{name}.safetensors", "parameters": dict(given)}
            for name, given in zip(names, own, strict=False)
        ],
        **keys,
    }
    return write(root / "merge.yaml", {k: v for k, v in data.items() if v is not None})


def write(path: Path, data: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(data), sort_keys=False), encoding="utf-8")
    return path


def merged(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def random_models(
    root: Path, count: int, shapes: Mapping[str, tuple[int, ...]], seed: int = 0
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """``base`` and ``m0`` …, saved and returned; a third of the entries are the base's own."""
    random = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    models = []
    for _ in range(count):
        change = {
            name: torch.randn(shape, generator=random)
            * (torch.rand(shape, generator=random) < 0.67)
            for name, shape in shapes.items()
        }
        models.append({name: base[name] + 0.1 * change[name] for name in shapes})
    for name, state in [("base", base), *((f"m{k}", m) for k, m in enumerate(models))]:
        save(root / f"{name}.safetensors", state)
    return base, models
