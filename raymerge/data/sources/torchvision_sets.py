"""torchvision's data sets on this machine: ``torchvision:NAME[:SPLIT][?root=DIR&download=1]``.

torchvision reads the files itself, also pickles (CIFAR's), after comparing their MD5 with that of
the published files.
"""

from __future__ import annotations

import inspect
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raymerge.data.folder import quote_names
from raymerge.data.images import Labels
from raymerge.data.sources.reference import DataReference
from raymerge.errors import DataError, one_line, unknown_name
from raymerge.files.atomic import cache_folder

NAMES = (
    "Caltech101", "Caltech256", "CIFAR10", "CIFAR100", "Country211", "DTD", "EMNIST", "EuroSAT",
    "FashionMNIST", "FER2013", "FGVCAircraft", "Flowers102", "Food101", "GTSRB", "Imagenette",
    "KMNIST", "MNIST", "OxfordIIITPet", "PCAM", "QMNIST", "RenderedSST2", "SEMEION", "StanfordCars",
    "STL10", "SUN397", "SVHN", "USPS",
)  # fmt: skip
_LABELS = ("targets", "labels", "_labels", "y")
_EXTRAS = ("partition", "split", "size", "annotation_level")
_FAILURES = (OSError, ValueError, RuntimeError, ImportError, KeyError, IndexError, EOFError,
             TypeError, SyntaxError)  # fmt: skip


def open_vision(reference: DataReference) -> VisionImages:
    name, _, split = reference.place.removeprefix("torchvision:").partition(":")
    if name not in NAMES:
        raise DataError(f"{reference.text}: torchvision data set {unknown_name(name, NAMES)}")
    parameters = inspect.signature(_class(name).__init__).parameters
    splits = (
        "train" if "train" in parameters or name == "EMNIST" else "split" * ("split" in parameters)
    )
    own = [key for key in _EXTRAS if key in parameters and key != splits]
    reference.require_options("root", "download", *own)
    reference.choice("download", ("0", "1"))
    extras = [(key, _value(reference, key)) for key in own if key in reference.options]
    images = VisionImages(
        reference.place,
        name,
        str(Path(reference.options.get("root") or cache_folder() / "torchvision").absolute()),
        reference.options.get("download") == "1",
        (*_split(reference, splits, split), *extras),
    )
    if not len(images):
        raise DataError(f"{reference.text}: holds no image; name another split")
    return images


def _split(
    reference: DataReference, parameter: str, split: str
) -> tuple[tuple[str, bool | str], ...]:
    """Return the constructor's argument for ``split``."""
    if parameter == "train":
        if split not in ("train", "test"):
            raise DataError(f"{reference.text}: write its split, train or test: {_with(reference)}")
        return ((parameter, split == "train"),)
    if parameter and not split:
        raise DataError(f"{reference.text}: write its split, such as test: {_with(reference)}")
    if split and not parameter:
        raise DataError(f"{reference.text}: has no splits; leave {split!r} out")
    return ((parameter, split),) if parameter else ()


def _with(reference: DataReference) -> str:
    return ":".join([*reference.place.split(":")[:2], "test"])


def _value(reference: DataReference, option: str) -> str | int | None:
    return reference.number(option) if option == "partition" else reference.options[option]


def _class(name: str) -> Any:
    from torchvision import datasets

    return getattr(datasets, name)


@dataclass(frozen=True)
class VisionImages:
    """A :class:`~raymerge.data.images.Source`; another process makes its own data set object."""

    place: str
    data_set: str
    root: str
    download: bool
    arguments: tuple[tuple[str, bool | int | str | None], ...]
    _lock: Any = field(init=False, repr=False, compare=False, default_factory=lambda: Lock())

    def __reduce__(self) -> tuple[type[VisionImages], tuple[Any, ...]]:
        return VisionImages, (
            self.place,
            self.data_set,
            self.root,
            self.download,
            self.arguments,
        )

    @cached_property
    def _opened(self) -> Any:
        arguments = dict(self.arguments)
        if self.download:
            Path(self.root).mkdir(parents=True, exist_ok=True)
            arguments["download"] = True
        elif self.data_set == "SEMEION":  # which would download
            arguments["download"] = False
        try:
            with redirect_stdout(sys.stderr):
                return _class(self.data_set)(self.root, **arguments)
        except _FAILURES as error:
            raise DataError(
                f"{self.place}: torchvision cannot open it in {self.root} ({one_line(error)}); "
                "name its folder: root=DIR, or let torchvision fetch it: download=1"
            ) from error

    @property
    def _data(self) -> Any:
        with self._lock:
            return self._opened

    def __len__(self) -> int:
        return len(self._data)

    def key(self, row: int) -> str:
        return f"{self.place} image {row}"

    def name(self, row: int) -> str:
        return self.key(row)

    def encoded(self, row: int) -> None:
        return None

    def image(self, row: int) -> Image.Image:
        try:
            image = self._data[row][0]
        except _FAILURES as error:
            raise DataError(
                f"image {self.name(row)}: does not decode ({one_line(error)}); fetch the data set "
                "again"
            ) from error
        if not isinstance(image, Image.Image):
            raise DataError(
                f"image {self.name(row)}: is no image but {type(image).__name__}; name another set"
            )
        return image

    def labels(self) -> Labels:
        numbers = self._numbers()
        classes = getattr(self._data, "classes", None) or getattr(self._data, "categories", None)
        if classes is None:
            return Labels(numbers)
        names = [name if isinstance(name, str) else str(name[0]) for name in classes]
        if self.data_set in ("MNIST", "QMNIST", "KMNIST"):  # "7 - seven" is 7
            names = [re.sub(r"^(\d) - \w+$", r"\1", name) for name in names]
        return Labels(numbers, tuple(names))

    def _numbers(self) -> NDArray[np.int64]:
        data = self._data
        stored = next((getattr(data, key) for key in _LABELS if hasattr(data, key)), None)
        if stored is None and hasattr(data, "_samples"):
            stored = [label for _, label in data._samples]
        if stored is None:
            stored = [data[row][1] for row in range(len(data))]
        if self.data_set == "QMNIST":
            stored = [int(row[0]) for row in stored]
        numbers: NDArray[np.int64] = np.asarray(stored).astype(np.int64).reshape(-1)
        if len(numbers) != len(data):
            raise DataError(
                f"{self.place}: {len(numbers)} labels for {len(data)} images; choose a labelled "
                f"split (known data sets: {quote_names(NAMES)})"
            )
        return numbers
