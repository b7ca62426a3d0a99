"""Faults injected into real workers: the run recovers by itself, with the same gradients.

They are equal to the bit if all workers are restarted, and else up to the order of float32 sums.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from group_requests import layer_names, load_request, model_source
from injection import STEP_PHASES, Fault, count_injected, faulty_worker
from world import World

from raymerge.config import ClusterConfig
from raymerge.distributed.actor_group import ActorGroup
from raymerge.distributed.placement import Placement
from raymerge.distributed.placement_groups import WorkerSlot
from raymerge.engine.messages import EvaluateRequest, StepRequest, WorkerSpec
from raymerge.errors import WorkerLostError

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("local_ray")]

STEPS, AT = 3, 1
Gradients = list[np.ndarray]


class Bench:
    """Makes groups of workers that fail as planned, and the gradients of some steps."""

    def __init__(self, world: World, marks: Path) -> None:
        self.world, self.marks = world, marks
        self.lambdas = np.full((4, len(layer_names(world))), 0.3)

    def group(
        self, workers: int, shards: int, faults: Sequence[Fault] = (), **cluster: float
    ) -> ActorGroup:
        config = ClusterConfig(**{"hang_timeout_s": 3.0, **cluster})  # type: ignore[arg-type]
        source, worker = model_source(self.world), faulty_worker(faults, self.marks)
        return ActorGroup(
            source, WorkerSpec(), Placement(workers, shards, 1, 0.0), config, worker=worker
        )

    def load(self, group: ActorGroup) -> None:
        group.load(load_request(self.world, steps=STEPS))

    def step(self, group: ActorGroup, step: int) -> np.ndarray:
        results = group.step(StepRequest(step, self.lambdas))
        return np.sum([result.gradient for result in results], axis=0)

    def run(self, group: ActorGroup) -> Gradients:
        self.load(group)
        return [self.step(group, step) for step in range(STEPS)]


@pytest.fixture
def bench(world: World, tmp_path: Path) -> Bench:
    return Bench(world, tmp_path / "marks")


@pytest.fixture(scope="module")
def undisturbed(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, int], Gradients]:
    out = {}
    for workers, shards in ((2, 1), (2, 2)):
        bench = Bench(world, tmp_path_factory.mktemp("marks"))
        group = bench.group(workers, shards)
        try:
            out[workers, shards] = bench.run(group)
        finally:
            group.close()
    return out


CASES = [
    *((2, 2, Fault("kill", rank % 2, phase, AT)) for rank, phase in enumerate(STEP_PHASES)),
    (2, 2, Fault("kill", 0, "load")),
    (2, 2, Fault("kill", 1, "join")),
    (2, 2, Fault("freeze", 0, "gather", AT)),
    (2, 2, Fault("break", 1, "reduce", AT)),
    (2, 1, Fault("exit", 0, "compute", AT)),
]


def _case(workers: int, shards: int, fault: Fault) -> Any:
    often = fault.phase in ("merge", "gather", "load") or fault.kind == "break"
    name = f"{workers}x{shards}-{fault.name}"
    return pytest.param(workers, shards, fault, id=name, marks=[] if often else [pytest.mark.long])


@pytest.mark.parametrize(("workers", "shards", "fault"), [_case(*case) for case in CASES])
def test_the_step_is_replayed_to_the_bit(
    bench: Bench,
    undisturbed: dict[tuple[int, int], Gradients],
    workers: int,
    shards: int,
    fault: Fault,
) -> None:
    group = bench.group(workers, shards, [fault])
    try:
        gradients = bench.run(group)
        incidents = group.incidents
    finally:
        group.close()
    assert count_injected(bench.marks) == 1
    for mine, theirs in zip(gradients, undisturbed[workers, shards], strict=True):
        assert np.array_equal(mine, theirs)
    assert [incident.workers for incident in incidents] == [workers]
    broken = fault.kind == "break"
    assert incidents[0].kind == ("interruption" if broken else "worker")
    assert incidents[0].ranks == (fault.rank,) or broken


def test_the_others_share_the_work_until_a_lost_worker_is_restarted(
    bench: Bench, undisturbed: dict[tuple[int, int], Gradients]
) -> None:
    """``blocker`` stands for other work, which leaves no room for the lost worker until it ends."""
    import ray

    group = bench.group(2, 2, replace_timeout_s=1.0, min_workers=1)
    blocker = ray.util.placement_group([{"CPU": 1}] * 4)
    try:
        bench.load(group)
        assert blocker.wait(60)
        first = bench.step(group, 0)
        lost = group._groups.workers[1]
        assert lost.location is not None
        lost.slot = WorkerSlot(1, 0, ray.util.placement_group([{"CPU": 1}]))
        os.kill(lost.location.pid, signal.SIGKILL)
        alone = bench.step(group, 1)
        assert group.workers == 1
        assert [incident.workers for incident in group.incidents] == [1]
        ray.util.remove_placement_group(blocker)
        deadline = time.monotonic() + 60
        while group.workers < 2 and time.monotonic() < deadline:
            restarted = bench.step(group, 2)
        assert group.workers == 2
    finally:
        group.close()
        ray.util.remove_placement_group(blocker)
    expected = undisturbed[2, 2]
    assert np.array_equal(first, expected[0])
    assert np.allclose(alone, expected[1], rtol=1e-4, atol=1e-7)
    assert np.array_equal(restarted, expected[2])


def test_a_spent_budget_ends_the_run_and_is_named(bench: Bench) -> None:
    faults = [Fault("kill", 1, "compute", AT, times=2)]
    group = bench.group(2, 1, faults, max_worker_failures=1)
    try:
        with pytest.raises(
            WorkerLostError, match=r"worker 1 of 2 died during step 2 \(failure 2, .*_failures is 1"
        ):
            bench.run(group)
        assert len(group.incidents) == 1
    finally:
        group.close()


def test_after_a_loss_in_evaluation_only_the_missing_chunks_are_scored_again(bench: Bench) -> None:
    checkpoints = {task.name: str(task.checkpoint) for task in bench.world.parse().tasks}
    request = EvaluateRequest(checkpoints)
    scores = []
    for faults in ([], [Fault("kill", 1, "evaluate")]):
        group = bench.group(2, 1, faults)
        try:
            scores.append(group.evaluate(request))
        finally:
            group.close()
    assert count_injected(bench.marks) == 1
    assert scores[0] == scores[1]
