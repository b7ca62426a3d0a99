"""The preemption monitor, with a stand-in for the head node. No cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from raymerge.distributed import preemption
from raymerge.distributed.preemption import PreemptionMonitor


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_only_the_workers_nodes_count_and_announced_nodes_are_remembered() -> None:
    draining = [{"a"}]
    monitor = PreemptionMonitor(lambda: draining[0], poll_s=0.01)
    try:
        _wait_for(lambda: monitor.is_pending(["a", "b"]))
        assert not monitor.is_pending(["b"])
        draining[0] = {"c"}
        _wait_for(lambda: monitor.is_pending(["c"]))
        assert not monitor.is_pending(["a"])
        assert monitor.announced_nodes == {"a", "c"}
    finally:
        monitor.close()


def test_a_failed_query_is_repeated() -> None:
    results = iter([RuntimeError("lost"), {"a"}])

    def query() -> set[str]:
        result = next(results, {"a"})
        if isinstance(result, Exception):
            raise result
        return result

    monitor = PreemptionMonitor(query, poll_s=0.01)
    try:
        _wait_for(lambda: monitor.is_pending(["a"]))
    finally:
        monitor.close()


def test_a_silent_head_blocks_no_step_and_counts_as_a_pending_preemption(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preemption, "_HEAD_TIMEOUT_S", 0.2)
    answers = threading.Event()

    def query() -> set[str]:
        answers.wait(60)
        return set()

    monitor = PreemptionMonitor(query, poll_s=0.01)
    began = time.monotonic()
    assert not monitor.is_pending(["a"])
    assert time.monotonic() - began < 0.1
    _wait_for(lambda: monitor.is_pending(["a"]))
    assert monitor.is_pending(["a"])
    assert len(caplog.messages) == 1
    assert "head has not answered" in caplog.messages[0]
    answers.set()
    _wait_for(lambda: not monitor.is_pending(["a"]))
    monitor.close()
