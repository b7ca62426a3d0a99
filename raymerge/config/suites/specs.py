"""The data set specs: facts in ``data/<name>.yaml``, read once and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Literal

import yaml
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from raymerge.errors import ConfigError, unknown_name

Split = Literal["train", "test"]

_EIGHT = ("sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
_FOURTEEN = (*_EIGHT, "flowers102", "pcam", "fer2013", "oxford_pets", "stl10", "cifar100")


def _twenty(emnist: str) -> tuple[str, ...]:
    return (*_FOURTEEN, "cifar10", "food101", "fashion_mnist", emnist, "kmnist", "rendered_sst2")


SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "vit-8": _EIGHT,  # task arithmetic, AdaMerging
        "vit-14": _FOURTEEN,  # TALL-masks (Wang et al., ICML 2024)
        # There are two EMNISTs: fusion_bench's experts know the letters, TALL-masks' the digits.
        "vit-20": _twenty("emnist_letters"),
        "vit-20-digits": _twenty("emnist_digits"),
    }
)
"""Suite → the names of its data sets, in the literature's order."""

DATA_SETS: tuple[str, ...] = tuple(sorted({name for suite in SUITES.values() for name in suite}))

_CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_CLOSED)
class HuggingFace:
    """A data set's repository on the Hugging Face Hub, and its columns."""

    id: str
    config: str | None = None
    splits: Mapping[Split, str]
    """The Hub's names of the splits to train and to test on."""
    image: str
    """The column of the image."""
    label: str
    """The column of the class's number; PatchCamelyon has a boolean: true is the second class."""
    order: tuple[str, ...] | None = None
    """The class names in the order of those numbers, if it differs from ``classnames``."""


@dataclass(frozen=True, kw_only=True, config=_CLOSED)
class TorchVision:
    """torchvision's class for a data set; without a name, ``note`` says why there is none."""

    name: str | None
    note: str | None = None


@dataclass(frozen=True, kw_only=True, config=_CLOSED)
class DataSet:
    """The spec of a data set: its classes and templates, and where its images are published.

    Raises ``ValueError`` if its parts contradict each other.
    """

    name: str
    classes: int
    """The number of classes, C."""
    classnames: tuple[str, ...]
    """(C,) in class order."""
    templates: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    """(C,) the data set's own names, if they differ by more than case and punctuation."""
    sizes: Mapping[Split, int] = field(default_factory=dict)
    """The number of images of each split."""
    huggingface: HuggingFace | None
    torchvision: TorchVision
    status: str | None = None
    """The remedy if the usual download no longer works."""

    def __post_init__(self) -> None:
        _require_all_classes("classnames", self.classnames, self.classes)
        if self.labels is not None:
            _require_all_classes("labels", self.labels, self.classes)
        if any(template.count("{}") != 1 for template in self.templates):
            raise ValueError(f"{self.name}: a template needs exactly one {{}}")
        order = None if self.huggingface is None else self.huggingface.order
        if order is not None and sorted(order) != sorted(self.classnames):
            raise ValueError(f"{self.name}: huggingface.order must hold the classnames")
        if self.torchvision.name is None and self.torchvision.note is None:
            raise ValueError(f"{self.name}: torchvision has neither a name nor a reason")


def _require_all_classes(key: str, names: tuple[str, ...], classes: int) -> None:
    if len(names) != classes or len(set(names)) != classes:
        raise ValueError(
            f"{key}: {len(set(names))} distinct of {len(names)} names, but classes is {classes}"
        )


@dataclass(frozen=True, kw_only=True, config=_CLOSED)
class Suite:
    """Data sets that the literature merges together."""

    name: str
    data_sets: tuple[DataSet, ...]


@cache
def load_data_set(name: str) -> DataSet:
    """Return the spec of a data set; raises :class:`ConfigError` for an unknown name."""
    if name not in DATA_SETS:
        raise ConfigError(f"data set {unknown_name(name, DATA_SETS)}")
    spec = resources.files("raymerge.config.suites") / "data" / f"{name}.yaml"
    data = yaml.safe_load(spec.read_text(encoding="utf-8"))
    return TypeAdapter(DataSet).validate_python({"name": name, **data})


@cache
def load_suite(name: str) -> Suite:
    """Return a suite with its specs; raises :class:`ConfigError` for an unknown name."""
    if name not in SUITES:
        raise ConfigError(f"suite {unknown_name(name, SUITES)}")
    return Suite(name=name, data_sets=tuple(load_data_set(member) for member in SUITES[name]))
