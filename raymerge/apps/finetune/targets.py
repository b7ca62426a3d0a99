"""The encoders to train: one expert per task, the joint reference, or both.

A target's fingerprint covers everything that decides its weights, so a finished or half-trained
file is only reused for the same config and images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from raymerge.apps.finetune.images import steps_per_epoch
from raymerge.config import Config, FinetuneConfig
from raymerge.data.folder import quote_names
from raymerge.data.images import ImageList
from raymerge.data.sources import labelled_images
from raymerge.data.sources.urls import local_reference
from raymerge.errors import DataError, UserError
from raymerge.models.checkpoints.digests import sha256
from raymerge.models.checkpoints.locate import locate
from raymerge.runs.state import SavedTensors, StateStore

FINGERPRINT = "raymerge_fingerprint"
"""Metadata key in a finished target's file."""
_KEEP_STATES = 2


@dataclass(frozen=True)
class Target:
    """One encoder to train. ``place``: ``experts/<task>`` or ``joint``, its path in the output."""

    place: str
    tasks: tuple[int, ...]
    steps: int
    fingerprint: str
    output: Path

    @property
    def name(self) -> str:
        return self.place.rpartition("/")[2]

    @property
    def is_joint(self) -> bool:
        return self.place == "joint"

    @property
    def weights(self) -> Path:
        return self.output / f"{self.place}.safetensors"

    @property
    def metrics(self) -> Path:
        return self.output / f"{self.place}.metrics.jsonl"

    def states(self) -> StateStore[SavedTensors]:
        """Return the store of its weights and moments; a run's targets share its attempts."""
        attempts = self.output / "state"
        identity = {"fingerprint": self.fingerprint}
        return StateStore(
            attempts / self.place, identity, _KEEP_STATES, lambda saved: saved, lambda saved: saved,
            attempts,
        )  # fmt: skip

    def is_finished(self) -> bool:
        """Return True if its file exists.

        Raises :class:`UserError` if the file cannot be read or was trained with another config.
        """
        if not self.weights.exists():
            return False
        try:
            with safe_open(self.weights, "pt") as file:
                fingerprint = (file.metadata() or {}).get(FINGERPRINT)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.weights}: cannot be read ({error}); remove it") from error
        if fingerprint != self.fingerprint:
            raise UserError(
                f"{self.weights}: was trained with another config or on other images; resume with "
                "those that it was trained with, or choose another output folder"
            )
        return True


def recipe_of(config: Config) -> FinetuneConfig:
    return config.finetune or FinetuneConfig()


def training_images(config: Config) -> dict[int, ImageList]:
    """Return the training images by task index, for the tasks that have any.

    Raises :class:`DataError` if no task has any, or a task has neither training nor test images.
    """
    image_lists = {}
    for k, task in enumerate(config.tasks):
        if task.train is not None:
            # A test set may lack a class, but an expert must see each.
            images = labelled_images(task.train, task.classnames, f"tasks[{k}].train")
            image_lists[k] = images
            seen = set(images.labels)
            empty = [name for c, name in enumerate(task.classnames) if c not in seen]
            if empty:
                raise DataError(
                    f"tasks[{k}].train: {task.train}: no image of {quote_names(empty)}, which the "
                    "expert would never see; add some, or remove the class from classnames"
                )
        elif task.test is None:
            raise DataError(
                f"tasks[{k}] ({task.name}): no train folder; name its labelled images in "
                f"tasks[{k}].train, one folder per class"
            )
    if not image_lists:
        raise DataError(
            "no task has a train folder; name labelled images in tasks[].train, one folder per "
            "class"
        )
    return image_lists


def make_targets(
    config: Config, image_lists: Mapping[int, ImageList], output: Path
) -> list[Target]:
    """Return the targets in the order of the tasks, the joint reference last.

    Raises :class:`UserError` if the number of steps is missing or less than the warm-up.
    """
    recipe = recipe_of(config)
    steps = {k: _expert_steps(config, k, len(images)) for k, images in image_lists.items()}
    targets = []
    if recipe.targets != "joint":
        for k in image_lists:
            place = f"experts/{config.tasks[k].name}"
            targets.append(_target(config, image_lists, place, (k,), steps[k], output))
    if recipe.targets != "experts":
        longest = recipe.joint_steps or max(filter(None, steps.values()), default=None)
        targets.append(_target(config, image_lists, "joint", tuple(image_lists), longest, output))
    return targets


def _expert_steps(config: Config, task: int, images: int) -> int | None:
    recipe = recipe_of(config)
    return recipe.steps_for(config.tasks[task].name, steps_per_epoch(images, recipe.batch_size))


def _target(
    config: Config,
    image_lists: Mapping[int, ImageList],
    place: str,
    tasks: tuple[int, ...],
    steps: int | None,
    output: Path,
) -> Target:
    name, warmup = place.rpartition("/")[2], recipe_of(config).warmup_steps
    if steps is None:
        raise UserError(f"finetune.steps: neither {name} nor default is given; add one of them")
    if warmup >= steps:
        raise UserError(
            f"finetune.warmup_steps: {warmup}, but {place} takes {steps} steps in all, so its rate "
            "would never reach finetune.lr; lower it, or train for longer"
        )
    images = [image_lists[k] for k in tasks]
    return Target(place, tasks, steps, _fingerprint(config, tasks, images, steps), output)


def _fingerprint(
    config: Config, tasks: Sequence[int], images: Sequence[ImageList], steps: int
) -> str:
    """Return the SHA-256 of everything that decides the weights.

    Left out are the cluster, the location of files and the other targets.
    """
    recipe = recipe_of(config).model_dump(mode="json")
    for key in ("targets", "epochs", "steps", "joint_steps", "state_every_steps"):
        del recipe[key]
    data = {
        "model": config.model.model_dump(mode="json"),
        "recipe": {**recipe, "steps": steps},
        "precision": config.precision,
        "seed": config.seed,
        "tasks": [
            _task_identity(config, k, each) for k, each in zip(tasks, images, strict=True)
        ],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _task_identity(config: Config, index: int, images: ImageList) -> dict[str, Any]:
    task = config.tasks[index]
    names = images.keys(local_reference(str(task.train)))
    head = {} if task.head is None else {"head": sha256(locate(task.head))}
    return {
        **head,
        "name": task.name,
        "classnames": task.classnames,
        "templates": task.templates,
        "images": hashlib.sha256("\n".join(names).encode()).hexdigest(),
    }
