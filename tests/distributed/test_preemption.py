"""Nodes that are to be taken back, as a head tells that may be lost itself. No cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from raymerge.distributed import preemption as notices
from raymerge.distributed.preemption import Notices


def _soon(found: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_only_the_nodes_of_workers_count_and_what_was_announced_is_remembered() -> None:
    now = [{"a"}]
    told = Notices(lambda: now[0], look_s=0.01)
    try:
        _soon(lambda: told.leaving(["a", "b"]))
        assert not told.leaving(["b"])
        now[0] = {"c"}
        _soon(lambda: told.leaving(["c"]))
        assert not told.leaving(["a"])
        assert told.announced == {"a", "c"}
    finally:
        told.close()


def test_a_question_that_fails_is_asked_again() -> None:
    answers = iter([RuntimeError("lost"), {"a"}])

    def ask() -> set[str]:
        answer = next(answers, {"a"})
        if isinstance(answer, Exception):
            raise answer
        return answer

    told = Notices(ask, look_s=0.01)
    try:
        _soon(lambda: told.leaving(["a"]))
    finally:
        told.close()


def test_a_head_that_says_nothing_holds_up_nobody_and_may_be_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notices, "_SILENT_S", 0.2)
    lost = threading.Event()

    def ask() -> set[str]:
        lost.wait(60)
        return set()

    told = Notices(ask, look_s=0.01)
    began = time.monotonic()
    assert not told.leaving(["a"])
    assert time.monotonic() - began < 0.1
    _soon(lambda: told.leaving(["a"]))
    assert told.leaving(["a"])
    assert len(caplog.messages) == 1
    assert "head has not answered" in caplog.messages[0]
    lost.set()
    _soon(lambda: not told.leaving(["a"]))
    told.close()
