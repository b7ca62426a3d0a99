"""The state of a learning run: everything that one step hands to the next.

A run continues from it as if it had never stopped, so it converts to named tensors and back.
Storing them is left to ``runs.state``.

Legend: K models, M tasks, L layers, C classes of the task with the most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raymerge.merging.guard import GuardState
from raymerge.merging.optimizer import AdamState

_GUARD = ("entropy", "marginal", "start_entropy", "start_marginal")


@dataclass(frozen=True)
class MonitorState:
    """The monitor's memory of the predictions.

    ``marginals`` (M, C): the running mean of each task's predictions. ``collapsed``, ``restored``
    (M,) bool: the tasks whose collapse was reported, and those whose λ was restored.
    """

    marginals: Tensor
    guard: GuardState
    collapsed: Tensor
    restored: Tensor

    @classmethod
    def start(cls, tasks: int, classes: int) -> MonitorState:
        no_M = torch.zeros(tasks, dtype=torch.bool)
        zeros_MC = torch.zeros(tasks, classes, dtype=torch.float64)
        return cls(zeros_MC, GuardState.start(tasks), no_M, no_M)


@dataclass(frozen=True)
class LearningState:
    """λ and its moments, with the memory of the loop and of its monitor.

    ``start`` (K, L): λ before the first step. ``start_square`` (L,): ‖θ‖² per layer at that λ, set
    by Frank-Wolfe's cosine oracle alone. ``skipped_in_a_row``: steps since the last update.
    """

    adam: AdamState
    start: Tensor | None = None
    monitor: MonitorState | None = None
    start_square: Tensor | None = None
    skipped_in_a_row: int = 0

    @classmethod
    def initial(cls, lambdas_KL: Tensor) -> LearningState:
        return cls(AdamState.start(lambdas_KL))

    @property
    def lambdas(self) -> Tensor:
        return self.adam.lambdas

    @property
    def step(self) -> int:
        return self.adam.step

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name, without the step; ``from_tensors`` is the inverse."""
        adam, monitor = self.adam, self.monitor
        memory: dict[str, Tensor | None] = {"start": self.start, "start_square": self.start_square}
        if monitor is not None:
            memory |= {"marginals": monitor.marginals, "collapsed": monitor.collapsed}
            memory |= {"restored": monitor.restored}
            memory |= {f"guard.{name}": getattr(monitor.guard, name) for name in _GUARD}
        if adam.skipped:
            memory["skipped"] = torch.tensor(adam.skipped)
        if self.skipped_in_a_row:
            memory["skipped_in_a_row"] = torch.tensor(self.skipped_in_a_row)
        tensors = {"lambdas": adam.lambdas, "mean": adam.mean, "square": adam.square}
        return tensors | {f"memory.{name}": t for name, t in memory.items() if t is not None}

    @classmethod
    def from_tensors(cls, step: int, tensors: Mapping[str, Tensor]) -> LearningState:
        """Return the state that :meth:`tensors` gave.

        Raises :class:`LookupError` or :class:`ValueError` for tensors of another form.
        """
        memory = {name: t for name, t in tensors.items() if name.startswith("memory.")}
        counts = [
            int(memory.get(f"memory.{name}", torch.tensor(0)).reshape(()))
            for name in ("skipped", "skipped_in_a_row")
        ]
        adam = AdamState(tensors["lambdas"], tensors["mean"], tensors["square"], step, counts[0])
        monitor = _monitor(memory, adam.updates) if "memory.marginals" in memory else None
        start, start_square = memory.get("memory.start"), memory.get("memory.start_square")
        return cls(adam, start, monitor, start_square, counts[1])


def _monitor(memory: Mapping[str, Tensor], updates: int) -> MonitorState:
    marginals_MC = memory["memory.marginals"]
    fresh = MonitorState.start(*marginals_MC.shape)
    guard = [memory[f"memory.guard.{name}"] for name in _GUARD]
    flags = [
        memory.get(f"memory.{name}", getattr(fresh, name)) for name in ("collapsed", "restored")
    ]
    for part_M in (*guard, *flags):
        if part_M.shape != (len(marginals_MC),):
            raise ValueError(f"{tuple(part_M.shape)} values for {len(marginals_MC)} tasks")
    return MonitorState(
        marginals_MC, GuardState(guard[0], guard[1], guard[2], guard[3], updates), *flags
    )
