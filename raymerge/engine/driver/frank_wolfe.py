"""The loops of FW-Merging over a group of workers; what they compute is ``merging.frank_wolfe``.

Legend: K models, M tasks, L layers, J candidates or chosen models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from raymerge.config import FwHard, FwSoft
from raymerge.engine.driver.groups import WorkerGroup
from raymerge.engine.driver.loop import (
    StepRecord,
    StepTotal,
    learn,
    record,
    require_finite,
    sum_results,
)
from raymerge.engine.driver.monitor import Watch
from raymerge.engine.messages import FloatArray, Incident, LoadRequest, StepRequest, StepResult
from raymerge.merging import frank_wolfe as fw
from raymerge.merging.optimizer import Adam, AdamState

Observe = Callable[[StepRecord, AdamState], None]


def hard(
    group: WorkerGroup, method: FwHard, start: AdamState, watch: Watch, observe: Observe
) -> AdamState:
    """One model (or one for each layer) an iteration; from ``start``, possibly a resumed state.

    Stops early where the gap of the true oracle is at most ``method.gap``.
    """
    state = start
    first_KL = state.memory.get("start", state.lambdas)
    for iteration in range(start.step, method.iterations):
        began, used_KL = time.perf_counter(), state.lambdas
        total = _gradient(group, state, details=method.oracle == "cosine")
        gradient_KL = torch.from_numpy(total.gradient)
        candidates_JKL = fw.vertices(first_KL)
        scores_JL = _scores(method, state, total, candidates_JKL)
        choice_L = fw.choose(scores_JL, method.granularity == "task")
        chosen_KL = fw.vertex(choice_L, candidates_JKL)
        gap = fw.gap(gradient_KL, state.lambdas, chosen_KL)
        if method.oracle == "inner" and gap <= method.gap:
            break
        rate = fw.rate(iteration) * method.step_size * method.scaling
        memory = {**state.memory, "start": first_KL}
        if "theta_square" in total.details:
            memory.setdefault("start_square", torch.from_numpy(total.details["theta_square"]))
        state = AdamState(
            fw.move(state.lambdas, chosen_KL, rate),
            state.mean,
            state.square,
            iteration + 1,
            memory,
        )
        observe(record(state, total, used_KL, watch, time.perf_counter() - began), state)
    return state


def soft(
    group: WorkerGroup,
    method: FwSoft,
    start: AdamState,
    watch: Watch,
    observe: Observe,
    loads: tuple[LoadRequest, LoadRequest],
    optimizer: Adam,
    steps: int,
) -> AdamState:
    """Each task chooses a model by its own gradient; then AdaMerging of the chosen, from θ.

    ``loads``: the request that gets the workers ready for gradients, and the one for merging;
    ``optimizer``, ``steps``: of one merging.
    """
    state = start
    gradients, merging = loads
    for iteration in range(start.step, method.iterations):
        began, used_KL = time.perf_counter(), state.lambdas
        group.load(gradients)
        chosen, total = _chosen(group, method, state, watch)
        group.load(merging)
        lambdas_KL = _merged(
            group, chosen, state.lambdas, optimizer, steps, watch,
            method.init if iteration == 0 else method.later_init,
        )  # fmt: skip
        state = AdamState(lambdas_KL, state.mean, state.square, iteration + 1, state.memory)
        observe(record(state, total, used_KL, watch, time.perf_counter() - began), state)
    return state


def _chosen(
    group: WorkerGroup, method: FwSoft, state: AdamState, watch: Watch
) -> tuple[Tensor, StepTotal]:
    """The models that the tasks choose, as coefficients (J, K, L); and the sum of the gradients."""
    candidates_JKL = fw.vertices(state.lambdas)[:-1]
    chosen: list[Tensor] = []
    totals: list[StepTotal] = []
    whole, taken = method.granularity == "task", torch.zeros(state.lambdas.shape, dtype=torch.bool)
    for task in _with_images(group, watch):
        weights_M = np.zeros(len(watch.tasks))
        weights_M[task] = 1.0
        total = _gradient(group, state, method.oracle == "cosine", weights_M)
        scores_JL = _scores(method, state, total, candidates_JKL)
        if not taken.all():
            scores_JL = scores_JL.masked_fill(taken, torch.inf)
            choice_L = fw.choose(scores_JL, whole)
            taken[choice_L, torch.arange(len(choice_L))] = True
            chosen.append(fw.vertex(choice_L, candidates_JKL))
        totals.append(total)
    return torch.stack(chosen), _sum(totals)


def _with_images(group: WorkerGroup, watch: Watch) -> list[int]:
    return [m for m in range(len(watch.tasks)) if group.spec.tasks[m].adapt is not None]


def _merged(
    group: WorkerGroup,
    chosen_JKL: Tensor,
    lambdas_KL: Tensor,
    optimizer: Adam,
    steps: int,
    watch: Watch,
    init: float,
) -> Tensor:
    """λ after AdaMerging over ``chosen_JKL`` with base θ(``lambdas_KL``): (K, L)."""
    directions_JKL = chosen_JKL - lambdas_KL
    mixed = Mixed(group, lambdas_KL, directions_JKL)
    start = AdamState.start(torch.full((len(chosen_JKL), lambdas_KL.shape[1]), init))
    quiet = replace(watch, collapse="ignore", rows=(-1,) * len(watch.tasks))
    state = learn(mixed, optimizer, start, steps, quiet, lambda record, state: None)
    return mixed.lambdas(optimizer.effective(state.lambdas))


class Mixed:
    """A group whose coefficients μ (J, L) mix directions: λ = λ₀ + Σ_j μ_j D_j, (J, K, L).

    So whatever learns λ learns μ: ∂ℒ/∂μ_j = Σ_k D_jk ∂ℒ/∂λ_k per layer.
    """

    def __init__(self, group: WorkerGroup, origin_KL: Tensor, directions_JKL: Tensor) -> None:
        self._group, self._origin, self._directions = group, origin_KL, directions_JKL
        used_K = directions_JKL.abs().sum((0, 2)) > 0
        self._rows = tuple(used_K.nonzero().flatten().tolist())

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
        # A copy: what Ray hands over may not be written to.
        return torch.einsum("jkl,kl->jl", self._directions, torch.tensor(gradient_KL)).numpy()


def _gradient(
    group: WorkerGroup,
    state: AdamState,
    details: bool,
    weights_M: FloatArray | None = None,
) -> StepTotal:
    request = StepRequest(state.step, state.lambdas.numpy(), weights=weights_M, details=details)
    total = sum_results(group.step(request), request, group.workers)
    require_finite(total, request, group.spec.task_names, group)
    return total


def _scores(
    method: FwHard | FwSoft, state: AdamState, total: StepTotal, candidates_JKL: Tensor
) -> Tensor:
    """(J, L): the lower the better."""
    products_JL = fw.products(torch.from_numpy(total.gradient), candidates_JKL)
    if method.oracle == "inner":
        return products_JL
    given = {name: torch.from_numpy(values) for name, values in total.details.items()}
    start_square_L = state.memory.get("start_square", given["theta_square"])
    square_JL = torch.cat([given["model_square"], start_square_L[None]])[: len(candidates_JKL)]
    return fw.cosines(products_JL, given["gradient_base"], given["gradient_square"], square_JL)


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
