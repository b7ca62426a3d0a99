"""Several hosts with addresses of their own, whose links are cut; two shards of one group.

The driver is on the head's host, which has no worker. What holds on one machine with network
namespaces need not hold on every network; it is as near as a test comes.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import config_data, write_config
from hosts import Hosts, hosts, stop, why_not
from ray_nodes import finished, wait_for
from world import World

REASON = why_not()
pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.netns,
    pytest.mark.skipif(bool(REASON), reason=REASON),
]
STEPS = 400


@pytest.fixture(scope="module")
def net() -> Iterator[Hosts]:
    """A head without CPUs, two hosts with a worker's CPU each, and a spare one."""
    with hosts(4) as made:
        for number, host in enumerate(made.hosts):
            made.start_ray(host, cpus=0 if number == 0 else 1)
        yield made


def _config(net: Hosts, world: World, output: Path, **changes: Any) -> Path:
    cluster = {"workers": 2, "shards": 2, "cpus_per_worker": 1, "address": net.head}
    data = config_data(world, output=str(output), optimizer={"steps": STEPS}, **changes)
    data["cluster"] = {**cluster, **changes.get("cluster", {})}
    return write_config(output.with_suffix(".yaml"), data)


def _lambdas(output: Path) -> torch.Tensor:
    return torch.tensor(json.loads((output / "lambdas.json").read_text())["values"])


def _steps(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(net: Hosts, world: World, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    output = tmp_path_factory.mktemp("undisturbed") / "merged"
    done = net.run("raymerge", "merge", _config(net, world, output))
    assert done.returncode == 0, done.stderr
    return _lambdas(output)


def _merge_with_a_cut(
    net: Hosts, world: World, output: Path, seconds: float | None
) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    """Cut the link of a host with a worker during the steps, for good or for some seconds."""
    process = net.start("raymerge", "merge", _config(net, world, output))
    wait_for(lambda: _steps(output) > 20)
    victim = _busy_hosts(net)[0]
    host = next(each for each in net.hosts if each.address == victim)
    host.cut()
    try:
        if seconds is not None:
            time.sleep(seconds)
            host.mend()
        done = finished(process)
    finally:
        host.mend()
        stop(host)  # Ray ends a node that it has given up, once it is heard again
        net.start_ray(host, cpus=1)
    assert done.returncode == 0, done.stderr
    results = json.loads((output / "results.json").read_text())
    return results, done


def _busy_hosts(net: Hosts) -> list[str]:
    """Return the addresses of the hosts that run a worker, by the names of their processes."""
    busy = []
    for host in net.hosts:
        inside = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True)
        names = [
            Path(f"/proc/{pid}/cmdline").read_bytes()
            for pid in inside.stdout.split()
            if Path(f"/proc/{pid}/cmdline").exists()
        ]
        if any(name.startswith(b"ray::MergeWorker") for name in names):
            busy.append(host.address)
    return busy


def test_a_link_that_is_cut_for_good_is_noticed_within_seconds(
    net: Hosts, world: World, tmp_path: Path, undisturbed: torch.Tensor
) -> None:
    """The spare host takes over, no healthy worker is charged, and λ is the same to the bit."""
    results, _ = _merge_with_a_cut(net, world, tmp_path / "merged", None)
    (incident,) = results["incidents"]
    assert (incident["kind"], len(incident["ranks"])) == ("worker", 1)
    assert "cannot be reached" in incident["reason"]
    assert incident["detect_s"] < 40  # 8.5 s when measured; a minute before
    assert torch.equal(_lambdas(tmp_path / "merged"), undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("seconds", [2.0, 5.0, 30.0])
def test_a_link_that_comes_back_costs_no_bit(
    net: Hosts, world: World, tmp_path: Path, undisturbed: torch.Tensor, seconds: float
) -> None:
    _merge_with_a_cut(net, world, tmp_path / "merged", seconds)
    assert torch.equal(_lambdas(tmp_path / "merged"), undisturbed)


@pytest.mark.long
def test_a_slow_and_lossy_link_is_no_failure(
    net: Hosts, world: World, tmp_path: Path, undisturbed: torch.Tensor
) -> None:
    try:
        net.hosts[1].impair("delay", "5ms", "loss", "1%")
    except (AssertionError, FileNotFoundError) as error:
        pytest.skip(f"this kernel has no netem: {error}")
    try:
        output = tmp_path / "merged"
        done = net.run("raymerge", "merge", _config(net, world, output))
    finally:
        net.hosts[1].impair()
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "results.json").read_text())["incidents"] == []
    assert torch.equal(_lambdas(output), undisturbed)


OTHER_TORCH = """
import importlib.metadata as metadata
own = metadata.version
metadata.version = lambda package: "0.1" if package == "torch" else own(package)
"""


def test_a_node_with_another_library_is_named_before_the_first_step(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(OTHER_TORCH)
    search = ":".join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with hosts(2) as net:
        net.start_ray(net.hosts[0], cpus=0)
        net.start_ray(net.hosts[1], cpus=2, PYTHONPATH=search)
        output = tmp_path / "merged"
        config = _config(net, world, output, cluster={"workers": 2, "shards": 1})
        done = net.run("raymerge", "merge", config)
        assert done.returncode == 1, done.stderr
        address = net.hosts[1].address
        assert f"raymerge: error: node {address}: has torch 0.1, and the driver " in done.stderr
        assert "install the same on every node" in done.stderr
        assert not (output / "metrics.jsonl").exists()
