"""Nodes lost during a run: `ray start` nodes on this machine, with two shards of one group.

The head has no worker, so that any other node may be lost.
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
"""Enough that the run is still working when a node is lost."""
EVERY = 10
"""Steps between two states."""
FAST_DETECTION = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "4",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and two nodes with one CPU each."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FAST_DETECTION.items():
            patch.setenv(name, value)
        with ray_nodes(3, head_cpus=0) as nodes:
            yield nodes


class Run:
    """``raymerge merge`` on the cluster, as a separate process."""

    def __init__(self, cluster: Cluster, world: World, output: Path, **settings: Any) -> None:
        self.cluster, self.output = cluster, output
        defaults = {"workers": 2, "shards": 2, "cpus_per_worker": 1, "max_worker_failures": 0}
        data = config_data(
            world,
            output=str(output),
            cluster={**defaults, "address": cluster.head, **settings},
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
        """Return the step of the newest state, 0 if there is none."""
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
    """Return Ray's id of the node, from its raylet's arguments."""
    (argument,) = [word for word in node.raylet.cmdline() if word.startswith("--node_id=")]
    return argument.removeprefix("--node_id=")


@contextmanager
def suspended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Suspend the run, so that it does not finish before the fault."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def test_the_loss_of_a_draining_node_is_a_preemption_and_costs_no_step(
    cluster: Cluster, undisturbed: torch.Tensor, world: World, tmp_path: Path
) -> None:
    """From the announcement on every step is saved. The node is lost before its deadline, which
    counts as a preemption: no worker failure is allowed here."""
    run, drained = Run(cluster, world, tmp_path / "merged"), cluster.nodes[1]
    process = run.start()
    wait_for(run.saved)
    with suspended(process):
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
    """Ray's own process on a node dies, and the worker with it: another node takes over."""
    run = Run(cluster, world, tmp_path / "merged", max_worker_failures=1)
    process = run.start()
    wait_for(run.saved)
    with suspended(process):
        cluster.join(1)
    cluster.nodes[2].raylet.kill()
    run.require(process)
    (incident,) = run.incidents
    assert incident["kind"] == "worker"
    assert torch.equal(run.lambdas, undisturbed)


@pytest.mark.long
def test_a_frozen_node_is_given_up_even_if_it_returns(
    cluster: Cluster, undisturbed: torch.Tensor, world: World, tmp_path: Path
) -> None:
    """As if its network were cut, and restored once the run has moved to another node."""
    run = Run(cluster, world, tmp_path / "merged", max_worker_failures=1, hang_timeout_s=3)
    process = run.start()
    wait_for(run.saved)
    with suspended(process):
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


def test_lost_calls_are_interruptions(
    cluster: Cluster, undisturbed: torch.Tensor, world: World, tmp_path: Path
) -> None:
    """One in fifty of the driver's calls is lost, and one in fifty of the results."""
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
def test_a_full_object_store_has_no_effect(
    cluster: Cluster, undisturbed: torch.Tensor, world: World, tmp_path: Path
) -> None:
    """Requests and results are small enough to be sent with the calls."""
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


def test_without_its_head_a_run_continues_until_ray_ends_it_and_can_be_resumed(
    cluster: Cluster, world: World, tmp_path: Path
) -> None:
    """The last test, because it ends the cluster. Every step is saved once the head is silent, and
    a single process resumes from the saved state."""
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
