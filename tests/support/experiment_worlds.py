"""Experiments on the tiny world, in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from world import World

from raymerge.apps.experiments.bench import Bench, Changes

STEPS: Changes = {"method": {"name": "adamerging"}, "optimizer": {"steps": 2, "batch_size": 4}}
ARITHMETIC: Changes = {"method": {"name": "task_arithmetic"}}


def bench(world: World, output: Path, methods: Mapping[str, Changes] | None = None) -> Bench:
    return Bench(world.parse(), output, methods)


def write(folder: Path, world: World, experiment: Mapping[str, Any], **changes: Any) -> Path:
    """Write an experiment's YAML over the world's config, both in ``folder``."""
    world.write(folder / "base.yaml")
    path = folder / "experiment.yaml"
    data = {"experiment": dict(experiment), "base": "base.yaml", "output": "out", **changes}
    path.write_text(yaml.safe_dump(data))
    return path
