"""Workers of ``merge_module`` as Ray actors: no process groups, and each has its own tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from raymerge.config import ClusterConfig
from raymerge.distributed.calls import ACTOR_OPTIONS, Call, StepLimits, ping, wait_for_results
from raymerge.distributed.failures import Budget, WorkerFailure, classify, root_cause
from raymerge.engine.messages import Incident, StepRequest, StepResult
from raymerge.errors import RunError, WorkerLostError


class ModuleActors:
    """One actor for each of ``shares``, made as ``worker(task, share)``; a ``driver.Stepper``.

    A lost one is made again and the step repeated, as far as ``config`` allows; else, and when
    none is ready within ``cluster.start_timeout_s``, it raises
    :class:`~raymerge.errors.WorkerLostError`.
    """

    def __init__(
        self,
        worker: Callable[..., Any],
        task: Any,
        shares: Sequence[Any],
        config: ClusterConfig | None = None,
    ) -> None:
        self.workers = len(shares)
        self.incidents: list[Incident] = []
        self._config = config or ClusterConfig()
        self._limits, self._budget = StepLimits(self._config), Budget(self._config)
        self._shares, self._task = shares, ray.put(task)
        self._remote: Any = ray.remote(num_cpus=1, **ACTOR_OPTIONS)(worker)
        self._actors: dict[int, Any] = {}
        try:
            self._start(range(self.workers))
        except BaseException:
            self.close()
            raise

    def step(self, request: StepRequest) -> list[StepResult]:
        what = f"step {request.step + 1}"
        while True:
            began = time.monotonic()
            answers: dict[int, StepResult] = {}
            calls = {
                rank: Call(actor, actor.step.remote(request))
                for rank, actor in self._actors.items()
            }
            losses = wait_for_results(
                calls, self._limits.for_workers(self.workers), answers.__setitem__
            )
            if not losses:
                self._limits.record(time.monotonic() - began)
                self._budget.reset_interruptions()
                return [answers[rank] for rank in range(self.workers)]
            self._mend(losses, what, began)

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)

    def _mend(self, losses: Mapping[int, WorkerFailure], what: str, began: float) -> None:
        """Make the lost ones again; those that are well need only be asked again."""
        found_out = time.monotonic()
        cause, ranks = root_cause(losses)
        refusal = self._budget.spend(cause.kind)
        if refusal is not None:
            raise WorkerLostError(f"worker {ranks[0]} {cause.reason} during {what} ({refusal})")
        self._start([rank for rank, loss in losses.items() if loss.needs_restart])
        recovered = time.monotonic() - found_out
        self.incidents.append(
            Incident(what, cause.kind, ranks, cause.reason, found_out - began, recovered,
                     self.workers)
        )  # fmt: skip

    def _start(self, ranks: Collection[int]) -> None:
        """Make the actors of these shares, again where one dies on the way, until all answer."""
        deadline = time.monotonic() + self._config.start_timeout_s
        hellos = {self._hire(rank): rank for rank in ranks}
        while hellos:
            left_s = max(0.0, deadline - time.monotonic())
            done, _ = ray.wait(list(hellos), timeout=left_s)
            if not done:
                raise WorkerLostError(
                    f"worker {min(hellos.values())} was not ready within "
                    f"{self._config.start_timeout_s:g} s; lower workers to what the machine holds"
                )
            rank = hellos.pop(done[0])
            try:
                ray.get(done[0])
            except RayError as error:
                self._require_another_start(rank, classify(error))
                hellos[self._hire(rank)] = rank

    def _hire(self, rank: int) -> Any:
        """In place of the one before, if any; its first sign of life."""
        if rank in self._actors:
            ray.kill(self._actors[rank])
        self._actors[rank] = self._remote.remote(self._task, self._shares[rank])
        return ping(self._actors[rank])

    def _require_another_start(self, rank: int, loss: WorkerFailure) -> None:
        refusal = self._budget.spend("start")
        if refusal is not None:
            raise RunError(f"worker {rank} {loss.reason} before it was ready ({refusal})")
