"""Every method's options, one class each, validated at construction.

A class's ``name`` is the one written in YAML. What a method does is left to its row in
``merging.registry``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Union, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Clamp = Literal["projected", "forward", "none"]
Granularity = Literal["task", "block", "tensor"]
TrimScope = Literal["visual", "full", "tensor"]
ObjectiveName = Literal["entropy", "kl", "infomax", "cross_entropy"]
Reference = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
"""A path, a URL or a model's name; none is empty or holds a zero byte."""


def _check_betas(betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"must each lie in [0, 1), got {betas}")
    return betas


Betas = Annotated[tuple[float, float], AfterValidator(_check_betas)]
"""Adam's decay rates of the two moments."""


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MethodOptions(Frozen):
    """The options of one method; ``name`` is its row in ``merging.registry``."""

    adapts_models_only: ClassVar[bool] = True
    """True if a task's images serve only its own checkpoint; images without one are an error."""
    may_skip_steps: ClassVar[bool] = True
    """True if a step that is not finite may be skipped."""
    name: str

    def problem_with(self, nonfinite: str) -> str:
        """Return what is wrong with this choice of ``optimizer.nonfinite``, "" if nothing is."""
        if self.may_skip_steps or nonfinite != "skip":
            return ""
        return (
            f"optimizer.nonfinite: skip is not for {self.name}, whose every iteration counts in "
            "the next one's step size; remove it"
        )


class ZeroShot(MethodOptions):
    name: Literal["zero_shot"]


class Individual(MethodOptions):
    name: Literal["individual"]


class Average(MethodOptions):
    name: Literal["average"]


class TaskArithmetic(MethodOptions):
    name: Literal["task_arithmetic"]
    scaling: float = 0.3


class Ties(MethodOptions):
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


class Dare(MethodOptions):
    name: Literal["dare"]
    density: float = Field(default=0.2, gt=0, le=1)
    """The fraction of the entries that are kept, at random; they are divided by it."""
    scaling: float = 0.3
    elect_sign: bool = False
    """Keep only entries with the sign of their column's sum, as TIES does after trimming."""


class Tsv(MethodOptions):
    name: Literal["tsv"]
    scaling: float = 1.0


class IsoC(MethodOptions):
    name: Literal["iso_c"]
    scaling: float = 1.3
    """The default is the paper's for ViT-B/32 and 8 tasks; it has 1.4 for B/16, 1.5 for L/14."""


class IsoCts(MethodOptions):
    name: Literal["iso_cts"]
    scaling: float = 1.5
    common_fraction: float = Field(default=0.8, gt=0, le=1)
    """The fraction of the singular directions that is common to all tasks."""


class Wudi(MethodOptions):
    name: Literal["wudi"]
    scaling: float = 1.0
    iterations: int = Field(default=300, ge=1)
    lr: float = Field(default=1e-5, gt=0)


class Swudi(MethodOptions):
    name: Literal["swudi"]
    scaling: float = 1.0
    time: float = Field(default=300.0, gt=0)
    """How far the gradient's flow goes; the constants are the paper's for ViT-B/32 and 8 tasks."""
    fraction: float = Field(default=0.65, gt=0, le=1)
    """The fraction of the eigenvectors along which it flows, the largest ones."""


class Aswudi(MethodOptions):
    name: Literal["aswudi"]
    scaling: float = 1.0


class Fisher(MethodOptions):
    name: Literal["fisher"]
    images: int = Field(default=256, ge=1)
    """The number of unlabeled images of each task."""
    samples: Literal["exact"] | Annotated[int, Field(ge=1)] = 1
    """Labels drawn from the model's own prediction per image; ``exact``: all classes, weighted."""


class RegMean(MethodOptions):
    name: Literal["regmean"]
    images: int = Field(default=256, ge=1)
    alpha: float = Field(default=0.95, ge=0, le=1)
    """The factor of the Gram matrices' entries off the diagonal."""


class RegMeanPP(MethodOptions):
    name: Literal["regmean_pp"]
    images: int = Field(default=256, ge=1)
    alpha: float = Field(default=0.95, ge=0, le=1)


