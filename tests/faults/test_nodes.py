"""Nodes lost under a run: `ray start` nodes of this machine, of two workers that share one model.

The head holds no worker, so that any other node may go.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import config_data, read_steps, write_config
from ray_nodes import Cluster, Node, finished, ray_nodes, wait_for
from world import World

pytestmark = [pytest.mark.faults, pytest.mark.slow]

STEPS = 200
"""So many that the run is met at work."""
EVERY = 10
"""Steps between two states."""
QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "4",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes of one each."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK_TO_NOTICE.items():
            patch.setenv(name, value)
        with ray_nodes(3, head_cpus=0) as nodes:
            yield nodes


class Run:
    """``raymerge merge`` on the cluster, as a process of its own."""

    def __init__(self, cluster: Cluster, world: World, output: Path, **settings: Any) -> None:
        self.cluster, self.output = cluster, output
        given = {"workers": 2, "shards": 2, "cpus_per_worker": 1, "max_worker_failures": 0}
        data = config_data(
            world,
            output=str(output),
            cluster={**given, "address": cluster.head, **settings},
            optimizer={"steps": STEPS},
        )
        self.config = write_config(output.with_suffix(".yaml"), data)

    def start(self, *options: object, **env: str) -> subprocess.Popen[str]:
        return self.cluster.start("raymerge", "merge", self.config, *options, **env)

    def to_its_end(self) -> Run:
        self.require(self.start())
        return self

    def require(self, process: subprocess.Popen[str]) -> None:
        done = finished(process)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith("AdaMerging")  # Ray's own words are not among the results
        assert read_steps(self.output / "metrics.jsonl") == list(range(1, STEPS + 1))

    def saved(self) -> int:
        """The newest step whose state is kept; 0 where none is."""
        states = (self.output / "state").glob("step-*")
        return max((int(state.name.removeprefix("step-")) for state in states), default=0)

    @property
    def lambdas(self) -> torch.Tensor:
        return torch.tensor(json.loads((self.output / "lambdas.json").read_text())["values"])

    @property
    def incidents(self) -> list[dict[str, Any]]:
        return list(json.loads((self.output / "results.json").read_text())["incidents"])


@pytest.fixture(scope="module")
def undisturbed(
    cluster: Cluster, world: World, tmp_path_factory: pytest.TempPathFactory
) -> torch.Tensor:
    run = Run(cluster, world, tmp_path_factory.mktemp("undisturbed") / "merged").to_its_end()
    assert run.incidents == []
    return run.lambdas


def node_id(node: Node) -> str:
    """Ray's name of it, as its raylet was given it."""
    (given,) = [word for word in node.raylet.cmdline() if word.startswith("--node_id=")]
    return given.removeprefix("--node_id=")


@contextmanager
def stopped(process: subprocess.Popen[str]) -> Iterator[None]:
    """The run takes no step meanwhile, so that it is not over before its time."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def test_a_drained_node_is_saved_before_and_lost_for_nothing(
    cluster: Cluster, undisturbed: torch.Tensor, world: World, tmp_path: Path
) -> None:
    """It is announced that a node will go: every step is saved from then on. It goes before its
    time: a preemption, though no failure of a worker is allowed."""
    run, drained = Run(cluster, world, tmp_path / "merged"), cluster.nodes[1]
    process = run.start()
    wait_for(run.saved)
    with stopped(process):
        cluster.join(1)
        done = cluster.run(
            *("ray", "drain-node", "--address", cluster.head, "--node-id", node_id(drained)),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
            *("--deadline-remaining-seconds", 600),
        )
        assert done.returncode == 0, done.stderr
    wait_for(lambda: run.saved() % EVERY)
    drained.lose()
    run.require(process)
    (incident,) = run.incidents
    assert incident["kind"] == "preemption"
    assert torch.equal(run.lambdas, undisturbed)


def test_a_lost_raylet_is_a_lost_worker(
    cluster: Cluster, undisturbed: torch.Tensor, world: World, tmp_path: Path
) -> None:
    """Ray's own process on a node dies and takes the worker with it: another node takes over."""
    run = Run(cluster, world, tmp_path / "merged", max_worker_failures=1)
    process = run.start()
    wait_for(run.saved)
    with stopped(process):
        cluster.join(1)
    cluster.nodes[2].raylet.kill()
    run.require(process)
    (incident,) = run.incidents
    assert incident["kind"] == "worker"
    assert torch.equal(run.lambdas, undisturbed)


