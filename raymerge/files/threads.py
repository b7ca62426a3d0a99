"""An ordered map over threads, for work that reads files and computes on their content."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def parallel_map(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int | None = None
) -> Iterator[_Result]:
    """Yield ``function(item)`` in the order of the items; default: as many threads as torch has.

    Each thread computes with one torch thread: reading and computing overlap, and none waits for
    another's OpenMP team. At most ``2 * threads`` results exist at once, however slow the consumer
    is. An error is raised in the place of its result.
    """
    before = torch.get_num_threads()
    threads = threads or before
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # the pool's setting also reached the whole process


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run with ``count`` threads inside torch (None: as many as now), then restore the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
