"""The reactions to a task's collapse, and that a resumed run continues bit for bit.

Legend: K models, M tasks, L layers, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raymerge.engine.driver.loop import StepRecord, learn
from raymerge.engine.driver.monitor import Monitor
from raymerge.engine.driver.state import LearningState
from raymerge.engine.messages import StepRequest, StepResult
from raymerge.errors import RunError
from raymerge.merging.guard import CollapseGuard
from raymerge.merging.method import Monitoring
from raymerge.merging.optimizer import Adam
from raymerge.runs.state import learning_states

TASKS = ("sun", "gtsrb", "dtd")
K, L, C = 3, 2, 4
COLLAPSE = 8
"""The step from which all predictions of gtsrb are one class."""
START_KL = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], dtype=torch.float64)


def _monitor(collapse: str = "warn", infomax: bool = False, rows: tuple[int, ...] = (0, 1, 2)):
    guard = CollapseGuard(momentum=0.5, warmup_steps=3)
    return Monitor(TASKS, rows, Monitoring(collapse), infomax, guard)  # type: ignore[arg-type]


def _predictions(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Entropies (M,) and mean predictions (M, C) of a step; sun and dtd stay healthy."""
    entropy_M, mean_p_MC = np.ones(len(TASKS)), np.full((len(TASKS), C), 1 / C)
    if step >= COLLAPSE:
        entropy_M[1], mean_p_MC[1] = 0.1, np.eye(C)[2]
    entropy_M[0] = 1 / (1 + step)  # more certain of images of all classes: healthy
    return entropy_M, mean_p_MC


class Scripted:
    """A group of two workers whose gradient depends on every part of a request."""

    workers = 2

    def __init__(self) -> None:
        self.requests: list[StepRequest] = []

    def step(self, request: StepRequest) -> list[StepResult]:
        self.requests.append(request)
        counted_M = np.ones(len(TASKS)) if request.weights is None else request.weights
        entropy_M, mean_p_MC = _predictions(request.step)
        gradient_KL = np.random.default_rng(request.step).normal(size=(K, L)) + request.lambdas
        gradient_KL += counted_M[:, None]
        if request.marginals is not None:
            gradient_KL += request.marginals.sum(0)[:L]
        half_MC = mean_p_MC * counted_M[:, None] / 2
        loss_M, half_M = entropy_M * counted_M / 2, entropy_M * counted_M / 2
        return [
            StepResult(request.step, rank, 0, gradient_KL / 2, loss_M, half_M, half_MC)
            for rank in range(2)
        ]


def _learn(
    monitor: Monitor,
    steps: int = 40,
    start: LearningState | None = None,
    observe: Callable[[StepRecord, LearningState], None] = lambda record, state: None,
) -> tuple[LearningState, Scripted]:
    group = Scripted()
    start = start or LearningState.initial(START_KL)
    state = learn(group, Adam(lr=0.01, clamp="none"), start, steps, monitor, observe)  # type: ignore[arg-type]
    return state, group


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_collapse_is_warned_of_once_by_name_and_changes_nothing(caplog):
    warned, _ = _learn(_monitor("warn"))
    (message,) = _warnings(caplog)
    assert "task gtsrb collapses" in message
    assert "method.collapse: restore" in message
    ignored, _ = _learn(_monitor("ignore"))
    assert len(_warnings(caplog)) == 1  # ignoring logs nothing
    assert torch.equal(warned.lambdas, ignored.lambdas)


@pytest.mark.parametrize("collapse", ["warn", "stop", "restore"])
def test_healthy_learning_is_left_alone(caplog, collapse):
    """Entropy that falls alone, as sun's does, is the aim of learning."""
    state, group = _learn(_monitor(collapse), steps=COLLAPSE)
    assert _warnings(caplog) == []
    assert all(request.weights is None for request in group.requests)
    assert torch.equal(state.lambdas, _learn(_monitor("ignore"), steps=COLLAPSE)[0].lambdas)


def test_stop_raises_an_error_that_names_the_task_the_step_and_the_remedy():
    seen: list[int] = []
    what = r"task gtsrb collapses.*from 1\.39 to 0\.\d\d nats"
    with pytest.raises(RunError, match=what) as raised:
        _learn(_monitor("stop"), observe=lambda record, state: seen.append(state.step))
    message = str(raised.value)
    assert message.startswith(f"step {seen[-1] + 1}: ")
    assert "set method.collapse to warn or restore, or use method.objective: kl" in message
    assert seen[-1] >= COLLAPSE