@pytest.mark.long
def test_a_node_that_falls_silent_is_left_behind_even_when_it_comes_back(
    cluster: Cluster, undisturbed: torch.Tensor, world: World, tmp_path: Path
) -> None:
    """As when its network is cut, and mended once the run has found another node."""
    run = Run(cluster, world, tmp_path / "merged", max_worker_failures=1, hang_timeout_s=3)
    process = run.start()
    wait_for(run.saved)
    with stopped(process):
        cluster.join(1)
    silent = next(node for node in cluster.nodes if node.workers("MergeWorker"))
    silent.freeze()
    then = run.saved()
    wait_for(lambda: run.saved() > then + EVERY)
    silent.thaw()
    run.require(process)
    (incident,) = run.incidents
    assert incident["kind"] == "worker"
    assert torch.equal(run.lambdas, undisturbed)
    wait_for(lambda: not silent.workers("MergeWorker"))


def test_calls_lost_on_their_way_cost_nothing(
    cluster: Cluster, undisturbed: torch.Tensor, world: World, tmp_path: Path
) -> None:
    """Of the driver's calls one in fifty never arrives, and of one in fifty the answer is lost."""
    lost = {"num_failures": 4, "req_failure_prob": 2, "resp_failure_prob": 2}
    run = Run(cluster, world, tmp_path / "merged")
    faults = json.dumps({"CoreWorkerService.grpc_client.PushTask": lost})
    run.require(run.start(RAY_testing_rpc_failure=faults))
    assert {incident["kind"] for incident in run.incidents} == {"interruption"}
    assert torch.equal(run.lambdas, undisturbed)


FILL = """
import ray, sys, time, numpy
ray.init(address=sys.argv[1], logging_level="ERROR")
held = []
for _ in range(12):
    held.append(ray.put(numpy.zeros(12_500_000, numpy.uint8)))
print("full", flush=True)
time.sleep(600)
"""


@pytest.mark.long
def test_an_object_store_that_others_have_filled_is_not_missed(
    cluster: Cluster, undisturbed: torch.Tensor, world: World, tmp_path: Path
) -> None:
    """Requests and results are small: they travel with the calls."""
    hog = cluster.start("python", "-c", FILL, cluster.head)
    try:
        assert hog.stdout is not None
        assert hog.stdout.readline() == "full\n", hog.communicate()
        run = Run(cluster, world, tmp_path / "merged").to_its_end()
    finally:
        hog.kill()
        hog.communicate()
    assert run.incidents == []
    assert torch.equal(run.lambdas, undisturbed)


def test_a_run_whose_head_is_lost_goes_on_until_ray_ends_it_and_is_resumed_elsewhere(
    cluster: Cluster, world: World, tmp_path: Path
) -> None:
    """Last of all, for the cluster is gone then. Every step is saved once the head says nothing;
    one process goes on with what is kept."""
    output = tmp_path / "merged"
    run = Run(cluster, world, output)
    process = run.start("-o", "optimizer.steps=100000", RAY_gcs_rpc_server_reconnect_timeout_s="25")
    wait_for(run.saved)
    lost_at = run.saved()
    cluster.nodes[0].lose()
    done = finished(process)
    for node in cluster.nodes[1:]:
        node.lose()
    assert done.returncode == 1
    assert "the cluster's head has not answered" in done.stderr
    kept, steps = run.saved(), read_steps(output / "metrics.jsonl")
    assert kept > lost_at + 10 * EVERY
    assert kept in (steps[-1], steps[-1] - 1)

    alone = {"workers": 0, "shards": 1, "address": None}
    end = f"optimizer.steps={kept + 20}"
    resumed = Run(cluster, world, output, **alone)
    undisturbed = Run(cluster, world, tmp_path / "undisturbed", **alone)
    for process in (resumed.start("--resume", "-o", end), undisturbed.start("-o", end)):
        done = finished(process)
        assert done.returncode == 0, done.stderr
    assert read_steps(output / "metrics.jsonl") == list(range(1, kept + 21))
    assert (resumed.lambdas - undisturbed.lambdas).abs().max() < 1e-4
