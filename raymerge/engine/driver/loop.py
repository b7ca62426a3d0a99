"""The loop: send λ to every worker, sum their gradients in rank order, take an Adam step.

Only K·L numbers travel. One loop for one process and for a cluster: what differs is the group.

Legend: K models, M tasks, L layers, C classes of the task with the most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymerge.engine.driver.groups import Stepper, WorkerGroup
from raymerge.engine.driver.monitor import Monitor
from raymerge.engine.driver.state import LearningState
from raymerge.engine.messages import FloatArray, LoadRequest, StepRequest, StepResult
from raymerge.errors import NonFiniteError, RunError
from raymerge.merging.optimizer import Adam


@dataclass(frozen=True)
class StepTotal:
    """All workers' shares of one step, summed: gradient (K, L), loss and entropy per task (M,),
    mean predictions (M, C)."""

    gradient: FloatArray
    loss: FloatArray
    entropy: FloatArray
    probabilities: FloatArray
    phases: dict[str, float]
    details: Mapping[str, FloatArray] = field(default_factory=dict)
    """See ``StepResult.details``, of all layers; only where the request wanted it."""


@dataclass(frozen=True)
class StepRecord:
    """What one step reports, at the λ *before* its update. ``step`` counts from 1.

    ``skipped``: why λ was left as it was; then ``loss`` is None and nothing is said by task.
    """

    step: int
    loss: float | None
    entropy: dict[str, float]
    lambdas: dict[str, float]
    marginal_entropy: dict[str, float]
    """Of each task's running mean prediction: it falls where predictions collapse."""
    seconds: float
    phases: dict[str, float]
    skipped: str | None = None


Observe = Callable[[StepRecord, LearningState], None]
"""Called after every step with its record and the state that it led to."""


@dataclass(frozen=True)
class Learning:
    """The inputs of a loop over λ.

    ``steps``: of the loop; ``inner_steps``: of the optimizer within each, for loops that have some.
    ``adapted``: the indices of the tasks with examples. ``load``: the request that made the workers
    ready; ``inner_load``: the one for the inner steps.
    """

    group: WorkerGroup
    options: Any
    optimizer: Adam
    steps: int
    inner_steps: int
    monitor: Monitor
    adapted: Sequence[int]
    load: LoadRequest
    inner_load: LoadRequest


def adam(learning: Learning, start: LearningState, observe: Observe) -> LearningState:
    """AdaMerging's loop."""
    return learn(
        learning.group, learning.optimizer, start, learning.steps, learning.monitor, observe
    )


def sum_results(results: Sequence[StepResult], request: StepRequest, workers: int) -> StepTotal:
    """Sum in rank order, never in arrival order, so that the same shares give the same bits.

    Raises :class:`RunError` unless there is exactly one result of this step per rank.
    """
    ordered = sorted(results, key=lambda result: result.rank)
    answers = [(result.rank, result.step) for result in ordered]
    if answers != [(rank, request.step) for rank in range(workers)]:
        raise RunError(
            f"step {request.step + 1}: {workers} workers gave results (rank, step) {answers}; "
            "expected one of each rank, all of this step"
        )
    return StepTotal(
        gradient=_sum([r.gradient for r in ordered]),
        loss=_sum([r.loss for r in ordered]),
        entropy=_sum([r.entropy for r in ordered]),
        probabilities=_sum([r.probabilities for r in ordered]),
        phases=_slowest([r.seconds for r in ordered]),
        details={name: _sum([r.details[name] for r in ordered]) for name in ordered[0].details},
    )


def learn(
    group: Stepper,
    optimizer: Adam,
    start: LearningState,
    steps: int,
    monitor: Monitor,
    observe: Observe,
) -> LearningState:
    """Minimise the objective over λ from ``start`` (possibly a resumed state) to ``steps`` steps.

    ``observe`` is called after each step with its record and the new state. A step whose loss or
    gradient is not finite changes nothing: it raises :class:`NonFiniteError` naming the task, or is
    skipped, as ``monitor`` says.
    """
    state = start
    for _ in range(start.step, steps):
        began = time.perf_counter()
        lambdas_KL = optimizer.effective(state.lambdas)
        try:
            total, gradient_KL = _descend(group, optimizer, monitor, state, lambdas_KL)
        except NonFiniteError as error:
            state = monitor.skip(state, error)
            seconds = time.perf_counter() - began
            observe(_skipped(state, lambdas_KL, monitor, seconds, error), state)
            continue
        origin = state.lambdas if state.start is None else state.start
        adam = optimizer.update(state.adam, gradient_KL)
        state = replace(state, adam=adam, start=origin, skipped_in_a_row=0)
        predictions = torch.from_numpy(total.entropy), torch.from_numpy(total.probabilities)
        state = monitor.observe(state, *predictions)
        observe(record(state, total, lambdas_KL, monitor, time.perf_counter() - began), state)
    return state


