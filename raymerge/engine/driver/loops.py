"""The table of the loops that a method's row may name.

Each learns λ from a state and reports every step; the loops themselves are left to ``loop`` and
``frank_wolfe``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from raymerge.engine.driver.frank_wolfe import hard, soft
from raymerge.engine.driver.loop import Learning, Observe, adam
from raymerge.engine.driver.state import LearningState
from raymerge.merging.method import Loop

LOOPS: Mapping[Loop, Callable[[Learning, LearningState, Observe], LearningState]] = {
    "adam": adam,
    "frank_wolfe_hard": hard,
    "frank_wolfe_soft": soft,
}


def learn_lambdas(loop: Loop, learning: Learning, start: LearningState, observe: Observe) -> Tensor:
    """Run ``loop`` from ``start``; return the coefficients (K, L) float64 that the merge uses."""
    state = LOOPS[loop](learning, start, observe)
    return learning.optimizer.effective(state.lambdas)
