"""The description of one merging method, as a row of the registry gives it.

Planning, running, resuming and reporting a merge all ask the row, and no other code tests the class
of a method's options. So a method is its options (``config.methods``), its maths (a file of this
room) and one row (``merging.registry``).

Legend: K models, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from raymerge.config import Config, OptimizerConfig
from raymerge.config.methods import Clamp, Granularity, MethodOptions, ObjectiveName
from raymerge.merging.describe import constant_account

if TYPE_CHECKING:  # importing the rows must not import torch
    from raymerge.merging.basis import Basis, BasisInputs

Images = Literal["none", "unlabeled", "labelled"]
Statistics = Literal["fisher", "regmean", "regmean_pp"]
Loop = Literal["adam", "frank_wolfe_hard", "frank_wolfe_soft"]


@dataclass(frozen=True)
class Objective:
    """The loss of one image that learning minimises; see ``config.AdaMerging`` for each field."""

    name: ObjectiveName = "entropy"
    temperature: float = 2.0
    normalise: bool = False
    filter: float | None = None


@dataclass(frozen=True)
class Schedule:
    """The updates of λ, and the images of each task and batches in each of them."""

    steps: int
    images: int
    batches: int = 1


@dataclass(frozen=True)
class Monitoring:
    """How the loop reacts to collapsing predictions and to a step that is not finite."""

    collapse: Literal["ignore", "warn", "stop", "restore"] = "ignore"
    nonfinite: Literal["stop", "skip"] = "stop"


def _task_vectors(options: Any, inputs: BasisInputs) -> Basis | None:
    """Return None, which stands for the task vectors themselves."""
    return None


@dataclass(frozen=True)
class Method:
    """One merging method. Each function takes the method's own options first."""

    title: str
    paper: str
    options: type[MethodOptions]
    describe: Callable[[Any], str] = lambda options: ""
    """Returns the text behind the title, such as `` (λ=0.3)``."""

    # How the merge comes about: rows of a basis times λ, statistics, a loop, or not at all.
    scaling: Callable[[Any, int], float] = lambda options, models: float(options.scaling)
    """Returns the constant λ for K models, or the first one of a loop."""
    basis: Callable[[Any, BasisInputs], Basis | None] = _task_vectors
    """Returns the rows that λ multiplies."""
    statistics: Statistics | None = None
    """The statistics of each expert on its own images from which the merged vector follows."""
    loop: Loop | None = None
    """The loop of ``engine.driver`` that learns λ."""
    merges: bool = True
    """False for a reference that writes no model."""
    reference: str = ""
    """The description of a single model that uses no task's checkpoint; empty for a merge."""
    rows: bool = True
    """True if λ has one row for each model; else the basis has merged them into one vector."""

    # What it needs.
    checkpoint: Callable[[Any], str | None] = lambda options: None
    """Returns the one checkpoint that it reads instead of the tasks'."""
    images: Callable[[Any], Images] = lambda options: "none"
    """Returns the images that it needs of each merged task."""
    every_model_needs_images: bool = True
    """False where a model without images is still a candidate."""
    open_clip_linears: bool = False
    """True if it solves for the linear layers of open_clip's vision transformers."""
    whole_gradient: Callable[[Any], bool] = lambda options: False
    """Returns True if it needs norms of the whole gradient, so that all workers form one group."""

    # How it learns, for the methods with a loop or statistics.
    granularity: Callable[[Any], Granularity] = lambda options: "task"
    """Returns what one coefficient covers."""
    schedule: Callable[[Any, OptimizerConfig], Schedule] = lambda options, optimizer: Schedule(
        optimizer.steps, optimizer.images_per_step, optimizer.batches
    )
    objective: Callable[[Any], Objective] = lambda options: Objective()
    clamp: Callable[[Any], Clamp] = lambda options: "projected"
    monitoring: Callable[[Any, OptimizerConfig], Monitoring] = lambda options, optimizer: (
        Monitoring()
    )
    start: Callable[[Any], str | None] = lambda options: None
    """Returns the earlier run whose λ it starts from."""
    inner_steps: bool = False
    """True if every step runs all of the optimizer's steps."""
    steps_key: str = "optimizer.steps"
    """The config key that says how many steps there are; a resumed run may raise it."""
    account: Callable[[Any, Config], str] = constant_account
    """Returns the model card's sentence on how the coefficients were found, from which images."""

    @property
    def constant(self) -> bool:
        """True if the merge follows from the checkpoints and one λ alone."""
        return self.merges and self.loop is None and self.statistics is None
