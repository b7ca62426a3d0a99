"""A Ray cluster of several hosts: network namespaces with addresses of their own.

Each host is a namespace on one bridge, so its link can be cut, delayed or made lossy. They share
the machine's files, processes and memory. Needs root, iproute2, and a kernel with veth and bridges.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from ray_nodes import BIN, finished

_PORT = 6379
_START_S = 120.0
_NUMBERS = itertools.count()
_FAST_DETECTION = {  # of lost nodes, by Ray
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}


def why_not() -> str:
    """Return why namespaces cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2 (ip)"
    name = f"rmtry{os.getpid()}"
    tried = [
        ("ip", "netns", "add", name),
        ("ip", "link", "add", f"{name[:12]}a", "type", "veth", "peer", "name", f"{name[:12]}b"),
        ("ip", "link", "add", f"{name[:12]}c", "type", "bridge"),
    ]
    try:
        failed = [argv for argv in tried if subprocess.run(argv, capture_output=True).returncode]
        return f"this kernel refuses `{' '.join(failed[0])}`" if failed else ""
    finally:
        for argv in (
            ("ip", "netns", "del", name),
            ("ip", "link", "del", f"{name[:12]}a"),
            ("ip", "link", "del", f"{name[:12]}c"),
        ):
            subprocess.run(argv, capture_output=True)


@dataclass
class Host:
    """One namespace, its address, and the `ray start --block` in it."""

    name: str
    link: str
    address: str
    process: subprocess.Popen[bytes] | None = None

    def argv(self, *argv: object) -> list[str]:
        """Return a command line that runs in this host."""
        return ["ip", "netns", "exec", self.name, *map(str, argv)]

    def cut(self) -> None:
        """Cut the link, as if the cable were pulled: no packet passes, and nobody is told."""
        _run("ip", "link", "set", self.link, "down")

    def mend(self) -> None:
        _run("ip", "link", "set", self.link, "up")

    def impair(self, *netem: str) -> None:
        """Delay or lose packets that go to the host, as tc's netem writes it; none: as before.

        Not every kernel has netem.
        """
        _run("tc", "qdisc", "replace" if netem else "del", "dev", self.link, "root",
             *(("netem", *netem) if netem else ()))  # fmt: skip


@dataclass
class Hosts:
    """``environment``: the token and the venv, for drivers and nodes alike."""

    environment: Mapping[str, str]
    folder: Path
    bridge: str
    hosts: list[Host] = field(default_factory=list)

    @property
    def head(self) -> str:
        return f"{self.hosts[0].address}:{_PORT}"

    def start_ray(self, host: Host, cpus: int, **environment: str) -> None:
        """Start a node in a host, and return once it has joined."""
        is_head = host is self.hosts[0]
        place = (f"--address={self.head}",)
        if is_head:
            place = ("--head", f"--port={_PORT}", f"--temp-dir={self.folder}",
                     "--include-dashboard=false", "--disable-usage-stats")  # fmt: skip
        log = (self.folder.parent / f"{host.name}.log").open("wb")
        host.process = subprocess.Popen(
            host.argv(
                BIN / "ray", "start", "--block", f"--num-cpus={cpus}", *place,
                f"--node-ip-address={host.address}", "--object-store-memory=100000000",
            ),
            env={**self.environment, **environment}, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        deadline = time.monotonic() + _START_S
        while b"Ray runtime started" not in Path(log.name).read_bytes():
            assert host.process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.1)

    def start(self, *argv: object) -> subprocess.Popen[str]:
        """Start a command of the venv on the head's host."""
        program, *rest = argv
        return subprocess.Popen(
            self.hosts[0].argv(BIN / str(program), *rest),
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *argv: object) -> subprocess.CompletedProcess[str]:
        return finished(self.start(*argv))


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Yield ``count`` hosts without Ray; all that was made is removed at the end."""
    short = f"{os.getpid() % 10_000}{next(_NUMBERS)}"
    bridge, folder = f"rmb{short}", Path(f"/tmp/rmh{short}/ray")
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",
        **_FAST_DETECTION,
    }
    net = Hosts(environment, folder, bridge)
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for number in range(1, count + 1):
            host = Host(f"rmn{short}-{number}", f"rmv{short}-{number}", f"10.213.7.{number}")
            net.hosts.append(host)
            _run("ip", "netns", "add", host.name)
            _run("ip", "link", "add", host.link, "type", "veth", "peer", "name", "eth0",
                 "netns", host.name)  # fmt: skip
            _run("ip", "link", "set", host.link, "master", bridge, "up")
            _run(*host.argv("ip", "address", "add", f"{host.address}/24", "dev", "eth0"))
            _run(*host.argv("ip", "link", "set", "eth0", "up"))
            _run(*host.argv("ip", "link", "set", "lo", "up"))
        yield net
    finally:
        for host in reversed(net.hosts):
            _end(host)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)
        shutil.rmtree(folder.parent, ignore_errors=True)


def stop(host: Host) -> None:
    """Kill all processes in a host."""
    inside = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True)
    for number in inside.stdout.split():
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int(number)).kill()
    if host.process is not None:
        host.process.kill()
        host.process.wait(timeout=30)


def _end(host: Host) -> None:
    stop(host)
    subprocess.run(["ip", "netns", "del", host.name], capture_output=True)
    subprocess.run(["ip", "link", "del", host.link], capture_output=True)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
