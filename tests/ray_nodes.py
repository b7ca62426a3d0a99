"""A Ray cluster of several nodes on this machine, as `ray start` makes one, with a token."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
_START_S = 120.0


@dataclass(frozen=True)
class Cluster:
    """``environment``: reaches it, by RAY_ADDRESS and the token; ``head``: its GCS, host:port."""

    environment: Mapping[str, str]
    head: str

    @property
    def address(self) -> str:
        return self.environment["RAY_ADDRESS"]

    def start(self, *argv: object, **env: str) -> subprocess.Popen[str]:
        """A command of the venv, with the environment that reaches the cluster."""
        program, *args = map(str, argv)
        return subprocess.Popen(
            [str(BIN / program), *args],
            env={**self.environment, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *argv: object, **env: str) -> subprocess.CompletedProcess[str]:
        """The same, to its end."""
        return finished(self.start(*argv, **env))

    def call(self, method: str, path: str) -> str:
        """Ask the dashboard's API."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(self.address + path, headers=token, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())


def finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a command's end."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextmanager
def ray_nodes(count: int, cpus: int = 1) -> Iterator[Cluster]:
    """``count`` nodes of ``cpus`` logical CPUs each; ended by their process ids."""
    port, dashboard = free_port(), free_port()
    environment = {
        **{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    # A short path: Ray's sockets live below it, and a socket's path has at most 107 characters.
    folder = f"/tmp/rm-{os.getpid()}-{port}"
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(_node(environment, cpus, *head, "--dashboard-host=127.0.0.1"))
        address = f"127.0.0.1:{port}"
        for _ in range(count - 1):
            _wait_for(port)
            stack.enter_context(_node(environment, cpus, f"--address={address}"))
        cluster = Cluster({**environment, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}, address)
        _wait_for(dashboard)
        _wait_for_nodes(cluster, count)
        yield cluster


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _node(environment: Mapping[str, str], cpus: int, *options: str) -> Iterator[None]:
    node = subprocess.Popen(
        [
            *(str(BIN / "ray"), "start", "--block", f"--num-cpus={cpus}", *options),
            # Nodes of one machine, and another Ray on it, would take the same default ports.
            *(f"--dashboard-agent-listen-port={free_port()}", "--metrics-export-port=0"),
            *("--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000"),
        ],
        env=dict(environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        node.terminate()
        node.wait(timeout=60)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"no node listens on port {port} within {_START_S:g} s")


def _wait_for_nodes(cluster: Cluster, count: int) -> None:
    """All of them take work: a job can be sent before the others have joined."""
    code = (
        "import ray, sys, time; ray.init(address=sys.argv[1], logging_level='ERROR')\n"
        "while sum(n['Alive'] for n in ray.nodes()) < int(sys.argv[2]): time.sleep(0.2)"
    )
    done = cluster.run("python", "-c", code, cluster.head, count)
    assert done.returncode == 0, done.stderr
