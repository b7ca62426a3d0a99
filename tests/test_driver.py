"""The loop without workers: rank order, refusals, and that a bad step changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from raymerge.driver import learn, sum_results
from raymerge.errors import RunError
from raymerge.merging.optimizer import Adam, AdamState
from raymerge.messages import StepRequest, StepResult


def _result(rank: int, gradient: np.ndarray, step: int = 0, loss: float = 1.0) -> StepResult:
    tasks = len(gradient)
    return StepResult(step, rank, 0, gradient, np.full(tasks, loss), np.full(tasks, 0.5))


class Scripted:
    """A group whose workers answer from a function of (request, rank)."""

    def __init__(self, workers: int, answer: Callable[[StepRequest, int], StepResult]) -> None:
        self.workers = workers
        self._answer = answer

    def step(self, request: StepRequest) -> list[StepResult]:
        return [self._answer(request, rank) for rank in range(self.workers)]


def test_the_sum_does_not_depend_on_the_order_of_arrival() -> None:
    # 1e16 + 1 − 1e16 is 0 or 1 by order: a sum in arrival order gives other bits.
    parts = [_result(rank, np.array([[value]])) for rank, value in enumerate((1e16, 1.0, -1e16))]
    request = StepRequest(0, np.zeros((1, 1)))
    orders = [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0)]
    sums = {sum_results([parts[i] for i in o], request, 3).gradient.item() for o in orders}
    assert sums == {(1e16 + 1.0) - 1e16}


@pytest.mark.parametrize("ranks", [(0,), (0, 0), (0, 2), (0, 1, 2)])
def test_every_rank_must_answer_once(ranks: tuple[int, ...]) -> None:
    results = [_result(rank, np.ones((1, 1))) for rank in ranks]
    with pytest.raises(RunError, match="expected one of each rank"):
        sum_results(results, StepRequest(0, np.zeros((1, 1))), 2)


def test_a_late_result_of_another_step_is_refused() -> None:
    with pytest.raises(RunError, match="all of this step"):
        sum_results([_result(0, np.ones((1, 1)), step=6)], StepRequest(7, np.zeros((1, 1))), 1)


def test_learning_minimises_a_quadratic_and_records_every_step() -> None:
    target = np.array([[0.2, 0.7], [0.9, 0.1]])

    def answer(request: StepRequest, rank: int) -> StepResult:
        return _result(rank, request.lambdas - target, request.step)

    records = []
    start = AdamState.start(torch.full((2, 2), 0.3))
    end = learn(
        Scripted(2, answer),  # type: ignore[arg-type]
        Adam(lr=0.05),
        start,
        300,
        ["a", "b"],
        lambda record, state: records.append(record),
    )
    assert np.allclose(end.lambdas.numpy(), target, atol=1e-2)
    assert [record.step for record in records] == list(range(1, 301))
    assert records[0].lambdas == {"a": pytest.approx(0.3), "b": pytest.approx(0.3)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_names_the_task_and_changes_nothing(bad: float) -> None:
    def answer(request: StepRequest, rank: int) -> StepResult:
        result = _result(rank, np.ones((2, 1)), request.step)
        if request.step == 3:
            result.loss[1] = bad
        return result

    seen = []
    with pytest.raises(RunError, match=r"step 4: the loss of task gtsrb is NaN or infinite"):
        learn(
            Scripted(1, answer),  # type: ignore[arg-type]
            Adam(),
            AdamState.start(torch.full((2, 1), 0.3)),
            10,
            ["sun", "gtsrb"],
            lambda record, state: seen.append(state.step),
        )
    assert seen == [1, 2, 3]


def test_resuming_from_any_step_gives_the_same_bits() -> None:
    def answer(request: StepRequest, rank: int) -> StepResult:
        rng = np.random.default_rng(request.step)
        return _result(rank, rng.normal(size=(3, 4)) + request.lambdas, request.step)

    states = {}
    start = AdamState.start(torch.full((3, 4), 0.3))
    group, tasks = Scripted(2, answer), ["a", "b", "c"]
    whole = learn(group, Adam(), start, 20, tasks, lambda r, s: states.update({s.step: s}))  # type: ignore[arg-type]
    for step in (1, 7, 19):
        again = learn(group, Adam(), states[step], 20, tasks, lambda r, s: None)  # type: ignore[arg-type]
        assert torch.equal(again.lambdas, whole.lambdas)
