"""Connect to Ray at an address, or else start a private cluster on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import ray

from raymerge.distributed.placement import Resources, environment_address
from raymerge.errors import RunError, one_line

_OBJECT_STORE_BYTES = 200_000_000  # requests and results are a few megabytes at most


@contextmanager
def connect(address: str | None, local_cpus: int) -> Iterator[Resources]:
    """Yield the cluster's resources. A cluster that was started here is stopped at the end.

    ``local_cpus``: logical CPUs that a private local cluster declares.
    """
    if ray.is_initialized():
        yield _resources(is_elastic=False)
        return
    remote = address or environment_address()
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        _connect(remote, local_cpus)
    except Exception as error:  # Ray raises ConnectionError, ValueError or RuntimeError
        where = f"the Ray cluster at {remote}" if remote else "a local Ray"
        raise RunError(
            f"cannot reach {where}: {one_line(error, 200)}; check cluster.address, "
            "and RAY_AUTH_MODE and RAY_AUTH_TOKEN if the cluster asks for a token"
        ) from error
    _restore_sigterm(terminate)
    with redirect_stdout(sys.stderr):  # Ray prints to stdout when a worker dies
        try:
            yield _resources(is_elastic=remote is None)
        finally:
            ray.shutdown()


def _restore_sigterm(handler: Any) -> None:
    """Undo Ray's own handler for SIGTERM, which would exit without saving the state."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _connect(remote: str | None, local_cpus: int) -> None:
    # An aborted call fails after its result has been given up, which Ray would report.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if remote:
        ray.init(address=remote, namespace="raymerge", **quiet)
        return
    # A bare ray.init() turns token authentication on and writes a token to the home directory; a
    # random one for this private cluster keeps it in this process and its children.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray's workers are nice by 15, and starve beside whatever else runs on this machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local",
        num_cpus=local_cpus,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        **quiet,
    )


def _resources(*, is_elastic: bool) -> Resources:
    total = ray.cluster_resources()
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    per_node = [(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in alive if r.get("CPU")]
    return Resources(
        cpus=int(total.get("CPU", 0)),
        gpus=int(total.get("GPU", 0)),
        nodes=max(1, len(per_node)),
        is_elastic=is_elastic,
        per_node=tuple(per_node),
    )
