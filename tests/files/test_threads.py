"""The ordered map over threads."""

from __future__ import annotations

import threading

import pytest
import torch

from raymerge.files.threads import parallel_map


@pytest.mark.parametrize("threads", [None, 1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_it_is_the_map_in_order(threads, count):
    assert list(parallel_map(lambda x: x * x, range(count), threads)) == [
        x * x for x in range(count)
    ]


def test_results_come_in_order_however_the_work_ends():
    """The first item waits for the second: they do run at once, and the first still comes first."""
    second_done = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second_done.wait(60)
        if item == 1:
            second_done.set()
        return item

    assert list(parallel_map(work, range(6), threads=2)) == list(range(6))


@pytest.mark.parametrize("threads", [1, 3])
def test_items_are_taken_only_as_results_are(threads):
    taken = []

    def items():
        for item in range(100):
            taken.append(item)
            yield item

    results = parallel_map(lambda item: item, items(), threads)
    assert taken == []
    for consumed in range(1, 20):
        next(results)
        assert len(taken) < consumed + 2 * threads
    results.close()
    assert len(taken) < 20 + 2 * threads


def test_an_error_is_raised_where_its_result_would_have_been():
    def work(item: int) -> int:
        if item in (3, 5):
            raise ValueError(f"item {item}")
        return item

    results = parallel_map(work, range(1000), threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3"):
        next(results)


def test_an_error_of_the_items_is_raised_too():
    def items():
        yield 1
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(parallel_map(lambda item: item, items()))


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("fails", [False, True])
def test_each_thread_computes_alone_and_the_callers_number_is_restored(fails):
    seen = set()

    def work(item: int) -> None:
        seen.add((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        if fails and item == 9:
            raise ValueError

    try:
        list(parallel_map(work, range(10)))
    except ValueError:
        assert fails
    assert seen == {(False, 1)}
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_an_abandoned_map_restores_the_number_too():
    results = parallel_map(lambda item: item, range(100))
    next(results)
    results.close()
    assert torch.get_num_threads() == 3
