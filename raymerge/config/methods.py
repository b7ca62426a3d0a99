"""Every method's options, one class each; ``merging.registry`` says what they are.

A class's ``name`` is the one written in YAML.
"""

from __future__ import annotations

from typing import Annotated, Literal, Union, get_args

from pydantic import BaseModel, ConfigDict, Field

Clamp = Literal["projected", "forward", "none"]
Granularity = Literal["task", "block", "tensor"]
TrimScope = Literal["visual", "full", "tensor"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ZeroShot(Frozen):
    name: Literal["zero_shot"]


class Individual(Frozen):
    name: Literal["individual"]


class Average(Frozen):
    name: Literal["average"]


class TaskArithmetic(Frozen):
    name: Literal["task_arithmetic"]
    scaling: float = 0.3


class Ties(Frozen):
    name: Literal["ties"]
    density: float = Field(default=0.2, gt=0, le=1)
    scaling: float | None = None
    """Default: 0.3 for ``merge: sum`` (the AdaMerging paper), 1.0 for ``mean`` (the TIES paper)."""
    merge: Literal["sum", "mean"] = "sum"
    trim_scope: TrimScope = "visual"

    @property
    def effective_scaling(self) -> float:
        if self.scaling is not None:
            return self.scaling
        return 0.3 if self.merge == "sum" else 1.0


class AdaMerging(Frozen):
    name: Literal["adamerging"]
    granularity: Granularity = "tensor"
    task_vectors: Literal["raw", "ties"] = "raw"
    """``ties`` is AdaMerging++: trimmed, sign-agreeing vectors, one coefficient row each."""
    objective: Literal["entropy"] = "entropy"
    init: float = 0.3
    clamp: Clamp = "projected"
    density: float = Field(default=0.2, gt=0, le=1)
    trim_scope: TrimScope = "visual"


MethodConfig = Annotated[
    Union[ZeroShot, Individual, Average, TaskArithmetic, Ties, AdaMerging],  # noqa: UP007
    Field(discriminator="name"),
]
METHOD_NAMES: tuple[str, ...] = tuple(
    get_args(cls.model_fields["name"].annotation)[0] for cls in get_args(get_args(MethodConfig)[0])
)
