"""Run a function on many arguments as Ray tasks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from raymerge.distributed.failures import classify
from raymerge.errors import WorkerLostError

T = TypeVar("T")

_POLL_S = 1.0


def run_tasks(
    function: Callable[..., T],
    arguments: Sequence[tuple[Any, ...]],
    *,
    cpus: int = 1,
    gpus: float = 0.0,
    at_once: int | None = None,
    watch: Callable[[], None] | None = None,
) -> Iterator[T]:
    """Yield the results in the order in which they finish. Ray must be connected.

    Each task gets ``cpus`` and ``gpus``; at most ``at_once`` run at a time (default: as many as
    have room). ``watch`` is called about once a second. The first error is raised: one of raymerge
    unchanged, any other as :class:`RunError`, and :class:`WorkerLostError` if a process died.
    """
    remote = ray.remote(function).options(num_cpus=cpus, num_gpus=gpus, max_retries=0)
    # Submit as many as may run, and refill whenever one has finished.
    waiting = deque(arguments)
    running: list[Any] = []
    while waiting or running:
        while waiting and (at_once is None or len(running) < at_once):
            running.append(remote.remote(*waiting.popleft()))
        done, running = ray.wait(running, timeout=None if watch is None else _POLL_S)
        if watch is not None:
            watch()
        for reference in done:
            yield _result(reference)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayError as error:
        failure = classify(error)
    raise WorkerLostError(
        f"the process of a task {failure.reason}; finished tasks are kept, run again"
    )
