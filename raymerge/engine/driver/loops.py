"""The loops that a method's row names; each learns λ from a state and reports every step."""

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
    """(K, L) float64: the coefficients that the merge uses once ``loop`` has taken its steps."""
    state = LOOPS[loop](learning, start, observe)
    return learning.optimizer.effective(state.lambdas)
