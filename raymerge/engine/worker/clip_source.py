"""The source of a served CLIP model: names only, so that naming one imports no open_clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from raymerge.config import ModelConfig, TaskConfig
from raymerge.engine.messages import WorkerSpec
from raymerge.engine.worker.served import Pinned, ServedModel
from raymerge.files.urls import is_remote


@dataclass(frozen=True)
class ClipSource:
    """The CLIP model and the tasks of a config."""

    model: ModelConfig
    tasks: tuple[TaskConfig, ...]

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    def inputs(self) -> Mapping[str, Callable[[], str]]:
        """Return a function for the digest of the pretrained model, and of each task's checkpoint,
        head and images.

        Files behind URLs and on hubs are left out: each node fetches them for itself.
        """
        from raymerge.engine.worker.clip_inputs import images_digest, model_digest, weights_digest

        digests: dict[str, Callable[[], str]] = {}
        if _is_local(self.model.reference):
            digests["model"] = partial(model_digest, self.model)
        for k, task in enumerate(self.tasks):
            for key in ("checkpoint", "head"):
                reference = getattr(task, key)
                if reference is not None and _is_local(reference):
                    digests[f"tasks[{k}].{key}"] = partial(weights_digest, reference)
            for key in ("adapt", "test"):
                reference = getattr(task, key)
                if reference is not None and _is_local(reference):
                    where = f"tasks[{k}].{key}"
                    digests[where] = partial(images_digest, reference, where)
        return digests

    def serve(self, spec: WorkerSpec, pinned: Pinned) -> ServedModel:
        from raymerge.engine.worker.clip_model import ClipModel

        return ClipModel(self.model, self.tasks, spec, pinned)

    def store_parts(self, put: Callable[[Any], Callable[[], Any]]) -> ClipSource:
        """Return this source itself: it contains only names."""
        return self


def _is_local(reference: str) -> bool:
    """Return whether a reference is a path; a pretrained tag of open_clip's has no slash."""
    place = reference.removeprefix("local-dir:")
    schemes = ("hf-hub:", "hf:", "torchvision:")
    return "/" in place and not place.startswith(schemes) and not is_remote(place)
