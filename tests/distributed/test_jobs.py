"""Jobs on a real cluster: two `ray start` nodes on one machine, with a token."""

from __future__ import annotations

import json
import re
import secrets
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import config_data, read_json, read_steps, write_config
from dashboard import GRAFANA, metric_names
from prometheus_client.parser import text_string_to_metric_families
from ray_nodes import Cluster, finished, ray_nodes, wait_for
from world import World

from raymerge.runs.merge import merge

pytestmark = pytest.mark.slow

MERGE = ("python", "-m", "raymerge", "merge", "merge.yaml")
STEPS = 300
"""Enough that the run is still working when it is stopped; λ on two nodes drifts a little more."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU each, so that two workers must run on both."""
    with ray_nodes(2) as nodes:
        yield nodes


def _sharded(world: World, output: Path) -> dict[str, Any]:
    cluster = {"workers": 2, "shards": 2, "cpus_per_worker": 1}
    return config_data(world, output=str(output), cluster=cluster)


def _require_lambdas(output: Path, expected: torch.Tensor, within: float) -> None:
    values = torch.tensor(json.loads((output / "lambdas.json").read_text())["values"])
    assert (values - expected).abs().max() < within


def _nodes_by_job(cluster: Cluster) -> dict[str, list[str]]:
    """Return the nodes of all workers so far, by job."""
    listed = cluster.run("ray", "list", "actors", "--address", cluster.address, "--format", "json")
    nodes = defaultdict(list)
    for actor in json.loads(listed.stdout):
        if actor["class_name"] == "MergeWorker":
            nodes[actor["job_id"]].append(actor["node_id"])
    return nodes


def test_a_job_with_shards_on_two_nodes_merges_as_this_process_does(
    world: World, cluster: Cluster, tmp_path: Path
) -> None:
    project, output = tmp_path / "project", tmp_path / "merged"
    project.mkdir()
    write_config(project / "merge.yaml", _sharded(world, output))

    job = cluster.start("ray", "job", "submit", "--working-dir", project, "--", *MERGE)
    local = merge(world.parse(tmp_path / "local")).lambdas  # meanwhile
    done = finished(job)

    assert done.returncode == 0, done.stdout + done.stderr
    assert local is not None
    assert (local - 0.3).abs().max() > 1e-3
    _require_lambdas(output, local, within=1e-6)
    (nodes,) = _nodes_by_job(cluster).values()
    assert len(nodes) == len(set(nodes)) == 2


def test_a_stopped_run_is_resumed_by_the_same_command(
    world: World, cluster: Cluster, tmp_path: Path
) -> None:
    """While the job runs, the same command follows it, and Ctrl-C leaves it running. Once it has
    ended, the same command resumes the run, to the same λ. No secret is sent."""
    output, secret = tmp_path / "merged", secrets.token_hex(16)
    config = write_config(tmp_path / "merge.yaml", _sharded(world, output))
    submit = ("raymerge", "submit", config, "-o", f"optimizer.steps={STEPS}")

    job = cluster.run(*submit, "--no-wait", MY_TOKEN=secret).stdout.strip()
    assert re.fullmatch(r"raymerge-merged-\w{8}-1", job)
    followed = cluster.start(*submit)
    wait_for(lambda: list((output / "state").glob("step-*")))
    followed.send_signal(signal.SIGINT)
    _, messages = followed.communicate(timeout=60)
    assert followed.returncode == 130, messages
    assert messages.startswith(f"raymerge: job {job} at {cluster.address}: is running already\n")
    assert re.search(rf"job {job} keeps running; .*\nraymerge: interrupted\n$", messages)

    details = _stop(cluster, job)
    assert secret not in details
    assert cluster.environment["RAY_AUTH_TOKEN"] not in details
    steps = (output / "metrics.jsonl").read_text().splitlines()
    kept = int(max((output / "state").glob("step-*")).name.removeprefix("step-"))
    assert 0 < kept < STEPS

    resumption = cluster.start(*submit)
    local = merge(world.parse(tmp_path / "local", optimizer={"steps": STEPS})).lambdas  # meanwhile
    done = finished(resumption)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"written to {output}\n" in done.stdout
    assert done.stderr == (
        f"raymerge: job {job[:-1]}2 at {cluster.address}: submitted\n"
        f"raymerge: job {job[:-1]}2 succeeded\n"
    )
    resumed = (output / "metrics.jsonl").read_text().splitlines()
    assert resumed[:kept] == steps[:kept]  # with their seconds: they were not taken again
    assert read_steps(output / "metrics.jsonl") == list(range(1, STEPS + 1))
    assert local is not None
    _require_lambdas(output, local, within=1e-5)


def _stop(cluster: Cluster, job: str) -> str:
    """Stop the job, and return the cluster's details of it."""
    cluster.call("POST", f"/api/jobs/{job}/stop")
    wait_for(lambda: "STOPPED" in cluster.call("GET", f"/api/jobs/{job}"))
    return cluster.call("GET", f"/api/jobs/{job}")


def test_every_series_of_the_dashboard_is_scraped_from_a_run(
    world: World, cluster: Cluster, tmp_path: Path
) -> None:
    """The run survives a failure, which is reported as well."""
    output = tmp_path / "merged"
    config = write_config(tmp_path / "merge.yaml", _sharded(world, output))
    submit = ("raymerge", "submit", config, "-o", "optimizer.steps=100000", "--no-wait")
    job = cluster.run(*submit).stdout.strip()
    wait_for(lambda: list((output / "state").glob("step-*")))
    cluster.nodes[1].workers("MergeWorker")[0].kill()
    expected = metric_names(read_json(GRAFANA)) - {"ray_raymerge_skipped_steps_total"}
    wait_for(lambda: expected <= _scraped(cluster).keys())
    series = _scraped(cluster)
    assert series["ray_raymerge_failures_total"] == [({"run": "merged", "kind": "worker"}, 1.0)]
    assert series["ray_raymerge_steps"] == [({"run": "merged"}, 100000.0)]
    tasks = {labels["task"] for labels, _ in series["ray_raymerge_entropy"]}
    assert tasks == {"colour", "shade", "tone", "shape"}
    _stop(cluster, job)


def _scraped(cluster: Cluster) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Return raymerge's labels and the value of each series, by name."""
    series = defaultdict(list)
    for family in text_string_to_metric_families(cluster.metrics()):
        for sample in family.samples:
            ours = {k: v for k, v in sample.labels.items() if k in ("run", "task", "phase", "kind")}
            series[sample.name].append((ours, sample.value))
    return series


def test_wrong_input_found_by_the_job_gives_its_error_and_exit_code(
    world: World, cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "taken").touch()
    config = write_config(tmp_path / "merge.yaml", _sharded(world, tmp_path / "taken"))
    done = cluster.run("raymerge", "submit", config)
    assert done.returncode == 2, done.stderr
    assert f"\nraymerge: error: output {tmp_path}/taken: is a file; name a folder\n" in done.stdout
    assert done.stderr.endswith("failed with exit code 2; fix its input\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "Invalid authentication token"),
        ({"RAY_AUTH_MODE": "disabled"}, "Missing authentication token"),
        ({"RAY_AUTH_TOKEN": "", "HOME": "/nonexistent"}, "find an authentication token"),
    ],
)
def test_without_the_token_the_cluster_refuses(
    changes: dict[str, str], message: str, world: World, cluster: Cluster, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "merge.yaml", _sharded(world, tmp_path / "merged"))
    done = cluster.run("raymerge", "submit", config, **changes)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert f"cluster at {cluster.address} asks for its token (" in done.stderr
    assert message in done.stderr
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in done.stderr
