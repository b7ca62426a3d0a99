"""The learning loop without workers: rank order, errors, skipped steps and resuming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from raymerge.engine.driver.loop import StepRecord, learn, sum_results
from raymerge.engine.driver.monitor import Monitor
from raymerge.engine.driver.state import LearningState
from raymerge.engine.messages import StepRequest, StepResult
from raymerge.errors import NonFiniteError, RunError
from raymerge.merging.method import Monitoring
from raymerge.merging.optimizer import Adam


def _result(rank: int, gradient: np.ndarray, step: int = 0, loss: float = 1.0) -> StepResult:
    """A result for as many tasks as models, each with two equally likely classes."""
    tasks = len(gradient)
    halves, evenly = np.full(tasks, 0.5), np.full((tasks, 2), 0.5)
    return StepResult(step, rank, 0, gradient, np.full(tasks, loss), halves, evenly)


def _monitor(*tasks: str) -> Monitor:
    return Monitor(tasks, range(len(tasks)))


class Scripted:
    """A group whose results are a function of (request, rank)."""

    def __init__(self, workers: int, result: Callable[[StepRequest, int], StepResult]) -> None:
        self.workers = workers
        self._result = result

    def step(self, request: StepRequest) -> list[StepResult]:
        return [self._result(request, rank) for rank in range(self.workers)]


def test_the_sum_does_not_depend_on_the_order_of_arrival() -> None:
    # 1e16 + 1 − 1e16 is 0 or 1 by order: a sum in arrival order gives other bits.
    parts = [_result(rank, np.array([[value]])) for rank, value in enumerate((1e16, 1.0, -1e16))]
    request = StepRequest(0, np.zeros((1, 1)))
    orders = [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0)]
    sums = {sum_results([parts[i] for i in o], request, 3).gradient.item() for o in orders}
    assert sums == {(1e16 + 1.0) - 1e16}


@pytest.mark.parametrize("ranks", [(0,), (0, 0), (0, 2), (0, 1, 2)])
def test_every_rank_must_return_one_result(ranks: tuple[int, ...]) -> None:
    results = [_result(rank, np.ones((1, 1))) for rank in ranks]
    with pytest.raises(RunError, match="expected one of each rank"):
        sum_results(results, StepRequest(0, np.zeros((1, 1))), 2)


def test_a_late_result_of_another_step_is_refused() -> None:
    with pytest.raises(RunError, match="all of this step"):
        sum_results([_result(0, np.ones((1, 1)), step=6)], StepRequest(7, np.zeros((1, 1))), 1)


def test_learning_minimises_a_quadratic_and_records_every_step() -> None:
    target = np.array([[0.2, 0.7], [0.9, 0.1]])

    def result(request: StepRequest, rank: int) -> StepResult:
        return _result(rank, request.lambdas - target, request.step)

    records = []
    start = LearningState.initial(torch.full((2, 2), 0.3))
    end = learn(
        Scripted(2, result),  # type: ignore[arg-type]
        Adam(lr=0.05),
        start,
        300,
        _monitor("a", "b"),
        lambda record, state: records.append(record),
    )
    assert np.allclose(end.lambdas.numpy(), target, atol=1e-2)
    assert [record.step for record in records] == list(range(1, 301))
    assert records[0].lambdas == {"a": pytest.approx(0.3), "b": pytest.approx(0.3)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_names_the_task_and_changes_nothing(bad: float) -> None:
    def result(request: StepRequest, rank: int) -> StepResult:
        step_result = _result(rank, np.ones((2, 1)), request.step)
        if request.step == 3:
            step_result.loss[1] = bad
        return step_result

    seen = []
    with pytest.raises(RunError, match=r"step 4: the loss of task gtsrb is NaN or infinite"):
        learn(
            Scripted(1, result),  # type: ignore[arg-type]
            Adam(),
            LearningState.initial(torch.full((2, 1), 0.3)),
            10,
            _monitor("sun", "gtsrb"),
            lambda record, state: seen.append(state.step),
        )
    assert seen == [1, 2, 3]


class NanGroup:
    """A group whose gradient (or loss) of ``task`` is NaN at ``steps``; it sums over the tasks."""

    workers = 2

    def __init__(self, task: int, steps: range, where: str = "gradient") -> None:
        self.task, self.steps, self.where = task, steps, where
        self.requests = 0

    def step(self, request: StepRequest) -> list[StepResult]:
        self.requests += 1
        weights_M = np.ones(3) if request.weights is None else request.weights
        gradient_KL = np.random.default_rng(request.step).normal(size=(3, 2)) * weights_M.sum()
        results = [_result(rank, gradient_KL.copy(), request.step) for rank in range(2)]
        if request.step in self.steps and weights_M[self.task]:
            if self.where == "loss":
                results[1].loss[self.task] = np.nan
            else:  # the loss is finite, and the sum over the tasks spreads it to all rows
                results[1].gradient[:] = np.nan
        return results


def _after(
    group: NanGroup, steps: int, nonfinite: str = "skip", start: LearningState | None = None
) -> tuple[LearningState, list[StepRecord]]:
    records: list[StepRecord] = []
    monitor = replace(
        _monitor("sun", "gtsrb", "dtd"),
        reactions=Monitoring("warn", nonfinite),  # type: ignore[arg-type]
    )
    state = learn(
        group,  # type: ignore[arg-type]
        Adam(lr=0.01),
        start or LearningState.initial(torch.full((3, 2), 0.3)),
        steps,
        monitor,
        lambda record, state: records.append(record),
    )
    return state, records


def test_a_gradient_that_is_not_finite_names_the_task() -> None:
    group = NanGroup(1, range(2, 3))
    with pytest.raises(NonFiniteError, match=r"step 3: the gradient of task gtsrb is NaN or inf"):
        _after(group, 5, "stop")
    assert group.requests == 3 + 3  # the three steps, and once more for each task alone


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_skipped_step_leaves_no_trace(where: str, at: int) -> None:
    """The state is that of the other steps alone."""
    state, records = _after(NanGroup(1, range(at, at + 1), where), 6)

    class Without(NanGroup):
        def step(self, request: StepRequest) -> list[StepResult]:
            shown = replace(request, step=request.step + (request.step >= at))
            return [replace(r, step=request.step) for r in super().step(shown)]

    expected, _ = _after(Without(1, range(0)), 5)
    for name in ("lambdas", "mean", "square"):
        assert torch.equal(getattr(state.adam, name), getattr(expected.adam, name))
    assert torch.equal(state.monitor.marginals, expected.monitor.marginals)
    assert (state.step, state.adam.updates) == (6, 5)
    assert [record.step for record in records if record.skipped] == [at + 1]
    assert records[at].loss is None
    assert records[at].skipped == f"the {where} of task gtsrb is NaN or infinite"


def test_ten_steps_in_a_row_may_be_skipped_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    state, _ = _after(NanGroup(0, range(3, 13)), 20)
    assert state.adam.updates == 10
    assert len([line for line in caplog.messages if "skipped" in line]) == 5
    with pytest.raises(RunError, match=r"step 14: .* of task sun .*after 10 steps .* since step 3"):
        _after(NanGroup(0, range(3, 14)), 20)


def test_steps_skipped_before_a_resume_still_count() -> None:
    half, _ = _after(NanGroup(0, range(3, 13)), 9)
    resumed, _ = _after(NanGroup(0, range(3, 13)), 20, start=half)
    whole, _ = _after(NanGroup(0, range(3, 13)), 20)
    assert torch.equal(resumed.lambdas, whole.lambdas)
    with pytest.raises(RunError, match="after 10 steps in a row"):
        _after(NanGroup(0, range(3, 14)), 20, start=half)


def test_resuming_from_any_step_gives_the_same_bits() -> None:
    def result(request: StepRequest, rank: int) -> StepResult:
        rng = np.random.default_rng(request.step)
        return _result(rank, rng.normal(size=(3, 4)) + request.lambdas, request.step)

    states = {}
    start = LearningState.initial(torch.full((3, 4), 0.3))
    group, monitor = Scripted(2, result), _monitor("a", "b", "c")
    whole = learn(group, Adam(), start, 20, monitor, lambda r, s: states.update({s.step: s}))  # type: ignore[arg-type]
    for step in (1, 7, 19):
        again = learn(group, Adam(), states[step], 20, monitor, lambda r, s: None)  # type: ignore[arg-type]
        assert torch.equal(again.lambdas, whole.lambdas)


# --- sharpness ---------------------------------------------------------------------------------

CURVATURE = np.diag([1.0, 3.0, 0.2, 5.0])
TARGET = np.array([[0.2, 0.7], [0.9, 0.1]])


def _slope(lambdas: np.ndarray) -> np.ndarray:
    """The gradient of ½ (λ − target)ᵀ A (λ − target)."""
    return (CURVATURE @ (lambdas - TARGET).ravel()).reshape(2, 2)


class Quadratic(Scripted):
    """Records its requests."""

    def __init__(self) -> None:
        self.requests: list[StepRequest] = []
        super().__init__(2, self._half)

    def _half(self, request: StepRequest, rank: int) -> StepResult:
        self.requests += [request] if rank == 0 else []
        loss = float(np.abs(request.lambdas).sum())
        return _result(rank, _slope(request.lambdas) / 2, request.step, loss)


@pytest.mark.parametrize("rho", [0.05, 0.5])
@pytest.mark.parametrize("clamp", ["none", "projected", "forward"])
def test_a_sharpness_aware_step_takes_its_gradient_up_the_slope(rho, clamp) -> None:
    """The gradient is taken at λ + ρ g/‖g‖ on the same images; the record shows λ itself."""
    group, optimizer = Quadratic(), Adam(lr=0.05, clamp=clamp, sharpness=rho)
    records: list[StepRecord] = []
    start = LearningState.initial(torch.tensor([[0.3, 0.3], [1.2, -0.1]]))
    end = learn(
        group,  # type: ignore[arg-type]
        optimizer,
        start,
        5,
        _monitor("a", "b"),
        lambda record, state: records.append(record),
    )
    state = start
    for step in range(5):
        here, above = group.requests[2 * step], group.requests[2 * step + 1]
        used = optimizer.effective(state.lambdas).numpy()
        gradient = _slope(used)
        ascended = used + rho * gradient / np.sqrt((gradient**2).sum())
        assert here.step == above.step == step
        assert np.array_equal(here.lambdas, used)
        np.testing.assert_allclose(above.lambdas, ascended, rtol=1e-12, atol=1e-12)
        adam = optimizer.update(state.adam, torch.from_numpy(_slope(above.lambdas)))
        state = replace(state, adam=adam)
        # Two tasks, two workers.
        assert records[step].loss == pytest.approx(4 * np.abs(used).sum())
    assert len(group.requests) == 10
    torch.testing.assert_close(end.lambdas, state.lambdas, rtol=1e-12, atol=0)


def test_without_sharpness_each_step_sends_one_request_and_a_zero_gradient_is_allowed() -> None:
    group = Quadratic()
    start = LearningState.initial(torch.zeros(2, 2))
    learn(group, Adam(), start, 3, _monitor("a", "b"), lambda r, s: None)  # type: ignore[arg-type]
    assert [request.step for request in group.requests] == [0, 1, 2]
    flat = LearningState.initial(torch.from_numpy(TARGET))  # no slope, so no way up
    end = learn(group, Adam(sharpness=0.1), flat, 1, _monitor("a", "b"), lambda r, s: None)  # type: ignore[arg-type]
    assert torch.equal(end.lambdas, flat.lambdas)


def test_tasks_need_not_be_models() -> None:
    """Three models; two tasks with images, for models 0 and 2, and a task that is only tested."""

    def result(request: StepRequest, rank: int) -> StepResult:
        entropy, probabilities = np.array([0.5, 0.4, 0.0]), np.array([[1.0, 0], [0.5, 0.5], [0, 0]])
        return StepResult(request.step, rank, 0, np.ones((3, 1)), entropy, entropy, probabilities)

    records: list[StepRecord] = []
    learn(
        Scripted(1, result),  # type: ignore[arg-type]
        Adam(),
        LearningState.initial(torch.tensor([[0.1], [0.2], [0.3]])),
        1,
        Monitor(("a", "c", "tested"), (0, 2, -1)),
        lambda record, state: records.append(record),
    )
    (record,) = records
    assert record.entropy == {"a": 0.5, "c": 0.4}
    assert record.lambdas == {"a": pytest.approx(0.1), "c": pytest.approx(0.3)}
    assert record.marginal_entropy == {"a": 0.0, "c": pytest.approx(np.log(2))}
