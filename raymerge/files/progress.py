"""Progress bars on stderr that stay readable in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int], None]


@contextmanager
def progress_bar(what: str, *, unit: str, total: int | None = None) -> Iterator[Progress]:
    """Yield a function that advances the bar; in a log file it is printed every ten seconds."""
    with tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        file=sys.stderr,
        leave=False,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    ) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance
