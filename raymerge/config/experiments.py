"""The config of an experiment, for ``raymerge experiment``.

experiment: {name: robustness, severity: 2}
base: vit_b32_8tasks.yaml        # a merge's config, or an embedded world
methods: {adamerging: {preset: fast}}
output: runs/robustness
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import Field, ValidationError

from raymerge.config.loading import absolute_path, apply_override, read_yaml
from raymerge.config.methods import Frozen, Reference
from raymerge.config.wording import explain
from raymerge.errors import ConfigError

EMBEDDED = ("demo", "demo-interfering")
"""Embedded worlds, which can be the base of an experiment."""


class Methods(Frozen):
    """All methods on all tasks (the paper's Tables 1, 2 and 5)."""

    name: Literal["methods"]


class Generalisation(Frozen):
    """Merge and adapt on the seen tasks, test on all (Tables 3 and 6)."""

    name: Literal["generalisation"]
    unseen: tuple[tuple[str, ...], ...] = Field(min_length=1)
    """One merge each, with the names of the tasks that it does not see."""


class Robustness(Frozen):
    """Adapt and test on corrupted images (Tables 4 and 7)."""

    name: Literal["robustness"]
    tasks: tuple[str, ...] | None = None
    """The tasks that are merged and tested; default: all."""
    severity: int = Field(default=2, ge=1, le=5)
    parameters: Literal["cifar", "imagenet"] = "cifar"
    corruptions: tuple[str, ...] | None = None
    """Default: all seven."""


class EntropyLoss(Frozen):
    """Entropy against loss of every test image under one merged model (Figs 3 and 11)."""

    name: Literal["entropy_loss"]


class LambdaScan(Frozen):
    """Accuracy against λ for task arithmetic and TIES (Fig 1)."""

    name: Literal["lambda_scan"]
    scalings: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class FwScaling(Frozen):
    """Accuracy and memory of FW-Merging by the number of candidate models."""

    name: Literal["fw_scaling"]
    irrelevant: int = Field(default=16, ge=0)
    relevant: int = Field(default=16, ge=0)
    own: Annotated[int, Field(ge=1)] | Annotated[tuple[str, ...], Field(min_length=1)] = 2
    """Tested tasks whose models are the first candidates: their number or their names."""


class Seeds(Frozen):
    """Methods over several seeds: mean and standard deviation.

    Each seed builds an embedded world of its own; with other models it only draws other images.
    """

    name: Literal["seeds"]
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)


Experiment = Annotated[
    Union[  # noqa: UP007
        Methods, Generalisation, Robustness, EntropyLoss, LambdaScan, FwScaling, Seeds
    ],
    Field(discriminator="name"),
]


class ExperimentConfig(Frozen):
    """One experiment. ``methods``: name → changes to the base config; default: the experiment's."""

    experiment: Experiment
    base: Reference
    methods: Mapping[str, Mapping[str, Any]] | None = None
    seed: int = Field(default=0, ge=0)
    output: Reference


def load_experiment(
    path: str | Path, overrides: Iterable[str] = (), output: str | None = None
) -> ExperimentConfig:
    """Read a YAML file; raises :class:`ConfigError` naming the file, the key and the remedy."""
    path = Path(path)
    data = read_yaml(path)
    for override in overrides:
        apply_override(data, override)
    if isinstance(data.get("experiment"), str):
        data["experiment"] = {"name": data["experiment"]}
    root = path.parent.absolute()
    if output is not None:
        data["output"] = str(Path(output).absolute())
    for key in ("base", "output"):
        if isinstance(data.get(key), str) and data[key] not in EMBEDDED:
            data[key] = absolute_path(data[key], root)
    try:
        return ExperimentConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"config {path}: {explain(error, ExperimentConfig)}") from None
