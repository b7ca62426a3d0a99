"""Two real ranks over gloo: aborts, lost peers and joining again."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import pytest
import torch

from raymerge.engine.messages import Rendezvous
from raymerge.engine.worker.collectives import Collective
from raymerge.errors import PeerLostError

WAITS_S, FREE_S = 0.3, 10.0
CALLS: tuple[Callable[[Collective, torch.Tensor], object], ...] = (
    Collective.all_gather,
    Collective.reduce_scatter,
)


def _rendezvous(port: int, generation: int) -> Rendezvous:
    return Rendezvous("127.0.0.1", port, f"run/0/gen{generation}", 600.0, 30.0)


def _second_rank(pipe: Connection, port: int, waits: bool) -> None:
    """Run rank 1: in each call it waits for rank 0, or aborts while rank 0 waits."""
    torch.set_num_threads(1)
    collective, device = Collective(), torch.device("cpu")
    for generation, call in enumerate(CALLS):
        collective.join(_rendezvous(port, generation), 1, 2, device)
        if waits:
            _call_until_released(collective, call)
        else:
            pipe.recv()
            collective.abort()
        pipe.send("out")
    collective.join(_rendezvous(port, len(CALLS)), 1, 2, device)
    pipe.send(collective.reduce_scatter(torch.ones(6)).tolist())


def _call_until_released(
    collective: Collective, call: Callable[[Collective, torch.Tensor], object]
) -> float:
    """Return the seconds until the call, in which the other rank takes no part, has failed."""
    began = time.monotonic()
    with pytest.raises(PeerLostError):
        call(collective, torch.ones(6))
    return time.monotonic() - began


@pytest.mark.parametrize("first_waits", [True, False])
def test_an_abort_releases_the_waiting_peer_and_both_join_again(
    first_waits: bool,
) -> None:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    collective, device = Collective(), torch.device("cpu")
    port = collective.open_store("127.0.0.1", 2)
    other = context.Process(target=_second_rank, args=(theirs, port, not first_waits))
    other.start()
    try:
        with ThreadPoolExecutor() as pool:
            for generation, call in enumerate(CALLS):
                collective.join(_rendezvous(port, generation), 0, 2, device)
                if first_waits:
                    waiting = pool.submit(_call_until_released, collective, call)
                    time.sleep(WAITS_S)
                    assert not waiting.done()
                    collective.abort()  # with gloo this alone releases nobody
                    pipe.send("abort")
                    assert waiting.result(timeout=FREE_S) >= WAITS_S
                else:
                    time.sleep(WAITS_S)
                    collective.abort()
                assert pipe.poll(FREE_S)
                assert pipe.recv() == "out"
        collective.join(_rendezvous(port, len(CALLS)), 0, 2, device)
        assert collective.reduce_scatter(torch.ones(6)).tolist() == [2.0] * 3
        assert pipe.poll(FREE_S)
        assert pipe.recv() == [2.0] * 3
    finally:
        collective.leave()
        other.kill()
        other.join()


def test_joining_can_be_aborted_and_times_out() -> None:
    collective, device = Collective(), torch.device("cpu")
    port = collective.open_store("127.0.0.1", 2)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(collective.join, _rendezvous(port, 0), 0, 2, device)
        time.sleep(WAITS_S)
        assert not waiting.done()
        collective.abort()
        with pytest.raises(PeerLostError, match="aborted before it formed"):
            waiting.result(timeout=FREE_S)
    alone = Rendezvous("127.0.0.1", port, "run/0/gen1", timeout_s=600.0, join_timeout_s=WAITS_S)
    began = time.monotonic()
    with pytest.raises(PeerLostError, match=r"not all peers joined within 0\.3 s"):
        collective.join(alone, 0, 2, device)
    assert WAITS_S <= time.monotonic() - began < FREE_S


def test_a_collective_that_begins_after_an_abort_fails_at_once() -> None:
    collective = Collective()
    collective.world = 2
    collective.abort()
    with pytest.raises(PeerLostError, match="was aborted"):
        collective.all_gather(torch.ones(6))
