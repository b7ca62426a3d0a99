"""References to data in ``adapt``, ``test``, ``train``: ``PLACE?option=value&option=value``.

images/                                      a folder of images
train.parquet, sun397/?split=test            Parquet: a file, or a folder of them
hf:ORG/NAME@REVISION:SPLIT?config=NAME       Parquet of the Hugging Face hub
torchvision:NAME:SPLIT?root=DIR              torchvision's own data sets
shards-{000..003}.tar, shards/               WebDataset
images.npz                                   arrays
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

from raymerge.errors import DataError, unknown_name
from raymerge.files.atomic import exists

COMMON = ("limit", "match")
"""Options of every data set: the number of images, and the matching of labels."""


@dataclass(frozen=True)
class DataReference:
    """A parsed reference; ``place`` is ``text`` without the options."""

    text: str
    place: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def scheme(self) -> str:
        """``hf`` or ``torchvision``; empty for a path."""
        match = re.match(r"(hf|torchvision):(?!//)", self.place)
        return match.group(1) if match else ""

    def number(self, option: str) -> int | None:
        """Return an option as an integer ≥ 1, or None; raises :class:`DataError`."""
        value = self.options.get(option)
        if value is None:
            return None
        if not re.fullmatch(r"[1-9][0-9]{0,17}", value):
            raise DataError(
                f"{self.text}: {option}={value!r} is no whole number from 1 on; write one"
            )
        return int(value)

    def require_options(self, *names: str) -> None:
        names = (*names, *COMMON)
        for name in self.options:
            if name not in names:
                raise DataError(f"{self.text}: option {unknown_name(name, names)}")
        self.choice("match", ("name", "index"))
        self.number("limit")

    def choice(self, option: str, values: Collection[str]) -> str | None:
        value = self.options.get(option)
        if value is not None and value not in values:
            raise DataError(f"{self.text}: {option}={value!r}; write {' or '.join(values)}")
        return value


def parse_reference(text: str) -> DataReference:
    """Parse a reference; an existing path is taken as it is. Raises :class:`DataError`."""
    place, mark, query = text.partition("?")
    if not mark or exists(Path(text)):
        return DataReference(text, text)
    try:
        plus = query.replace("+", "%2B")  # in a path it is no space
        pairs = parse_qsl(plus, keep_blank_values=True, strict_parsing=True, max_num_fields=20)
    except ValueError as error:
        raise DataError(
            f"{text}: {query!r} is not a list of options; write option=value&option=value"
        ) from error
    if len(dict(pairs)) != len(pairs):
        raise DataError(f"{text}: an option is given twice; drop one")
    return DataReference(text, place, dict(pairs))
