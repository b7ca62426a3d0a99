"""Workers of ``merge_module`` as Ray actors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from raymerge.errors import RaymergeError, RunError, WorkerLostError
from raymerge.messages import Incident, StepRequest, StepResult


class ModuleActors:
    """One actor for each of ``shares``, made as ``worker(task, share)``; a ``driver.Stepper``."""

    def __init__(self, worker: Callable[..., Any], task: Any, shares: Sequence[Any]) -> None:
        self.workers = len(shares)
        self.incidents: Sequence[Incident] = ()
        remote: Any = ray.remote(worker)
        options = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
        held = ray.put(task)
        self._actors = [remote.options(**options).remote(held, share) for share in shares]

    def step(self, request: StepRequest) -> list[StepResult]:
        try:
            return list(ray.get([actor.step.remote(request) for actor in self._actors]))
        except RayTaskError as error:
            if isinstance(error.cause, RaymergeError):
                raise error.cause from None
            raise RunError(f"a worker failed: {str(error).strip().splitlines()[-1]}") from error
        except RayError as error:
            lines = str(error).strip().splitlines()
            raise WorkerLostError(f"a worker died: {lines[0][:80]} … {lines[-1][:160]}") from error

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
