"""Every method by name: its title, its paper, and what it is in terms of the core.

A method without learned coefficients is still θ₀ + Σ_k λ V_k: a basis V (raw task vectors, or
TIES's Φ) and one constant λ. So one merge, one export and one evaluation serve them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from raymerge.config import AdaMerging, MethodConfig, TaskArithmetic, Ties

Basis = Literal["raw", "ties"]


@dataclass(frozen=True)
class Method:
    """``scaling(method, K)`` is the constant λ, or the initial one if ``learned``."""

    title: str
    paper: str
    scaling: Callable[[Any, int], float]
    basis: Callable[[Any], Basis] = lambda method: "raw"
    learned: bool = False
    merges: bool = True


def _ties_scaling(method: Ties, tasks: int) -> float:
    return method.effective_scaling


def _arithmetic_scaling(method: TaskArithmetic, tasks: int) -> float:
    return method.scaling


def _initial_lambda(method: AdaMerging, tasks: int) -> float:
    return method.init


def _adamerging_basis(method: AdaMerging) -> Basis:
    return method.task_vectors


METHODS: dict[str, Method] = {
    "zero_shot": Method(
        "Zero-shot (pretrained)", "Radford et al., ICML 2021", lambda method, tasks: 0.0
    ),
    "individual": Method(
        "Individual experts", "Ilharco et al., ICLR 2023", lambda method, tasks: 0.0, merges=False
    ),
    "average": Method(
        "Weight averaging", "Wortsman et al., ICML 2022", lambda method, tasks: 1.0 / tasks
    ),
    "task_arithmetic": Method("Task arithmetic", "Ilharco et al., ICLR 2023", _arithmetic_scaling),
    "ties": Method(
        "TIES-Merging", "Yadav et al., NeurIPS 2023", _ties_scaling, lambda method: "ties"
    ),
    "adamerging": Method(
        "AdaMerging", "Yang et al., ICLR 2024", _initial_lambda, _adamerging_basis, learned=True
    ),
}


def method_of(config: MethodConfig) -> Method:
    return METHODS[config.name]


def describe(config: MethodConfig) -> str:
    """The method in words: ``AdaMerging++ (tensor-wise)``, ``TIES-Merging (20 %, sum, λ=0.3)``."""
    title = METHODS[config.name].title
    if isinstance(config, AdaMerging):
        plus = "++" if config.task_vectors == "ties" else ""
        wise = {"task": "task-wise", "block": "block-wise", "tensor": "layer-wise"}
        return f"{title}{plus} ({wise[config.granularity]})"
    if isinstance(config, Ties):
        return f"{title} ({config.density:.0%}, {config.merge}, λ={config.effective_scaling:g})"
    if isinstance(config, TaskArithmetic):
        return f"{title} (λ={config.scaling:g})"
    return title
