"""Map a function over items as Ray tasks, one CPU each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray

T = TypeVar("T")


def run_tasks(function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> Iterator[T]:
    """Results as they finish, in no order; the first error is raised. Needs a connected Ray."""
    remote = ray.remote(function).options(num_cpus=1, max_retries=0)
    waiting = [remote.remote(*args) for args in arguments]
    while waiting:
        (done,), waiting = ray.wait(waiting)
        yield ray.get(done)
