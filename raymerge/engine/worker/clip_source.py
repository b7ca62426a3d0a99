"""The source of a served CLIP model: names only, so that naming one imports no open_clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raymerge.config import ModelConfig, TaskConfig
from raymerge.engine.messages import WorkerSpec
from raymerge.engine.worker.served import Pinned, ServedModel


@dataclass(frozen=True)
class ClipSource:
    """The CLIP model and the tasks of a config."""

    model: ModelConfig
    tasks: tuple[TaskConfig, ...]

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    def serve(self, spec: WorkerSpec, pinned: Pinned) -> ServedModel:
        from raymerge.engine.worker.clip_model import ClipModel

        return ClipModel(self.model, self.tasks, spec, pinned)

    def store_parts(self, put: Callable[[Any], Callable[[], Any]]) -> ClipSource:
        """Return this source itself: it contains only names."""
        return self
