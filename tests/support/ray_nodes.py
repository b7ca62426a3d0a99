"""A Ray cluster of several nodes on this machine, as `ray start` makes one, with a token."""

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
        (found,) = [one for one in self.process.children() if one.name() == "raylet"]
        return found

    def workers(self, actor: str) -> list[psutil.Process]:
        """The processes of the actors of this class."""
        found = []
        for process in self._below():
            with suppress(psutil.NoSuchProcess):  # nor is a zombie any
                if " ".join(process.cmdline()).startswith(f"ray::{actor}"):
                    found.append(process)
        return found

    def lose(self) -> None:
        """SIGKILL all of it at once, as when a machine's plug is pulled."""
        self._each(psutil.Process.kill)

    def _each(self, act: Callable[[psutil.Process], None]) -> None:
        _each([self.process, *self._below()], act)

    def freeze(self) -> None:
        """SIGSTOP all of it: as when its network is cut, it says nothing and knows of nothing."""
        self._each(psutil.Process.suspend)

    def thaw(self) -> None:
        self._each(psutil.Process.resume)

    def _below(self) -> list[psutil.Process]:
        """Its processes; none once it has ended."""
        with suppress(psutil.NoSuchProcess):
            return list(self.process.children(recursive=True))
        return []

    def end(self) -> None:
        """As its user does; what a fault has left of it is killed."""
        left = self._below()
        with suppress(psutil.NoSuchProcess):
            self.process.terminate()
            self.process.wait(timeout=60)
        _each(left, psutil.Process.kill)


def _each(processes: Sequence[psutil.Process], act: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            act(process)


@dataclass(frozen=True)
class Cluster:
    """``environment``: reaches it, by RAY_ADDRESS and the token; ``head``: its GCS, host:port."""

    environment: Mapping[str, str]
    head: str
    metrics_port: int
    """Of the head, where its drivers' metrics are."""
    nodes: list[Node] = field(default_factory=list)

    def join(self, cpus: int) -> Node:
        """One more node. Of nodes of one machine that start at once some may never join, so this
        returns when it has."""
        return self._start(cpus, f"--address={self.head}", "--metrics-export-port=0")

    def _start(self, cpus: int, *options: str) -> Node:
        node = _node(self.environment, cpus, *options)
        self.nodes.append(node)
        return node

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

    def metrics(self) -> str:
        """The head's, as Prometheus scrapes them."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return str(answer.read().decode())

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


def wait_for(found: Callable[[], object]) -> None:
    """Until it is true; fails after two minutes."""
    deadline = time.monotonic() + 120
    while not found():
        assert time.monotonic() < deadline, "nothing within 120 s"
        time.sleep(0.02)


@contextmanager
def ray_nodes(count: int, cpus: int = 1, head_cpus: int | None = None) -> Iterator[Cluster]:
    """``count`` nodes of ``cpus`` logical CPUs each (head: ``head_cpus``), ended by their ids."""
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
    # A short path: Ray's sockets live below it, and a socket's path has at most 107 characters.
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
            # Nodes of one machine, and another Ray on it, would take the same default ports.
            f"--dashboard-agent-listen-port={free_port()}",
            *("--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000"),
        ],
        # A node is given the address of its own; RAY_ADDRESS would say otherwise.
        env={key: value for key, value in environment.items() if key != "RAY_ADDRESS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    node = Node(psutil.Process(started.pid))
    told = _told_until(started, "Ray runtime started")
    if "Ray runtime started" not in told:
        node.end()
        raise AssertionError(f"a node did not start:\n{told}")
    return node


def _told_until(process: subprocess.Popen[str], mark: str) -> str:
    """What it prints until then, or until it ends; the rest is read and dropped."""
    told, found = [], threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if not found.is_set():
                told.append(line)
                if mark in line:
                    found.set()
        found.set()

    threading.Thread(target=read, daemon=True).start()
    assert found.wait(_START_S), f"nothing of {mark!r} within {_START_S:g} s: {''.join(told)}"
    return "".join(told)


def _wait_for_dashboard(port: int) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"no node listens on port {port} within {_START_S:g} s")
