"""Map the labels of a stored data set to indices into ``classnames``.

Legend: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raymerge.data.folder import plain_name, quote_names
from raymerge.data.images import Labels
from raymerge.errors import DataError

_INDEX = "?match=index takes the numbers as places in classnames"


def class_indices(labels: Labels, classnames: Sequence[str], where: str) -> NDArray[np.int64]:
    """Return (N,) in [0, C). Names match like class folders; numbers without names are indices.

    Raises :class:`DataError`.
    """
    count = len(classnames) if labels.names is None else len(labels.names)
    _require_range(labels.numbers, count, where, has_names=labels.names is not None)
    if labels.names is None:
        return labels.numbers
    place_of = _match(labels, labels.names, classnames, where)
    return place_of[labels.numbers]


def text_labels(texts: Sequence[str]) -> Labels:
    """Return the labels of one class name per image."""
    names, numbers = np.unique(np.array(texts, dtype=object), return_inverse=True)
    return Labels(numbers.astype(np.int64).reshape(-1), tuple(map(str, names)))


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
    """Return the index of each number's class, by exact name or by letters and digits.

    A name that is no class matters only if an image has it.
    """
    # Names that occur twice cannot be matched.
    for group, title in ((names, "of the data set"), (classnames, "in classnames")):
        twice = sorted({name for name in group if group.count(name) > 1})
        if twice:
            raise DataError(f"{where}: class {twice[0]!r} {title} is there twice; {_INDEX}")

    # Exact names come first, so that "a b" and "a_b" can be different classes.
    place_of = {name: classnames.index(name) for name in names if name in classnames}
    left = {plain_name(c): i for i, c in enumerate(classnames) if i not in place_of.values()}
    for name in names:
        if name not in place_of and plain_name(name) in left:
            place_of[name] = left.pop(plain_name(name))
    used = {names[number] for number in np.unique(labels.numbers)}
    missing = [c for i, c in enumerate(classnames) if i not in place_of.values()]
    unexpected = [name for name in names if name in used and name not in place_of]
    if missing or unexpected:
        raise DataError(
            f"{where}: the data set has {len(names)} classes for {len(classnames)} class names"
            + (f"; none is {quote_names(missing)}" if missing else "")
            + (f"; no class name is {quote_names(unexpected)}" if unexpected else "")
            + f"; use its names, or {_INDEX}"
        )
    return np.array([place_of.get(name, -1) for name in names], dtype=np.int64)
