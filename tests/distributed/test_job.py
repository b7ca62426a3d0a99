"""The real thing on one machine: `ray start --head` with a token, `ray job submit`, the result."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from world import World

from raymerge.session import merge

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node of our own with token authentication; yields the environment that reaches it."""
    port, dashboard, agent = _free_port(), _free_port(), _free_port()
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    # A short path: Ray's sockets live below it, and a socket's path has at most 107 characters.
    head = subprocess.Popen(
        [
            *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4"),
            *(f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
            # Another Ray on this machine may hold the agent's default port.
            *(f"--dashboard-agent-listen-port={agent}", "--metrics-export-port=0"),
            *(f"--temp-dir=/tmp/rm-{os.getpid()}", "--object-store-memory=200000000"),
        ],
        env={k: v for k, v in environment.items() if k != "RAY_ADDRESS"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(dashboard, head)
        _wait_for(agent, head)
        yield environment
    finally:
        head.terminate()
        head.wait(timeout=60)


def _wait_for(port: int, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert head.poll() is None, "ray start ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError("the dashboard did not come up within 120 s")


def _submit(
    folder: Path, environment: dict[str, str], *command: str
) -> subprocess.CompletedProcess[str]:
    submit = [str(BIN / "ray"), "job", "submit", "--working-dir", str(folder), "--", *command]
    return subprocess.run(submit, env=environment, capture_output=True, text=True, timeout=300)


def test_a_job_merges_as_this_process_does(
    world: World, cluster: dict[str, str], tmp_path: Path
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    output = tmp_path / "merged"
    config = {
        **world.config,
        "output": str(output),
        "cluster": {"workers": 2, "cpus_per_worker": 1},
    }
    (project / "merge.yaml").write_text(yaml.safe_dump(config))

    done = _submit(project, cluster, "python", "-m", "raymerge", "merge", "merge.yaml")

    assert done.returncode == 0, done.stdout + done.stderr
    local = merge(world.parse(tmp_path / "local"))
    assert local.lambdas is not None
    values = torch.tensor(json.loads((output / "lambdas.json").read_text())["values"])
    assert (values - local.lambdas).abs().max() < 1e-6
    assert (values - 0.3).abs().max() > 1e-3


def test_a_job_with_a_wrong_config_fails_with_one_line(
    world: World, cluster: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump({**world.config, "optimzer": {}}))
    done = _submit(tmp_path, cluster, "python", "-m", "raymerge", "merge", "merge.yaml")
    assert done.returncode != 0
    assert "raymerge: error: config merge.yaml: optimzer: unknown key; did you mean optimizer?" in (
        done.stdout + done.stderr
    )


def test_without_the_token_the_cluster_refuses(cluster: dict[str, str], tmp_path: Path) -> None:
    stranger = {**cluster, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    assert _submit(tmp_path, stranger, "true").returncode != 0
