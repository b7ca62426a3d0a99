"""What the cluster's head says of its nodes, asked beside the run: which are to be taken back.

A head that is lost holds up nobody who asks, only the thread that waits for its answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection

logger = logging.getLogger(__name__)

_LOOK_S = 2.0
_SILENT_S = 10.0
_END_S = 1.0


class Notices:
    """Asks now and then, until ``close``.

    ``announced``: the nodes that ever were about to go. Ray itself says of a worker's death that it
    was a preemption only where its node outlived the deadline it had been given.
    """

    def __init__(
        self, ask: Callable[[], Collection[str]] | None = None, look_s: float = _LOOK_S
    ) -> None:
        self.announced: frozenset[str] = frozenset()
        self._now: frozenset[str] = frozenset()
        self._ask, self._look_s = ask or _draining, look_s
        self._heard = time.monotonic()
        self._silent = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="notices", daemon=True)
        self._thread.start()

    def leaving(self, nodes: Collection[str]) -> bool:
        """Whether one of them is about to go, or may be gone: the head says nothing any more.

        A driver whose head is lost is soon ended by Ray, without a word.
        """
        silent_s = time.monotonic() - self._heard
        was_silent, self._silent = self._silent, silent_s > self._look_s + _SILENT_S
        if self._silent and not was_silent:
            logger.warning(
                "the cluster's head has not answered for %.0f s: every step is saved from now on. "
                "If it stays away Ray ends this process; run again with --resume then", silent_s,
            )  # fmt: skip
        return self._silent or not self._now.isdisjoint(nodes)

    def close(self) -> None:
        self._end.set()
        self._thread.join(_END_S)

    def _listen(self) -> None:
        while not self._end.wait(self._look_s):
            try:
                now = frozenset(self._ask())
            except Exception as error:  # RuntimeError, RpcError, by Ray's mood
                logger.debug("nodes: %s", error)
                continue
            self.announced |= now
            self._now, self._heard = now, time.monotonic()


def _draining() -> Collection[str]:
    """Empty where this Ray does not tell."""
    try:
        from ray._private.state import state

        return list(state.get_draining_nodes())
    except (ImportError, AttributeError):
        return ()
