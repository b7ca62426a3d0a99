"""Ray workers give the λ of the in-process loop for any W, S, G; failures are clear errors."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from group_requests import layer_names, load_request, model_source
from world import World

from raymerge.config import ClusterConfig
from raymerge.distributed.actor_group import ActorGroup
from raymerge.distributed.calls import is_idle
from raymerge.distributed.placement import Placement
from raymerge.engine.driver.groups import LocalGroup
from raymerge.engine.messages import EvaluateRequest, StepRequest, StepResult, WorkerSpec
from raymerge.errors import RunError, UserError, WorkerLostError
from raymerge.merging.layout import CELL
from raymerge.runs.merge import merge

pytestmark = pytest.mark.usefixtures("local_ray")

STEPS = 50
TOLERANCE = 1e-6  # on λ after 50 steps; sums of float32 gradients differ in their order


def _group(world: World, workers: int, shards: int = 1, **config: float) -> ActorGroup:
    return ActorGroup(
        model_source(world),
        WorkerSpec(),
        Placement(workers, shards, 1, 0.0),
        ClusterConfig(**config),
    )


def _pid(group: ActorGroup, rank: int) -> int:
    location = group._groups.workers[rank].location
    assert location is not None
    return location.pid


@pytest.fixture(scope="module")
def local_lambdas(world: World, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    output = tmp_path_factory.mktemp("local") / "out"
    result = merge(world.parse(output, optimizer={"steps": STEPS}))
    assert result.lambdas is not None
    return result.lambdas


@pytest.mark.parametrize(("workers", "shards"), [(1, 1), (2, 1), (3, 1), (2, 2), (4, 2), (4, 4)])
def test_lambda_does_not_depend_on_workers_shards_or_groups(
    world: World, local_lambdas: torch.Tensor, tmp_path: object, workers: int, shards: int
) -> None:
    config = world.parse(
        tmp_path / "out",  # type: ignore[operator]
        optimizer={"steps": STEPS},
        cluster={"workers": workers, "shards": shards, "cpus_per_worker": 1},
    )
    result = merge(config)
    assert result.lambdas is not None
    assert (result.lambdas - local_lambdas).abs().max() < TOLERANCE
    assert (local_lambdas - 0.3).abs().max() > 1e-2  # λ moved: the comparison says something


def test_vectors_in_bfloat16_give_the_same_lambda_on_shards_too(
    world: World, tmp_path: Path
) -> None:
    lambdas = []
    for name, cluster in (("one", {"workers": 0}), ("two", {"workers": 2, "shards": 2})):
        config = world.parse(
            tmp_path / name,
            optimizer={"steps": 10},
            vectors={"dtype": "bfloat16"},
            cluster={**cluster, "cpus_per_worker": 1},
        )
        lambdas.append(merge(config).lambdas)
    assert (lambdas[0] - lambdas[1]).abs().max() < TOLERANCE
    assert (lambdas[0] - 0.3).abs().max() > 1e-2


def test_a_repeated_sharded_run_is_bit_identical(world: World) -> None:
    lambdas = np.full((4, len(layer_names(world))), 0.3)
    gradients = []
    for _ in range(2):
        group = _group(world, 2, 2)
        try:
            group.load(load_request(world))
            results = group.step(StepRequest(0, lambdas))
        finally:
            group.close()
        gradients.append(np.stack([r.gradient for r in results]))
    assert np.array_equal(gradients[0], gradients[1])


def test_vectors_are_split_evenly_and_every_task_is_loaded(world: World) -> None:
    local = LocalGroup(model_source(world), WorkerSpec()).load(load_request(world))[0]
    group = _group(world, 2, 2)
    try:
        reports = group.load(load_request(world))
    finally:
        group.close()
    assert [report.rank for report in reports] == [0, 1]
    cells = local.vector_bytes // (4 * 4 * CELL)
    assert [r.vector_bytes for r in reports] == [4 * 4 * CELL * math.ceil(cells / 2)] * 2
    assert {task for report in reports for task in report.tasks} == set(world.parse().task_names)


def test_steps_are_idempotent_and_evaluation_does_not_depend_on_workers(world: World) -> None:
    checkpoints = {task.name: task.checkpoint for task in world.parse().tasks}
    request = EvaluateRequest(checkpoints)
    local = LocalGroup(model_source(world), WorkerSpec()).evaluate(request)
    group = _group(world, 3)
    try:
        group.load(load_request(world))
        step = StepRequest(3, np.full((4, len(layer_names(world))), 0.4))
        first, _, again = (
            group.step(step),
            group.step(StepRequest(4, step.lambdas)),
            group.step(step),
        )
        remote = group.evaluate(request)
    finally:
        group.close()
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.gradient, b.gradient)
    assert sorted((s.task, s.chunk, s.correct, s.examples) for s in remote) == sorted(
        (s.task, s.chunk, s.correct, s.examples) for s in local
    )


@pytest.mark.parametrize(("workers", "shards"), [(2, 1), (2, 2)])
def test_a_killed_worker_is_a_clear_error_within_seconds(
    world: World, workers: int, shards: int
) -> None:
    group = _group(world, workers, shards, max_worker_failures=0)
    try:
        group.load(load_request(world))
        lambdas = np.full((4, len(layer_names(world))), 0.3)
        group.step(StepRequest(0, lambdas))
        os.kill(_pid(group, 1), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(WorkerLostError, match=r"died during step 2 .*--resume"):
            group.step(StepRequest(1, lambdas))
        assert time.monotonic() - began < 20
    finally:
        group.close()


def test_a_frozen_worker_is_named_after_the_deadline(world: World) -> None:
    group = _group(world, 2, hang_timeout_s=2.0, max_worker_failures=0)
    try:
        group.load(load_request(world))
        pid = _pid(group, 1)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(WorkerLostError, match=r"worker 1 of 2 .*cluster\.hang_timeout_s"):
                group.step(StepRequest(0, np.full((4, len(layer_names(world))), 0.3)))
        finally:
            os.kill(pid, signal.SIGCONT)
    finally:
        group.close()


def test_a_worker_without_a_heartbeat_does_not_count_as_idle(world: World) -> None:
    group = _group(world, 1)
    try:
        actor = group._groups.workers[0].actor
        assert is_idle(actor)
        os.kill(_pid(group, 0), signal.SIGSTOP)
        try:
            assert not is_idle(actor)
        finally:
            os.kill(_pid(group, 0), signal.SIGCONT)
        assert is_idle(actor)
    finally:
        group.close()


def test_a_workers_own_error_is_raised_unchanged(world: World, tmp_path: object) -> None:
    missing = (str(tmp_path) + "/gone.pt",)
    group = _group(world, 1)
    try:
        with pytest.raises(UserError, match=r"gone\.pt: no such file"):
            group.load(load_request(world, models=missing))
    finally:
        group.close()


def test_no_room_is_a_clear_error(world: World) -> None:
    with pytest.raises(RunError, match=r"found no room for 1 workers with 64 CPUs"):
        ActorGroup(
            model_source(world),
            WorkerSpec(),
            Placement(1, 1, 64, 0.0),
            ClusterConfig(start_timeout_s=1.0),
        )


def test_close_frees_every_slot(world: World) -> None:
    import ray

    group = _group(world, 1, 1)
    assert ray.available_resources()["CPU"] == 5
    group.close()
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < 6 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 6


def test_a_result_of_an_abandoned_generation_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = _group(world, 1)
    try:
        lambdas = np.zeros((1, 1))
        group._groups.generation = 2
        stale = StepResult(0, 0, 1, lambdas, np.zeros(1), np.zeros(1), np.zeros((1, 2)))

        def request(method, workers, argument, limits, on_result):
            on_result(workers[0], stale)

        monkeypatch.setattr(group._pool, "request", request)
        with pytest.raises(RunError, match=r"step 1: worker 0 of 1 sent a .* of .* 1, .* is 2"):
            group.step(StepRequest(0, lambdas))
    finally:
        group.close()
