"""Map the labels of a stored data set to indices into ``classnames``.

Legend: N images, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from raymerge.data.folder import match_names, quote_names, warn_of_empty
from raymerge.data.images import Labels
from raymerge.errors import DataError

_INDEX = "?match=index takes the numbers as places in classnames"


def class_indices(labels: Labels, classnames: Sequence[str], where: str) -> NDArray[np.int64]:
    """Return (N,) in [0, C). Names match like class folders; numbers without names are indices.

    Raises :class:`DataError`.
    """
    count = len(classnames) if labels.names is None else len(labels.names)
    _require_range(labels.numbers, count, where, has_names=labels.names is not None)
    indices = labels.numbers
    if labels.names is not None:
        indices = _match(labels, labels.names, classnames, where)[labels.numbers]
    used = set(np.unique(indices).tolist())
    warn_of_empty([c for i, c in enumerate(classnames) if i not in used], classnames, where)
    return indices


def as_places(labels: Labels, where: str) -> Labels:
    """Return labels whose numbers are places in ``classnames``, whatever their names are.

    Raises :class:`DataError` for texts that are no numbers: they are in no order.
    """
    if not labels.are_texts:
        return replace(labels, names=None)
    names = labels.names or ()
    wrong = [name for name in names if not re.fullmatch(r"-?[0-9]{1,9}", name)]
    if wrong:
        raise DataError(
            f"{where}: its labels are texts, which have no places; remove match=index and write "
            f"them in classnames ({quote_names(wrong)})"
        )
    numbers = np.array([int(name) for name in names], dtype=np.int64)
    return Labels(numbers[labels.numbers])


def text_labels(texts: Sequence[str]) -> Labels:
    """Return the labels of one class name per image."""
    names, numbers = np.unique(np.array(texts, dtype=object), return_inverse=True)
    return Labels(numbers.astype(np.int64).reshape(-1), tuple(map(str, names)), are_texts=True)


def _require_range(numbers: NDArray[np.int64], count: int, where: str, *, has_names: bool) -> None:
    outside = numbers[(numbers < 0) | (numbers >= count)]
    if not len(outside):
        return
    classes = "classes that the data set names" if has_names else "class names"
    remedy = (
        "an image without a label is no test image; choose a labelled split"
        if int(outside.max()) < 0
        else "list every class in classnames, in the order of the numbers"
    )
    raise DataError(
        f"{where}: {len(outside)} of {len(numbers)} labels are not in 0 to {count - 1}, the "
        f"{count} {classes} (they go from {int(outside.min())} to {int(outside.max())}); {remedy}"
    )


def _match(
    labels: Labels, names: tuple[str, ...], classnames: Sequence[str], where: str
) -> NDArray[np.int64]:
    """Return the index of each number's class; a name that is no class matters only if an image
    has it."""
    try:
        places = match_names(names, classnames, where, "class")
    except DataError as error:
        raise DataError(f"{error}, or {_INDEX}") from error
    used = {names[number] for number in np.unique(labels.numbers)}
    unexpected = [
        name for name, place in zip(names, places, strict=True) if place is None and name in used
    ]
    if unexpected:
        taken = set(places)
        missing = [c for i, c in enumerate(classnames) if i not in taken]
        remedy = "use its names" if labels.are_texts else f"use its names, or {_INDEX}"
        raise DataError(
            f"{where}: the data set has {len(names)} classes for {len(classnames)} class names"
            + (f"; none is {quote_names(missing)}" if missing else "")
            + f"; no class name is {quote_names(unexpected)}; {remedy}"
        )
    return np.array([-1 if place is None else place for place in places], dtype=np.int64)
