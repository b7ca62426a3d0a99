"""A world for training: the tests' tiny model, and images whose colour is their class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from world import write_model

from raymerge.config import Config, parse_config

CLASSES = {"colour": ["red", "green", "blue"], "shade": ["dark", "light"], "tone": ["warm", "cold"]}
_COLOURS = {
    "red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220),
    "dark": (40, 40, 40), "light": (220, 220, 220), "warm": (240, 160, 60), "cold": (60, 160, 240),
}  # fmt: skip


@dataclass(frozen=True)
class TrainingWorld:
    root: Path

    def data(self, **changes: Any) -> dict[str, Any]:
        """The config as a plain dict; ``finetune`` keys are merged over short ones."""
        recipe = {"steps": 6, "warmup_steps": 1, "batch_size": 4, "lr": 1e-3}
        recipe |= {"state_every_steps": 2, **changes.pop("finetune", {})}
        return {
            "model": "local-dir:pretrained",
            "tasks": [
                {
                    "name": name,
                    "classnames": classes,
                    "train": f"data/{name}/train",
                    "test": f"data/{name}/test",
                }
                for name, classes in CLASSES.items()
            ],
            "cluster": {"workers": 0, "cpus_per_worker": 1},
            "finetune": {key: value for key, value in recipe.items() if value is not None},
            **changes,
        }

    def parse(self, output: Path, **changes: Any) -> Config:
        return parse_config({**self.data(**changes), "output": str(output)}, root=self.root)


def make_training_world(root: Path, train: int = 5, test: int = 3) -> TrainingWorld:
    write_model(root / "pretrained")
    rng = np.random.default_rng(0)
    for name, classes in CLASSES.items():
        for split, count in (("train", train), ("test", test)):
            for classname in classes:
                for i in range(count):
                    path = root / "data" / name / split / classname / f"{i:03d}.png"
                    write_colour(path, _COLOURS[classname], rng)
    return TrainingWorld(root)


def write_colour(path: Path, colour: tuple[int, ...], rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = rng.normal(0, 25, size=(36, 40, 3))
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)
