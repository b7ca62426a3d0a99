"""What the loop keeps an eye on: every task's running predictions, and whether they collapse.

All that it remembers is in the state's ``memory``, so that a resumed run goes on as if it had never
stopped.

Legend: K models, M tasks, L layers, C classes of the task with the most.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from raymerge.errors import NonFiniteError, RunError
from raymerge.merging.guard import CollapseGuard, GuardState
from raymerge.merging.objectives import marginal_entropy, mix_marginal, momentum_at
from raymerge.merging.optimizer import AdamState

logger = logging.getLogger(__name__)

_MOMENTUM = 0.1
_MOST_SKIPPED_IN_A_ROW = 10
_SKIPS_WORTH_A_WARNING = 5
_IN_A_ROW = "skipped_in_a_row"
_GUARD = ("entropy", "marginal", "start_entropy", "start_marginal")


@dataclass(frozen=True)
class Watch:
    """``rows[m]``: the row of λ of task m, -1 for one that is not merged.

    ``infomax``: the workers need the running predictions. ``nonfinite``: what to do with a step
    that is.
    """

    tasks: Sequence[str]
    rows: Sequence[int]
    collapse: Literal["ignore", "warn", "stop", "restore"] = "warn"
    infomax: bool = False
    guard: CollapseGuard = field(default_factory=CollapseGuard)
    nonfinite: Literal["stop", "skip"] = "stop"

    def weights(self, state: AdamState) -> Tensor | None:
        """(M,) of the tasks' losses: 0 once a task was restored; None if all count."""
        lost_M = state.memory.get("restored")
        return None if lost_M is None or not lost_M.any() else (~lost_M).double()

    def marginals(self, state: AdamState) -> Tensor | None:
        """(M, C): the running mean of the predictions, where the objective needs it."""
        return state.memory.get("marginals") if self.infomax else None

    def observe(
        self, before: AdamState, state: AdamState, entropy_M: Tensor, mean_p_MC: Tensor
    ) -> AdamState:
        """Add the step from ``before`` to ``state``; do what ``collapse`` says.

        Raises :class:`RunError` if that is to stop.
        """
        memory = dict(before.memory)
        memory.setdefault("start", before.lambdas)
        memory.pop(_IN_A_ROW, None)
        known_MC = memory.get("marginals", torch.zeros_like(mean_p_MC))
        momentum = momentum_at(state.updates, _MOMENTUM)
        memory["marginals"] = mix_marginal(known_MC, mean_p_MC, momentum)
        entropies = [marginal_entropy(p_C) for p_C in memory["marginals"]]
        marginal_M = torch.tensor(entropies, dtype=torch.float64)
        guard, collapsing = self.guard.observe(_guard_of(memory, state), entropy_M, marginal_M)
        memory |= {f"guard.{name}": getattr(guard, name) for name in _GUARD}
        known_M = memory.get("collapsed", torch.zeros(len(self.tasks), dtype=torch.bool))
        new = [m for m in collapsing if not known_M[m]]
        known_M = known_M.clone()
        known_M[new] = True
        memory["collapsed"] = known_M
        state = replace(state, memory=memory)
        for task in new if self.collapse != "ignore" else []:
            state = self._react(state, task)
        return state

    def skip(self, state: AdamState, trouble: NonFiniteError) -> AdamState:
        """Past a step that came to nothing: λ, the moments and all averages are as before it.

        Raises ``trouble`` if it is to stop the run, and after ten such steps in a row.
        """
        if self.nonfinite == "stop":
            raise trouble
        skipped, row = (int(state.memory.get(name, 0)) + 1 for name in ("skipped", _IN_A_ROW))
        if row > _MOST_SKIPPED_IN_A_ROW:
            raise RunError(
                f"step {state.step + 1}: {trouble.what}, after {_MOST_SKIPPED_IN_A_ROW} steps in a "
                f"row that were skipped for the like; λ was left at step "
                f"{state.step - _MOST_SKIPPED_IN_A_ROW}: check that task's checkpoint and images, "
                "or lower optimizer.lr"
            )
        if skipped <= _SKIPS_WORTH_A_WARNING:
            last = skipped == _SKIPS_WORTH_A_WARNING
            more = " (of further ones see metrics.jsonl)" if last else ""
            logger.warning("step %d skipped: %s%s", state.step + 1, trouble.what, more)
        counts = {"skipped": torch.tensor(skipped), _IN_A_ROW: torch.tensor(row)}
        return replace(state, step=state.step + 1, memory={**state.memory, **counts})

    def _react(self, state: AdamState, task: int) -> AdamState:
        memory = state.memory
        then, now = memory["guard.start_marginal"][task], memory["guard.marginal"][task]
        what = (
            f"step {state.step}: task {self.tasks[task]} collapses: the entropy of its mean "
            f"prediction fell from {then:.2f} to {now:.2f} nats, so few classes are left"
        )
        if self.collapse == "stop":
            raise RunError(
                f"{what}; set method.collapse to warn or restore, or use method.objective: kl"
            )
        if self.collapse == "restore":
            logger.warning("%s; its coefficients are restored and its images count no more", what)
            return self._restored(state, task)
        logger.warning("%s; consider method.collapse: restore, or method.objective: kl", what)
        return state

    def _restored(self, state: AdamState, task: int) -> AdamState:
        memory = dict(state.memory)
        lost_M = memory.get("restored", torch.zeros(len(self.tasks), dtype=torch.bool)).clone()
        lost_M[task] = True
        memory["restored"] = lost_M
        lambdas, mean, square = (t.clone() for t in (state.lambdas, state.mean, state.square))
        row = self.rows[task]
        lambdas[row] = memory["start"][row]
        mean[row], square[row] = 0.0, 0.0
        return AdamState(lambdas, mean, square, state.step, memory)


def _guard_of(memory: Mapping[str, Tensor], state: AdamState) -> GuardState:
    if "guard.entropy" not in memory:
        return GuardState.start(len(memory["marginals"]))
    parts = [memory[f"guard.{name}"] for name in _GUARD]
    return GuardState(parts[0], parts[1], parts[2], parts[3], state.updates - 1)