class Joint(MethodOptions):
    """A reference to compare with, that was trained on all tasks at once."""

    name: Literal["joint"]
    checkpoint: Reference


class AdaMerging(MethodOptions):
    name: Literal["adamerging"]
    granularity: Granularity = "tensor"
    task_vectors: Literal["raw", "ties", "dare", "tsv", "iso", "swudi", "aswudi"] = "raw"
    """``ties`` is AdaMerging++: trimmed, sign-agreeing vectors, one coefficient row each. ``tsv``,
    ``iso``, ``swudi`` and ``aswudi``: bases whose sum is that method, Iso-CTS for ``iso``."""
    objective: ObjectiveName = "entropy"
    temperature: float = Field(default=2.0, gt=0)
    """The temperature of ``kl``."""
    normalise: bool = False
    """Divide each task's loss by ln C, so that tasks with many classes do not dominate."""
    filter: float | None = Field(default=None, gt=0)
    """Count only images whose entropy is below this fraction of ln C, the lower the more (EATA)."""
    init: float | None = None
    """Default: 0.3; 1.0 for the bases of a method, where λ = 1 is the method itself."""
    clamp: Clamp = "projected"
    collapse: Literal["ignore", "warn", "stop", "restore"] = "warn"
    """The reaction when a task's predictions collapse to few classes; ``restore`` resets its λ to
    the first ones and no longer counts its images."""
    density: float = Field(default=0.2, gt=0, le=1)
    """The density of ``ties`` and ``dare``."""
    trim_scope: TrimScope = "visual"
    common_fraction: float = Field(default=0.8, gt=0, le=1)
    """The common fraction of ``iso``."""

    @property
    def effective_init(self) -> float:
        if self.init is not None:
            return self.init
        return 0.3 if self.task_vectors in ("raw", "ties", "dare") else 1.0


class _FrankWolfe(MethodOptions):
    adapts_models_only: ClassVar[bool] = False  # the images belong to the objective
    may_skip_steps: ClassVar[bool] = False  # every iteration counts in the next step's size
    granularity: Literal["task", "tensor"] = "tensor"
    """Choose one model for all tensors, or one for each."""
    oracle: Literal["inner", "cosine"] = "inner"
    """``inner``: the linear minimisation oracle ⟨∂ℒ/∂θ, θ_k⟩; ``cosine``: the released code's."""
    objective: Literal["cross_entropy", "entropy"] = "cross_entropy"
    images: int = Field(default=100, ge=1)
    """The images of each task for one gradient; labelled for ``cross_entropy``."""
    start: Reference | None = None
    """An output folder (or its ``lambdas.json``) of the same tasks; default: the pretrained model.
    """


class FwHard(_FrankWolfe):
    name: Literal["fw_hard"]
    iterations: int = Field(default=10, ge=1)
    step_size: float = Field(default=0.1, gt=0)
    scaling: float = Field(default=0.3, gt=0)
    gap: float = Field(default=0.0, ge=0)
    """Stop when the Frank-Wolfe gap is no more than this (with ``inner``)."""


class FwSoft(_FrankWolfe):
    name: Literal["fw_soft"]
    granularity: Literal["task", "tensor"] = "task"
    iterations: int = Field(default=15, ge=1)
    init: float = 0.3
    """The first coefficients in the first iteration's merge."""
    later_init: float = 0.01
    """The first coefficients in every later iteration's merge."""


MethodConfig = Annotated[
    Union[  # noqa: UP007
        ZeroShot, Individual, Joint, Average, TaskArithmetic, Ties, Dare, Fisher, RegMean,
        RegMeanPP, Tsv, IsoC, IsoCts, Wudi, Swudi, Aswudi, AdaMerging, FwHard, FwSoft,
    ],
    Field(discriminator="name"),
]  # fmt: skip
METHOD_NAMES: tuple[str, ...] = tuple(
    get_args(cls.model_fields["name"].annotation)[0] for cls in get_args(get_args(MethodConfig)[0])
)
