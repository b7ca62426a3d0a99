"""The loops of FW-Merging: every iteration moves λ towards the models that the gradient chooses.

The workers compute the gradients; the formulas are left to ``merging.frank_wolfe``.

Legend: K models, M tasks, L layers, J candidates or chosen models.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from raymerge.config.methods import FwHard, FwSoft
from raymerge.engine.driver.groups import WorkerGroup
from raymerge.engine.driver.loop import (
    Learning,
    Observe,
    StepTotal,
    learn,
    require_finite,
    step_record,
    sum_results,
)
from raymerge.engine.driver.state import LearningState
from raymerge.engine.messages import FloatArray, Incident, StepRequest, StepResult
from raymerge.merging import frank_wolfe as fw
from raymerge.merging.method import Monitoring


def hard(learning: Learning, start: LearningState, observe: Observe) -> LearningState:
    """Move λ towards one model, or one for each layer, in every iteration from ``start``.

    ``start`` may be a resumed state. The loop stops early where the gap of the true oracle is at
    most ``gap``.
    """
    options: FwHard = learning.options
    state, cosine = start, options.oracle == "cosine"
    origin_KL = start.lambdas if start.start is None else start.start
    candidates_JKL = fw.vertices(origin_KL)
    for iteration in range(start.step, learning.steps):
        start_s, current_KL = time.perf_counter(), state.lambdas
        total = _gradient(learning, state, cosine)
        # Choose the candidate that the oracle scores lowest, and move towards it.
        scores_JL = _scores(cosine, state, total, candidates_JKL)
        choice_L = fw.choose(scores_JL, options.granularity == "task")
        vertex_KL = fw.vertex(choice_L, candidates_JKL)
        gap = fw.gap(torch.from_numpy(total.gradient), current_KL, vertex_KL)
        if not cosine and gap <= options.gap:
            break
        rate = fw.rate(iteration) * options.step_size * options.scaling
        lambdas_KL = fw.move(current_KL, vertex_KL, rate)
        # The cosines of every iteration compare with the norm of the first θ.
        start_square_L = state.start_square
        if cosine and start_square_L is None:
            start_square_L = torch.from_numpy(total.details["theta_square"])
        adam = replace(state.adam, lambdas=lambdas_KL, step=iteration + 1)
        state = replace(state, adam=adam, start=origin_KL, start_square=start_square_L)
        seconds = time.perf_counter() - start_s
        observe(step_record(state, total, current_KL, learning.monitor, seconds), state)
    return state


def soft(learning: Learning, start: LearningState, observe: Observe) -> LearningState:
    """Let each task choose a model by its own gradient, then learn a mixture of those, from θ."""
    options: FwSoft = learning.options
    state = start
    for iteration in range(start.step, learning.steps):
        start_s, current_KL = time.perf_counter(), state.lambdas
        # The choice uses the method's own images; the mixture is learned on those of AdaMerging.
        learning.group.load(learning.load)
        chosen_JKL, total = _choose_models(learning, options, state)
        learning.group.load(learning.inner_load)
        init = options.init if iteration == 0 else options.later_init
        lambdas_KL = _learn_mixture(learning, chosen_JKL, current_KL, init)
        state = replace(state, adam=replace(state.adam, lambdas=lambdas_KL, step=iteration + 1))
        seconds = time.perf_counter() - start_s
        observe(step_record(state, total, current_KL, learning.monitor, seconds), state)
    return state


def _choose_models(
    learning: Learning, options: FwSoft, state: LearningState
) -> tuple[Tensor, StepTotal]:
    """Return the tasks' choices as coefficients (J, K, L), and the sum of the tasks' gradients.

    A model, or a layer of it, is chosen once; the later tasks choose among the rest.
    """
    candidates_JKL = fw.vertices(state.lambdas)[:-1]
    cosine, one_for_all = options.oracle == "cosine", options.granularity == "task"
    choices: list[Tensor] = []
    totals: list[StepTotal] = []
    mask_KL = torch.zeros(state.lambdas.shape, dtype=torch.bool)
    for task in learning.adapted_tasks:
        # Only this task's loss counts in the gradient.
        weights_M = np.zeros(len(learning.monitor.tasks))
        weights_M[task] = 1.0
        total = _gradient(learning, state, cosine, weights_M)
        scores_JL = _scores(cosine, state, total, candidates_JKL)
        # With more tasks than models, the last tasks have nothing left to choose.
        if not mask_KL.all():
            scores_JL = scores_JL.masked_fill(mask_KL, torch.inf)
            choice_L = fw.choose(scores_JL, one_for_all)
            mask_KL[choice_L, torch.arange(len(choice_L))] = True
            choices.append(fw.vertex(choice_L, candidates_JKL))
        totals.append(total)
    return torch.stack(choices), _sum(totals)


def _learn_mixture(
    learning: Learning, chosen_JKL: Tensor, lambdas_KL: Tensor, init: float
) -> Tensor:
    """Return λ (K, L) after AdaMerging of ``chosen_JKL``, with base θ(``lambdas_KL``)."""
    mixture = MixtureGroup(learning.group, lambdas_KL, chosen_JKL - lambdas_KL)
    start_JL = torch.full((len(chosen_JKL), lambdas_KL.shape[1]), init)
    # The rows of μ are not models, so nothing is reported or restored by task.
    tasks = learning.monitor.tasks
    monitor = replace(learning.monitor, reactions=Monitoring(), rows=(-1,) * len(tasks))
    state = learn(
        mixture, learning.optimizer, LearningState.initial(start_JL), learning.inner_steps, monitor,
        lambda record, state: None,
    )  # fmt: skip
    return mixture.lambdas(learning.optimizer.effective(state.lambdas))


class MixtureGroup:
    """A group over coefficients μ (J, L) that mix directions D (J, K, L): λ = λ₀ + Σ_j μ_j D_j.

    The loop that learns λ thereby learns μ: ∂ℒ/∂μ_j = Σ_k D_jk ∂ℒ/∂λ_k per layer.
    """

    def __init__(self, group: WorkerGroup, origin_KL: Tensor, directions_JKL: Tensor) -> None:
        self._group, self._origin, self._directions = group, origin_KL, directions_JKL
        is_used_K = directions_JKL.abs().sum((0, 2)) > 0
        self._rows = tuple(is_used_K.nonzero().flatten().tolist())

    @property
    def workers(self) -> int:
        return self._group.workers

    @property
    def incidents(self) -> Sequence[Incident]:
        return self._group.incidents

    def lambdas(self, mu_JL: Tensor) -> Tensor:
        return self._origin + torch.einsum("jl,jkl->kl", mu_JL, self._directions)

    def step(self, request: StepRequest) -> list[StepResult]:
        lambdas_KL = self.lambdas(torch.from_numpy(request.lambdas))
        inner = replace(request, lambdas=lambdas_KL.numpy(), rows=self._rows)
        return [replace(r, gradient=self._mix(r.gradient)) for r in self._group.step(inner)]

    def _mix(self, gradient_KL: FloatArray) -> FloatArray:
        # Copied, because arrays that Ray delivers are read-only.
        return torch.einsum("jkl,kl->jl", self._directions, torch.tensor(gradient_KL)).numpy()


def _gradient(
    learning: Learning, state: LearningState, details: bool, weights_M: FloatArray | None = None
) -> StepTotal:
    request = StepRequest(state.step, state.lambdas.numpy(), weights=weights_M, details=details)
    group = learning.group
    total = sum_results(group.step(request), request, group.workers)
    require_finite(total, request, learning.monitor.tasks, group)
    return total


def _scores(cosine: bool, state: LearningState, total: StepTotal, candidates_JKL: Tensor) -> Tensor:
    """Return each candidate's score per layer, (J, L); the lowest is chosen."""
    products_JL = fw.products(torch.from_numpy(total.gradient), candidates_JKL)
    if not cosine:
        return products_JL
    details = {name: torch.from_numpy(values) for name, values in total.details.items()}
    start_square_L = details["theta_square"] if state.start_square is None else state.start_square
    square_JL = torch.cat([details["model_square"], start_square_L[None]])[: len(candidates_JKL)]
    return fw.cosines(products_JL, details["gradient_base"], details["gradient_square"], square_JL)


def _sum(totals: Sequence[StepTotal]) -> StepTotal:
    first = totals[0]
    return StepTotal(
        gradient=sum((t.gradient for t in totals[1:]), first.gradient),
        loss=sum((t.loss for t in totals[1:]), first.loss),
        entropy=sum((t.entropy for t in totals[1:]), first.entropy),
        probabilities=sum((t.probabilities for t in totals[1:]), first.probabilities),
        phases=first.phases,
        details=first.details,
    )
