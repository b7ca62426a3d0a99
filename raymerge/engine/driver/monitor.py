"""The monitor of a learning run: it follows each task's predictions and reacts to a collapse.

It has no state of its own: its memory is a part of the ``LearningState``, so a resumed run
continues to the same bits. The criterion of a collapse is left to ``merging.guard``.

Legend: K models, M tasks, L layers, C classes of the task with the most.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from raymerge.engine.driver.state import LearningState, MonitorState
from raymerge.errors import NonFiniteError, RunError
from raymerge.merging.guard import CollapseGuard
from raymerge.merging.method import Monitoring
from raymerge.merging.objectives import marginal_entropy, mix_marginal, momentum_at

logger = logging.getLogger(__name__)

_MOMENTUM = 0.1
_MAX_SKIPS_IN_A_ROW = 10
_MAX_SKIP_WARNINGS = 5


@dataclass(frozen=True)
class Monitor:
    """Observes the predictions of every step, and reacts to collapses and to steps to be skipped.

    ``rows[m]``: the row of λ of task m, -1 where it is not merged. ``infomax``: True if the workers
    need the running predictions.
    """

    tasks: Sequence[str]
    rows: Sequence[int]
    reactions: Monitoring = field(default_factory=Monitoring)
    infomax: bool = False
    guard: CollapseGuard = field(default_factory=CollapseGuard)

    def weights(self, state: LearningState) -> Tensor | None:
        """Return the tasks' weights (M,) in the loss, 0 once restored; None if all are 1."""
        restored_M = None if state.monitor is None else state.monitor.restored
        return None if restored_M is None or not restored_M.any() else (~restored_M).double()

    def marginals(self, state: LearningState) -> Tensor | None:
        """Return the running mean (M, C) of the predictions where the objective needs it."""
        return state.monitor.marginals if self.infomax and state.monitor is not None else None

    def observe(self, state: LearningState, entropy_M: Tensor, mean_p_MC: Tensor) -> LearningState:
        """Add the predictions of the step that led to ``state``, and react to a collapse.

        Raises :class:`RunError` where the reaction is to stop.
        """
        before = state.monitor or MonitorState.start(*mean_p_MC.shape)
        # Mix the step's mean predictions into the running ones.
        momentum = momentum_at(state.adam.updates, _MOMENTUM)
        marginals_MC = mix_marginal(before.marginals, mean_p_MC, momentum)
        entropies = [marginal_entropy(p_C) for p_C in marginals_MC]
        marginal_M = torch.tensor(entropies, dtype=torch.float64)
        # Report each collapsing task once, also after a resume.
        guard, collapsing = self.guard.observe(before.guard, entropy_M, marginal_M)
        new_tasks = [task for task in collapsing if not before.collapsed[task]]
        collapsed_M = before.collapsed.clone()
        collapsed_M[new_tasks] = True
        state = replace(
            state, monitor=MonitorState(marginals_MC, guard, collapsed_M, before.restored)
        )
        for task in new_tasks if self.reactions.collapse != "ignore" else []:
            state = self._react(state, task)
        return state

    def skip(self, state: LearningState, error: NonFiniteError) -> LearningState:
        """Return the state after a step without an update: λ, the moments and all averages stay.

        Raises ``error`` where a step may not be skipped, and :class:`RunError` after ten such steps
        in a row.
        """
        if self.reactions.nonfinite == "stop":
            raise error
        adam, in_a_row = state.adam, state.skipped_in_a_row + 1
        skipped = adam.skipped + 1
        if in_a_row > _MAX_SKIPS_IN_A_ROW:
            raise RunError(
                f"step {state.step + 1}: {error.what}, after {_MAX_SKIPS_IN_A_ROW} steps in a "
                "row that were skipped for the same reason; λ has not changed since step "
                f"{state.step - _MAX_SKIPS_IN_A_ROW}: check that task's checkpoint and images, "
                "or lower optimizer.lr"
            )
        if skipped <= _MAX_SKIP_WARNINGS:
            last = skipped == _MAX_SKIP_WARNINGS
            more = " (metrics.jsonl lists any further ones)" if last else ""
            logger.warning("step %d skipped: %s%s", state.step + 1, error.what, more)
        after = replace(adam, step=adam.step + 1, skipped=skipped)
        return replace(state, adam=after, skipped_in_a_row=in_a_row)

    def _react(self, state: LearningState, task: int) -> LearningState:
        """Warn of the collapse of ``task``, stop the run, or restore the task's λ."""
        assert state.monitor is not None
        first = state.monitor.guard.start_marginal[task]
        current = state.monitor.guard.marginal[task]
        collapse = (
            f"step {state.step}: task {self.tasks[task]} collapses: the entropy of its mean "
            f"prediction fell from {first:.2f} to {current:.2f} nats, so few classes are left"
        )
        if self.reactions.collapse == "stop":
            raise RunError(
                f"{collapse}; set method.collapse to warn or restore, or use method.objective: kl"
            )
        if self.reactions.collapse == "restore":
            logger.warning(
                "%s; its coefficients are restored and its images no longer count", collapse
            )
            return self._restore(state, task)
        logger.warning("%s; consider method.collapse: restore, or method.objective: kl", collapse)
        return state

    def _restore(self, state: LearningState, task: int) -> LearningState:
        """Return the state with the task's first λ and no moments; its images no longer count."""
        assert state.monitor is not None
        assert state.start is not None
        restored_M = state.monitor.restored.clone()
        restored_M[task] = True
        adam, row = state.adam, self.rows[task]
        lambdas, mean, square = (t.clone() for t in (adam.lambdas, adam.mean, adam.square))
        lambdas[row] = state.start[row]
        mean[row], square[row] = 0.0, 0.0
        return replace(
            state,
            adam=replace(adam, lambdas=lambdas, mean=mean, square=square),
            monitor=replace(state.monitor, restored=restored_M),
        )
