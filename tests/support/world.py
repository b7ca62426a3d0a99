"""A world for tests: a tiny open_clip model, K experts, image folders, and a config of them.

Nothing is trained: the weights are random, the images are coloured noise. The tests state facts
about merging that do not depend on the quality of the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from raymerge.config import Config, parse_config

MODEL_CFG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
}
RESNET = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": MODEL_CFG["text_cfg"],
}
"""A model with running statistics, which are merged, and integer buffers, which are not."""
CLASSES = {"colour": ["red", "green", "blue"], "shade": ["dark", "light"], "tone": ["warm", "cold"]}
CLASSES["shape"] = ["a b", "c_d", "E-f", "g"]


@dataclass(frozen=True)
class World:
    """The folder of the files, and their config as a plain dict with absolute paths."""

    root: Path
    config: Mapping[str, Any]

    def parse(self, output: Path | None = None, **changes: Any) -> Config:
        """Return the config with top-level keys replaced (mappings are merged one level deep)."""
        data = {**self.config}
        for key, value in changes.items():
            old = data.get(key)
            data[key] = (
                {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
            )
        if output is not None:
            data["output"] = str(output)
        return parse_config(data, root=self.root)

    def write(self, path: Path, **changes: Any) -> Path:
        """Write the config as a YAML file and return its path."""
        path.write_text(yaml.safe_dump({**self.config, **changes}))
        return path


def make_world(
    root: Path,
    tasks: int = 4,
    adapt: int = 12,
    test: int = 6,
    model_cfg: Mapping[str, Any] = MODEL_CFG,
) -> World:
    """Write the model, ``tasks`` experts and their images below ``root``."""
    torch.manual_seed(0)
    names = list(CLASSES)[:tasks]
    model = write_model(root / "pretrained", model_cfg)
    entries = [_write_task(root, model, k, name, adapt, test) for k, name in enumerate(names)]
    config = {
        "model": f"local-dir:{root / 'pretrained'}",
        "tasks": entries,
        "method": {"name": "adamerging"},
        "optimizer": {"steps": 5, "batch_size": 4, "lr": 0.01},
        "cluster": {"workers": 0},
        "seed": 1,
    }
    return World(root, config)


def write_model(folder: Path, model_cfg: Mapping[str, Any] = MODEL_CFG) -> torch.nn.Module:
    """Write a random open_clip model as a ``local-dir:`` folder and return it."""
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    with torch.no_grad():
        for parameter in model.visual.parameters():  # trained-like: no tensor is constant
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_file(state_dict(model), folder / "open_clip_model.safetensors")
    return model


def state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the state dict."""
    return {key: value.detach().clone().contiguous() for key, value in model.state_dict().items()}


def expert_state(model: torch.nn.Module, seed: int, scale: float = 0.05) -> dict[str, torch.Tensor]:
    """Return the visual tower plus a random task vector of relative size ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value
        + scale * value.std().nan_to_num(0.1) * torch.randn(value.shape, generator=generator)
        for key, value in state_dict(model).items()
        if key.startswith("visual.")
    }


def _write_task(
    root: Path, model: torch.nn.Module, k: int, name: str, adapt: int, test: int
) -> dict[str, Any]:
    checkpoint = root / "experts" / f"{name}.safetensors"
    checkpoint.parent.mkdir(exist_ok=True)
    save_file(expert_state(model, k), checkpoint)
    rng = np.random.default_rng(k)
    for i in range(adapt):
        write_image(root / "data" / name / "adapt" / f"{i:03d}.png", rng)
    for classname in CLASSES[name]:
        for i in range(test):
            write_image(root / "data" / name / "test" / classname / f"{i:03d}.png", rng)
    return {
        "name": name,
        "checkpoint": str(checkpoint),
        "classnames": CLASSES[name],
        "adapt": str(root / "data" / name / "adapt"),
        "test": str(root / "data" / name / "test"),
    }


def write_image(path: Path, rng: np.random.Generator, size: tuple[int, int] = (40, 36)) -> Path:
    """Write an image of coloured noise and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    base = rng.integers(0, 256, size=3)
    noise = rng.normal(0, 40, size=(*size, 3))
    Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8)).save(path)
    return path
