"""An ordered map over threads, for work that reads files and computes on what it has read."""

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
    """``function`` of every item, in order, by ``threads`` threads (default: as many as torch has).

    Each computes with one thread of its own: reading and computing overlap, and none waits for
    another's OpenMP team. At most twice as many results as threads exist at once, however slow the
    consumer is. An error is raised where its result would have been.
    """
    own = torch.get_num_threads()
    threads = threads or own
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
        torch.set_num_threads(own)  # one of its settings is of the whole process


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run with ``count`` threads inside torch (None: as many as now), then restore the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
