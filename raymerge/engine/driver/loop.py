"""The learning loop: send λ to every worker, sum their gradients in rank order, take an Adam step.

Only K·L numbers travel, and the same loop serves one process and a cluster: only the group differs.
Reactions to collapses and bad steps are left to ``monitor``, writing records to the caller.

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
    """The sum of all workers' results of one step.

    ``gradient`` (K, L); ``loss``, ``entropy`` (M,) by task; ``probabilities`` (M, C): the mean
    predictions. ``phases``: the seconds of the slowest worker by phase.
    """

    gradient: FloatArray
    loss: FloatArray
    entropy: FloatArray
    probabilities: FloatArray
    phases: dict[str, float]
    details: Mapping[str, FloatArray] = field(default_factory=dict)
    """The sums of ``StepResult.details``; empty unless the request asked for them."""


@dataclass(frozen=True)
class StepRecord:
    """The metrics of one step, at the λ *before* its update. ``step`` counts from 1.

    ``skipped``: the reason why λ was not updated; ``loss`` is then None and the tasks' metrics are
    empty.
    """

    step: int
    loss: float | None
    entropy: dict[str, float]
    lambdas: dict[str, float]
    marginal_entropy: dict[str, float]
    """The entropy of each task's running mean prediction; it falls where predictions collapse."""
    seconds: float
    phases: dict[str, float]
    skipped: str | None = None


Observe = Callable[[StepRecord, LearningState], None]
"""A function called after every step with its record and the new state."""


@dataclass(frozen=True)
class Learning:
    """The inputs of a loop over λ.

    ``steps``: the steps of the loop; ``inner_steps``: the optimizer's steps within each, for loops
    that have them. ``adapted_tasks``: the indices of the tasks with examples. ``load``: the request
    that made the workers ready; ``inner_load``: the one for the inner steps.
    """

    group: WorkerGroup
    options: Any
    optimizer: Adam
    steps: int
    inner_steps: int
    monitor: Monitor
    adapted_tasks: Sequence[int]
    load: LoadRequest
    inner_load: LoadRequest


def adam(learning: Learning, start: LearningState, observe: Observe) -> LearningState:
    """Run AdaMerging's loop: ``learning.steps`` steps of Adam on λ."""
    return learn(
        learning.group, learning.optimizer, start, learning.steps, learning.monitor, observe
    )


def sum_results(results: Sequence[StepResult], request: StepRequest, workers: int) -> StepTotal:
    """Sum in rank order, never in arrival order, so that the same results give the same bits.

    Raises :class:`RunError` unless there is exactly one result of this step per rank.
    """
    ordered = sorted(results, key=lambda result: result.rank)
    keys = [(result.rank, result.step) for result in ordered]
    if keys != [(rank, request.step) for rank in range(workers)]:
        raise RunError(
            f"step {request.step + 1}: {workers} workers returned results (rank, step) {keys}; "
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
    skipped, as ``monitor`` decides.
    """
    state = start
    for _ in range(start.step, steps):
        start_s = time.perf_counter()
        lambdas_KL = optimizer.effective(state.lambdas)
        try:
            total, gradient_KL = _descend(group, optimizer, monitor, state, lambdas_KL)
        except NonFiniteError as error:
            # Nothing of this step enters λ, its moments or the monitor's averages.
            state = monitor.skip(state, error)
            seconds = time.perf_counter() - start_s
            observe(_skip_record(state, lambdas_KL, monitor, seconds, error), state)
            continue
        # Update λ, and keep the first λ for a task that may have to be restored.
        origin = state.lambdas if state.start is None else state.start
        adam = optimizer.update(state.adam, gradient_KL)
        state = replace(state, adam=adam, start=origin, skipped_in_a_row=0)
        # The monitor sees the predictions of the step that led to this state.
        predictions = torch.from_numpy(total.entropy), torch.from_numpy(total.probabilities)
        state = monitor.observe(state, *predictions)
        seconds = time.perf_counter() - start_s
        observe(step_record(state, total, lambdas_KL, monitor, seconds), state)
    return state


def _descend(
    group: Stepper, optimizer: Adam, monitor: Monitor, state: LearningState, lambdas_KL: Tensor
) -> tuple[StepTotal, Tensor]:
    """Return the next step's total at ``lambdas_KL`` and the gradient (K, L) to follow."""
    total = _evaluate(group, monitor, state, lambdas_KL)
    gradient_KL = torch.from_numpy(total.gradient)
    if optimizer.sharpness:
        above_KL = optimizer.ascend(lambdas_KL, gradient_KL)
        gradient_KL = torch.from_numpy(_evaluate(group, monitor, state, above_KL).gradient)
    return total, gradient_KL


def _evaluate(
    group: Stepper, monitor: Monitor, state: LearningState, lambdas_KL: Tensor
) -> StepTotal:
    """Return loss and gradient of the next step's examples at ``lambdas_KL``."""
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


def step_record(
    state: LearningState, total: StepTotal, lambdas_KL: Tensor, monitor: Monitor, seconds: float
) -> StepRecord:
    """Return the record of the step that led to ``state`` from ``lambdas_KL``."""
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
    """Return each merged task's λ, averaged over the layers."""
    return {
        name: float(lambdas_KL[row].mean())
        for name, row in zip(monitor.tasks, monitor.rows, strict=True)
        if row >= 0
    }


def _skip_record(
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

    A gradient does not show its tasks, so the step is requested again for each task alone.
    """
    names = [name for name, loss in zip(tasks, total.loss, strict=True) if not np.isfinite(loss)]
    what = "loss" if names else "gradient"
    if not names:
        if np.isfinite(total.gradient).all():
            return
        names = _tasks_without_gradient(request, tasks, group)
    of = f" of task {', '.join(names)}" if names else ""
    raise NonFiniteError(f"the {what}{of} is NaN or infinite", request.step)


def _tasks_without_gradient(
    request: StepRequest, tasks: Sequence[str], group: Stepper
) -> list[str]:
    """Return the tasks whose examples alone give a gradient that is not finite."""
    weights_M = np.ones(len(tasks)) if request.weights is None else request.weights
    names = []
    for m, name in enumerate(tasks):
        alone = replace(request, weights=np.where(np.arange(len(tasks)) == m, weights_M, 0.0))
        total = sum_results(group.step(alone), alone, group.workers)
        if not np.isfinite(total.gradient).all():
            names.append(name)
    return names


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
