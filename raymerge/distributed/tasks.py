"""Map a function over items as Ray tasks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from raymerge.errors import RaymergeError, RunError, WorkerLostError, one_line

T = TypeVar("T")

_WATCH_S = 1.0


def run_tasks(
    function: Callable[..., T],
    arguments: Sequence[tuple[Any, ...]],
    *,
    cpus: int = 1,
    gpus: float = 0.0,
    at_once: int | None = None,
    watch: Callable[[], None] | None = None,
) -> Iterator[T]:
    """Results as they finish, in no order; the first error is raised. Needs a connected Ray.

    Each task has ``cpus`` and ``gpus``; at most ``at_once`` run (default: as many as have room).
    ``watch`` is called about once a second. An error of ours is raised as it was, any other as
    :class:`RunError`; a task whose process died raises :class:`WorkerLostError`.
    """
    remote = ray.remote(function).options(num_cpus=cpus, num_gpus=gpus, max_retries=0)
    left = deque(arguments)
    running: list[Any] = []
    while left or running:
        while left and (at_once is None or len(running) < at_once):
            running.append(remote.remote(*left.popleft()))
        done, running = ray.wait(running, timeout=None if watch is None else _WATCH_S)
        if watch is not None:
            watch()
        for each in done:
            yield _result(each)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RaymergeError):
            raise error.cause from None
        raise RunError(f"a task failed: {one_line(str(error).strip().splitlines()[-1])}") from error
    except RayError as error:
        raise WorkerLostError(
            "a task's process died (killed, out of memory, or its node was lost): "
            f"{one_line(error)}; what is finished is kept, run again"
        ) from error
