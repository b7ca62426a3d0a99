"""A Ray cluster of several nodes on this machine, started by `ray start`, with a token."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
_START_S = 120.0


@dataclass(frozen=True)
class Node:
    """The processes of one `ray start --block`."""

    process: psutil.Process

    @property
    def raylet(self) -> psutil.Process:
        (raylet,) = [child for child in self.process.children() if child.name() == "raylet"]
        return raylet

    def workers(self, actor: str) -> list[psutil.Process]:
        """Return the processes of the actors of this class."""
        workers = []
        for process in self._descendants():
            with suppress(psutil.NoSuchProcess):  # raised for zombies too
                if " ".join(process.cmdline()).startswith(f"ray::{actor}"):
                    workers.append(process)
        return workers

    def lose(self) -> None:
        """SIGKILL all processes at once, as if the machine lost power."""
        self._each(psutil.Process.kill)

    def _each(self, act: Callable[[psutil.Process], None]) -> None:
        _each([self.process, *self._descendants()], act)

    def freeze(self) -> None:
        """SIGSTOP all processes: the node is silent, as if its network were cut."""
        self._each(psutil.Process.suspend)

    def thaw(self) -> None:
        self._each(psutil.Process.resume)

    def _descendants(self) -> list[psutil.Process]:
        """Return its processes; none once it has ended."""
        with suppress(psutil.NoSuchProcess):
            return list(self.process.children(recursive=True))
        return []

    def end(self) -> None:
        """Stop the node normally, and kill what a fault has left of it."""
        descendants = self._descendants()
        with suppress(psutil.NoSuchProcess):
            self.process.terminate()
            self.process.wait(timeout=60)
        _each(descendants, psutil.Process.kill)


def _each(processes: Sequence[psutil.Process], act: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            act(process)


@dataclass(frozen=True)
class Cluster:
    """``environment``: has RAY_ADDRESS and the token. ``head``: its GCS, as host:port."""

    environment: Mapping[str, str]
    head: str
    metrics_port: int
    """The head's port for metrics, which has those of its drivers."""
    nodes: list[Node] = field(default_factory=list)

    def join(self, cpus: int) -> Node:
        """Start one more node, and return once it has joined.

        Of several nodes that start at once on one machine, some may never join.
        """
        return self._start(cpus, f"--address={self.head}", "--metrics-export-port=0")

    def _start(self, cpus: int, *options: str) -> Node:
        node = _node(self.environment, cpus, *options)
        self.nodes.append(node)
        return node

    @property
    def address(self) -> str:
        return self.environment["RAY_ADDRESS"]

    def start(self, *argv: object, **env: str) -> subprocess.Popen[str]:
        """Start a command of the venv, with the environment for this cluster."""
        program, *args = map(str, argv)
        return subprocess.Popen(
            [str(BIN / program), *args],
            env={**self.environment, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *argv: object, **env: str) -> subprocess.CompletedProcess[str]:
        """Run such a command to its end."""
        return finished(self.start(*argv, **env))

    def metrics(self) -> str:
        """Return the head's metrics, as Prometheus scrapes them."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=60) as response:
            return str(response.read().decode())

    def call(self, method: str, path: str) -> str:
        """Send a request to the dashboard's API and return the response."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(self.address + path, headers=token, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return str(response.read().decode())


def finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a command to end, and return its result."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until the condition holds; fails after two minutes."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "the condition does not hold after 120 s"
        time.sleep(0.02)


@contextmanager
def ray_nodes(count: int, cpus: int = 1, head_cpus: int | None = None) -> Iterator[Cluster]:
    """Yield a cluster of ``count`` nodes with ``cpus`` logical CPUs each (head: ``head_cpus``)."""
    port, dashboard = free_port(), free_port()
    environment = {
        **{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_metrics_report_interval_ms": "500",
    }
    # A short path, because Ray's sockets are below it, and their paths have at most 107 characters.
    folder = f"/tmp/rm-{os.getpid()}-{port}"
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
    cluster = Cluster(environment, f"127.0.0.1:{port}", free_port())
    head += ["--dashboard-host=127.0.0.1", f"--metrics-export-port={cluster.metrics_port}"]
    try:
        cluster._start(cpus if head_cpus is None else head_cpus, *head)
        for _ in range(count - 1):
            cluster.join(cpus)
        _wait_for_dashboard(dashboard)
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            node.end()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _node(environment: Mapping[str, str], cpus: int, *options: str) -> Node:
    started = subprocess.Popen(
        [
            *(str(BIN / "ray"), "start", "--block", f"--num-cpus={cpus}", *options),
            # Several nodes on one machine would use the same default ports.
            f"--dashboard-agent-listen-port={free_port()}",
            *("--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000"),
        ],
        # RAY_ADDRESS would override the address that the node is given.
        env={key: value for key, value in environment.items() if key != "RAY_ADDRESS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    node = Node(psutil.Process(started.pid))
    output = _output_until(started, "Ray runtime started")
    if "Ray runtime started" not in output:
        node.end()
        raise AssertionError(f"a node did not start:\n{output}")
    return node


def _output_until(process: subprocess.Popen[str], mark: str) -> str:
    """Return what it prints until ``mark`` or its end; the rest is read and dropped."""
    lines, is_done = [], threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if not is_done.is_set():
                lines.append(line)
                if mark in line:
                    is_done.set()
        is_done.set()

    threading.Thread(target=read, daemon=True).start()
    assert is_done.wait(_START_S), f"no {mark!r} within {_START_S:g} s: {''.join(lines)}"
    return "".join(lines)


def _wait_for_dashboard(port: int) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"no node listens on port {port} within {_START_S:g} s")
