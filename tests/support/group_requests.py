"""Requests to a group of workers, for the tests' tiny world."""

from __future__ import annotations

from world import World

from raymerge.engine.messages import LoadRequest
from raymerge.engine.worker.clip_source import ClipSource
from raymerge.merging.method import Objective
from raymerge.models.pretrained import open_pretrained
from raymerge.models.resolve import resolve_model


def model_source(world: World) -> ClipSource:
    config = world.parse()
    return ClipSource(config.model, config.tasks)


def load_request(world: World, **changes: object) -> LoadRequest:
    settings = {
        "models": tuple(task.checkpoint for task in world.parse().tasks),
        "granularity": "tensor",
        "objective": Objective(),
        "slots_per_step": 4,
        "batches": 1,
        "steps": 5,
        "seed": 1,
    }
    return LoadRequest(**{**settings, **changes})  # type: ignore[arg-type]


def layer_names(world: World) -> tuple[str, ...]:
    pretrained, _ = open_pretrained(resolve_model(world.parse().model))
    return pretrained.layout.names