@pytest.mark.parametrize("rows", [(0, 1, 2), (2, 0, 1)])
def test_restore_resets_the_row_and_its_moments_and_counts_its_images_no_more(caplog, rows):
    """Only the task's own row is reset, wherever it is; the others are as without a reaction."""
    states: dict[int, LearningState] = {}
    _, group = _learn(
        _monitor("restore", rows=rows),
        observe=lambda record, state: states.update({state.step: state}),
    )
    (message,) = _warnings(caplog)
    assert "task gtsrb collapses" in message
    at = next(step for step, state in states.items() if state.monitor.restored.any())
    plain: dict[int, LearningState] = {}
    _learn(_monitor("ignore"), at, observe=lambda record, state: plain.update({state.step: state}))
    row, others = rows[1], [k for k in range(K) if k != rows[1]]
    assert torch.equal(states[at].lambdas[row], START_KL[row])
    assert not states[at].adam.mean[row].any()
    assert not states[at].adam.square[row].any()
    for name in ("lambdas", "mean", "square"):
        after, ignoring = getattr(states[at].adam, name), getattr(plain[at].adam, name)
        assert torch.equal(after[others], ignoring[others])
    assert torch.equal(states[at - 1].lambdas, plain[at - 1].lambdas)
    for request in group.requests:
        expected = None if request.step < at else [1.0, 0.0, 1.0]
        assert (None if request.weights is None else request.weights.tolist()) == expected


def test_a_record_leaves_a_task_out_once_it_counts_no_more():
    records: list[StepRecord] = []
    _learn(_monitor("restore"), observe=lambda record, state: records.append(record))
    assert list(records[0].entropy) == list(records[0].marginal_entropy) == list(TASKS)
    assert list(records[-1].entropy) == ["sun", "dtd"]
    assert records[-1].marginal_entropy["dtd"] == pytest.approx(np.log(C))
    assert list(records[-1].lambdas) == list(TASKS)


def test_a_task_that_is_not_merged_has_no_row_in_the_record():
    records: list[StepRecord] = []
    _learn(_monitor(rows=(0, -1, 2)), 1, observe=lambda record, state: records.append(record))
    assert list(records[0].lambdas) == ["sun", "dtd"]
    assert records[0].lambdas["dtd"] == pytest.approx(0.55)


def test_only_infomax_sends_the_running_mean_of_the_predictions():
    """The first request has none; then the plain mean follows, and later the exponential one."""
    _, group = _learn(_monitor("ignore"))
    assert all(request.marginals is None for request in group.requests)
    _, group = _learn(_monitor("ignore", infomax=True))
    assert group.requests[0].marginals is None
    marginal_MC = np.zeros((len(TASKS), C))
    for request in group.requests[:-1]:
        weight = max(0.1, 1 / (request.step + 1))
        marginal_MC = (1 - weight) * marginal_MC + weight * _predictions(request.step)[1]
        after = group.requests[request.step + 1].marginals
        assert after is not None
        np.testing.assert_allclose(after, marginal_MC, rtol=1e-12)


@pytest.mark.parametrize("infomax", [False, True])
@pytest.mark.parametrize("collapse", ["warn", "restore"])
def test_a_run_resumed_from_a_saved_state_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, caplog, collapse: str, infomax: bool
):
    monitor = _monitor(collapse, infomax)
    store = learning_states(tmp_path, "config", TASKS, ["a", "b"], keep=100)
    store.claim()
    whole, group = _learn(monitor, observe=lambda record, state: store.save(state))
    assert len(_warnings(caplog)) == 1
    stops = (1, 3, COLLAPSE, COLLAPSE + 1, 12, 20, 39)
    for step in stops:
        state = store._read(store._path(step))
        again, resumed = _learn(monitor, start=state)
        expected = whole.tensors()
        assert again.tensors().keys() == expected.keys()
        for name, value in again.tensors().items():
            assert torch.equal(value, expected[name]), (step, name)
        for one, two in zip(group.requests[step:], resumed.requests, strict=True):
            assert _same(one.weights, two.weights)
            assert _same(one.marginals, two.marginals)
    # A run that is resumed after the collapse does not warn again.
    saved = {step: store._read(store._path(step)).monitor.collapsed for step in stops}
    healthy = sum(not collapsed_M.any() for collapsed_M in saved.values())
    assert 2 < healthy < len(stops)
    assert len(_warnings(caplog)) == 1 + healthy


def _same(one: np.ndarray | None, two: np.ndarray | None) -> bool:
    return (one is None) == (two is None) and (one is None or np.array_equal(one, two))


def test_two_tasks_that_collapse_at_once_are_both_restored():
    monitor, state = _monitor("restore"), LearningState.initial(START_KL)
    for step in range(40):
        uniform = torch.full((3, C), 1 / C, dtype=torch.float64)
        one_class = torch.eye(C, dtype=torch.float64)[:3]
        entropy_M = torch.full((3,), 1.0 if step < COLLAPSE else 0.1, dtype=torch.float64)
        after = Adam(lr=0.01).update(state.adam, torch.ones(K, L, dtype=torch.float64))
        state = replace(state, adam=after, start=START_KL)
        state = monitor.observe(state, entropy_M, uniform if step < COLLAPSE else one_class)
    weights_M = monitor.weights(state)
    assert weights_M is not None
    assert weights_M.tolist() == [0.0, 0.0, 0.0]