def _descend(
    group: Stepper, optimizer: Adam, monitor: Monitor, state: LearningState, lambdas_KL: Tensor
) -> tuple[StepTotal, Tensor]:
    """The next step's results at ``lambdas_KL``, and the gradient (K, L) to follow."""
    total = _evaluate(group, monitor, state, lambdas_KL)
    gradient_KL = torch.from_numpy(total.gradient)
    if optimizer.sharpness:
        above_KL = optimizer.ascend(lambdas_KL, gradient_KL)
        gradient_KL = torch.from_numpy(_evaluate(group, monitor, state, above_KL).gradient)
    return total, gradient_KL


def _evaluate(
    group: Stepper, monitor: Monitor, state: LearningState, lambdas_KL: Tensor
) -> StepTotal:
    """Loss and gradient of the next step's examples at ``lambdas_KL``."""
    weights_M, marginals_MC = monitor.weights(state), monitor.marginals(state)
    request = StepRequest(
        state.step,
        lambdas_KL.numpy(),
        weights=None if weights_M is None else weights_M.numpy(),
        marginals=None if marginals_MC is None else marginals_MC.numpy(),
    )
    total = sum_results(group.step(request), request, group.workers)
    require_finite(total, request, monitor.tasks, group)
    return total


def record(
    state: LearningState, total: StepTotal, lambdas_KL: Tensor, monitor: Monitor, seconds: float
) -> StepRecord:
    """The record of the step that led to ``state`` from ``lambdas_KL``."""
    tasks = [(m, name) for m, name in enumerate(monitor.tasks) if total.probabilities[m].any()]
    marginal: dict[str, float] = {}
    if state.monitor is not None:
        marginal = {name: float(state.monitor.guard.marginal[m]) for m, name in tasks}
    return StepRecord(
        step=state.step,
        loss=float(total.loss.sum()),
        entropy={name: float(total.entropy[m]) for m, name in tasks},
        lambdas=_means(lambdas_KL, monitor),
        marginal_entropy=marginal,
        seconds=seconds,
        phases=total.phases,
    )


def _means(lambdas_KL: Tensor, monitor: Monitor) -> dict[str, float]:
    """λ by task, averaged over the layers."""
    return {
        name: float(lambdas_KL[row].mean())
        for name, row in zip(monitor.tasks, monitor.rows, strict=True)
        if row >= 0
    }


def _skipped(
    state: LearningState,
    lambdas_KL: Tensor,
    monitor: Monitor,
    seconds: float,
    error: NonFiniteError,
) -> StepRecord:
    return StepRecord(
        step=state.step,
        loss=None,
        entropy={},
        lambdas=_means(lambdas_KL, monitor),
        marginal_entropy={},
        seconds=seconds,
        phases={},
        skipped=error.what,
    )


def require_finite(
    total: StepTotal, request: StepRequest, tasks: Sequence[str], group: Stepper
) -> None:
    """Raise :class:`NonFiniteError` naming the tasks whose loss or gradient is not finite.

    Of a gradient it is found out by asking again for each task alone.
    """
    bad = [name for name, loss in zip(tasks, total.loss, strict=True) if not np.isfinite(loss)]
    what = "loss" if bad else "gradient"
    if not bad:
        if np.isfinite(total.gradient).all():
            return
        bad = _without_gradient(request, tasks, group)
    of = f" of task {', '.join(bad)}" if bad else ""
    raise NonFiniteError(f"the {what}{of} is NaN or infinite", request.step)


def _without_gradient(request: StepRequest, tasks: Sequence[str], group: Stepper) -> list[str]:
    """The tasks whose images alone give a gradient that is not finite."""
    weights_M = np.ones(len(tasks)) if request.weights is None else request.weights
    bad = []
    for m, name in enumerate(tasks):
        alone = replace(request, weights=np.where(np.arange(len(tasks)) == m, weights_M, 0.0))
        total = sum_results(group.step(alone), alone, group.workers)
        if not np.isfinite(total.gradient).all():
            bad.append(name)
    return bad


def _sum(parts: Sequence[FloatArray]) -> FloatArray:
    total = np.zeros_like(parts[0])
    for part in parts:
        total += part
    return total


def _slowest(phases: Sequence[Mapping[str, float]]) -> dict[str, float]:
    out: dict[str, float] = {}
    for laps in phases:
        for phase, seconds in laps.items():
            out[phase] = max(out.get(phase, 0.0), seconds)
    return out
