"""Actors of merge_module that die, freeze or do not start; real processes, no model."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from ray import cloudpickle

from raymerge.config import ClusterConfig
from raymerge.distributed.module_group import ModuleActors
from raymerge.engine.messages import Heartbeat, StepRequest, StepResult
from raymerge.errors import RunError, WorkerLostError

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("local_ray")]

Fault = tuple[int, int | Literal["start"], Literal["kill", "freeze", "raise"]]
"""(rank, step, what befalls it there)."""


class Fragile:
    """Adds its rank to λ; a fault befalls it as often as ``marks`` has room."""

    def __init__(self, task: tuple[list[Fault], str, int], rank: int) -> None:
        self._faults, self._marks, self._times = task
        self._rank = rank
        self._meet("start")

    def _meet(self, step: int | str) -> None:
        for rank, at, kind in self._faults:
            if (rank, at) == (self._rank, step) and self._first():
                if kind == "raise":
                    raise ValueError("of the user's own")
                os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)

    def _first(self) -> bool:
        for attempt in range(self._times):
            try:
                (Path(self._marks) / f"{self._rank}-{attempt}").touch(exist_ok=False)
                return True
            except FileExistsError:
                continue
        return False

    def ping(self) -> Heartbeat:
        return Heartbeat("step", 0.0)

    def step(self, request: StepRequest) -> StepResult:
        self._meet(request.step)
        one = np.ones(1)
        gradient = request.lambdas + self._rank
        return StepResult(request.step, self._rank, 0, gradient, one, one, one[None])


def _gradients(group: ModuleActors, steps: int = 3) -> list[np.ndarray]:
    requests = [StepRequest(step, np.full((1, 2), float(step))) for step in range(steps)]
    return [np.stack([r.gradient for r in group.step(request)]) for request in requests]


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not know this folder
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def _group(faults: list[Fault], marks: Path, times: int = 1, **cluster: Any) -> ModuleActors:
    marks.mkdir()
    given = ClusterConfig(**{"hang_timeout_s": 5.0, **cluster})
    return ModuleActors(Fragile, (faults, str(marks), times), [0, 1, 2], given)


@pytest.mark.parametrize("fault", [(1, 1, "kill"), (0, 2, "freeze"), (2, "start", "kill")], ids=str)
def test_a_lost_one_is_made_again_and_its_step_repeated(fault: Fault, tmp_path: Path) -> None:
    calm, struck = _group([], tmp_path / "calm"), _group([fault], tmp_path / "marks")
    try:
        assert np.array_equal(_gradients(struck), _gradients(calm))
        assert len(list((tmp_path / "marks").iterdir())) == 1
        told = [(incident.kind, incident.ranks) for incident in struck.incidents]
        assert told == ([] if fault[1] == "start" else [("worker", (fault[0],))])
    finally:
        calm.close()
        struck.close()


def test_spent_budgets_end_it_with_their_names(tmp_path: Path) -> None:
    group = _group([(1, 1, "kill")], tmp_path / "a", times=2, max_worker_failures=1)
    try:
        with pytest.raises(WorkerLostError, match=r"worker 1 died during step 2 \(failure 2, .* 1"):
            _gradients(group)
    finally:
        group.close()
    with pytest.raises(RunError, match=r"worker 0 died before it was ready \(failure 2, "):
        _group([(0, "start", "kill")], tmp_path / "b", times=2, max_start_failures=1)


def test_what_the_user_raised_is_no_loss(tmp_path: Path) -> None:
    group = _group([(0, 1, "raise")], tmp_path / "marks")
    try:
        with pytest.raises(RunError, match="a worker failed: ValueError: of the user's own"):
            _gradients(group)
        assert group.incidents == []
    finally:
        group.close()
