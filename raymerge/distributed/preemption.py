"""A monitor of the nodes that the cluster is about to take back (preemption, draining).

It polls the head node on a thread of its own, so that a lost head never blocks a step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection

logger = logging.getLogger(__name__)

_POLL_S = 2.0
_HEAD_TIMEOUT_S = 10.0
_JOIN_S = 1.0


class PreemptionMonitor:
    """Polls the head for draining nodes until ``close``.

    ``announced_nodes``: every node that was ever draining. It is needed because Ray itself reports
    a worker's death as a preemption only if its node lived until the announced deadline.
    """

    def __init__(
        self, query: Callable[[], Collection[str]] | None = None, poll_s: float = _POLL_S
    ) -> None:
        self.announced_nodes: frozenset[str] = frozenset()
        self._draining: frozenset[str] = frozenset()
        self._query, self._poll_s = query or _draining_nodes, poll_s
        self._answered_at = time.monotonic()
        self._is_head_silent = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="preemption-monitor", daemon=True)
        self._thread.start()

    def is_pending(self, nodes: Collection[str]) -> bool:
        """Return whether one of ``nodes`` is draining, or the head has stopped answering.

        A silent head counts because Ray ends the driver soon after its head is lost.
        """
        silent_s = time.monotonic() - self._answered_at
        was_silent = self._is_head_silent
        self._is_head_silent = silent_s > self._poll_s + _HEAD_TIMEOUT_S
        if self._is_head_silent and not was_silent:
            logger.warning(
                "the cluster's head has not answered for %.0f s: every step is saved from now on. "
                "If the head does not return, Ray ends this process; run again with --resume then",
                silent_s,
            )
        return self._is_head_silent or not self._draining.isdisjoint(nodes)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(_JOIN_S)

    def _poll(self) -> None:
        while not self._stop.wait(self._poll_s):
            try:
                draining = frozenset(self._query())
            except Exception as error:  # Ray raises RuntimeError or RpcError
                logger.debug("draining nodes: %s", error)
                continue
            self.announced_nodes |= draining
            self._draining, self._answered_at = draining, time.monotonic()


def _draining_nodes() -> Collection[str]:
    """Return the ids of the draining nodes; none if this version of Ray does not report them."""
    try:
        from ray._private.state import state

        return list(state.get_draining_nodes())
    except (ImportError, AttributeError):
        return ()
