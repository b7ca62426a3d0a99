"""Image folders: flat, or one folder per class."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from raymerge.config.suites.specs import DATA_SETS, load_data_set
from raymerge.data.images import ImageList
from raymerge.errors import DataError, excerpt

logger = logging.getLogger(__name__)

SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


def unlabeled_images(folder: str, where: str) -> ImageList:
    """Return every image below ``folder`` in sorted order, without labels."""
    root = _existing(folder, where)
    paths = image_files(root)
    if not paths:
        raise DataError(
            f"{where}: {root}: holds no image ({', '.join(sorted(SUFFIXES))}); name a folder that "
            "holds some"
        )
    return ImageList(tuple(paths), (-1,) * len(paths))


def labelled_images(folder: str, classnames: Sequence[str], where: str) -> ImageList:
    """Return images by class folder; each folder must be a class, in any order.

    Classes without an image are said in a warning.
    """
    root = _existing(folder, where)
    folders = {p.name: p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name)}
    names = dict(zip(folders, _classes_of(tuple(folders), classnames, where, root), strict=True))
    of_class: dict[int, list[Path]] = {label: [] for label in range(len(classnames))}
    for name, label in names.items():
        of_class[label] = image_files(folders[name])
    warn_of_empty([classnames[c] for c, paths in of_class.items() if not paths], classnames, where)
    paths = [path for each in of_class.values() for path in each]
    if not paths:
        raise DataError(
            f"{where}: {root}: no class folder holds an image; sort the images into one folder a "
            "class"
        )
    labels = [label for label, each in of_class.items() for _ in each]
    return ImageList(tuple(paths), tuple(labels))


def warn_of_empty(empty: Sequence[str], classnames: Sequence[str], where: str) -> None:
    """Warn of classes that no image has: they are scored as the others, on nothing."""
    if empty:
        logger.warning(
            "%s: %d of %d classes have no image (%s)",
            where, len(empty), len(classnames), quote_names(empty),
        )  # fmt: skip


def _classes_of(
    folders: Sequence[str], classnames: Sequence[str], where: str, root: Path
) -> list[int]:
    """Return the class of each folder. Raises :class:`DataError` for one that is none."""
    places = match_names(folders, classnames, where, "folder")
    unexpected = [name for name, place in zip(folders, places, strict=True) if place is None]
    if unexpected or not folders:
        missing = [name for c, name in enumerate(classnames) if c not in places]
        raise DataError(
            f"{where}: {root}: {len(folders)} class folders for {len(classnames)} class names"
            + (f"; no folder for {quote_names(missing)}" if missing else "")
            + (f"; no class for folder {quote_names(unexpected)}" if unexpected else "")
            + "; name the folders as in classnames"
        )
    return [place for place in places if place is not None]


def match_names(
    names: Sequence[str], classnames: Sequence[str], where: str, what: str
) -> list[int | None]:
    """Return the class of each of a data set's own names; None for a name that is no class.

    A name matches a class exactly, by its letters and digits (a_b is "A b"), as the data set's card
    knows it (AnnualCrop), or as the class's number in a set of such (00000). Raises
    :class:`DataError` for a class or a name that is there twice.
    """
    for group, title in ((names, f"{what} of the data set"), (classnames, "class in classnames")):
        twice = sorted({name for name in group if group.count(name) > 1})
        if twice:
            raise DataError(
                f"{where}: {title} {excerpt(twice[0])} is there twice, so it is ambiguous; rename "
                "one of them"
            )
    # Exact names come first, so that "a b" and "a_b" can be different classes.
    place_of = {name: place for place, name in enumerate(classnames)}
    found = {name: place_of[name] for name in names if name in place_of}
    for spellings in (classnames, *_card_labels(tuple(classnames))):
        left = {
            plain_name(each): place
            for place, each in enumerate(spellings)
            if place not in found.values()
        }
        for name in names:
            if name not in found and plain_name(name) in left:
                found[name] = left.pop(plain_name(name))
    if not found and names and all(re.fullmatch(r"[0-9]{1,9}", name) for name in names):
        places = [int(name) for name in names]
        if len(set(places)) == len(names) and max(places) < len(classnames):
            return list(places)
    return [found.get(name) for name in names]


@cache
def _card_labels(classnames: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the own names of the data sets that have these class names."""
    cards = [load_data_set(name) for name in DATA_SETS]
    return [card.labels for card in cards if card.labels and card.classnames == classnames]


def quote_names(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(excerpt(name) for name in names[:limit]) + more


def plain_name(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.casefold()).strip()


def _existing(folder: str, where: str) -> Path:
    root = Path(folder)
    if not root.is_dir() and re.match(r"[A-Za-z][\w+.-]*:", folder):
        raise DataError(
            f"{where}: {folder}: images come from local files, hf:ORG/NAME:SPLIT or "
            "torchvision:NAME:SPLIT; copy them to a folder"
        )
    if not root.is_dir():
        raise DataError(f"{where}: {folder}: no such folder; check the path")
    return root


def image_files(folder: Path) -> list[Path]:
    """Return the images below a folder in sorted order, without those in hidden folders."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]  # walk enters only these
        found += [path for name in names if is_image(path := Path(place, name))]
    return sorted(found)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is a program's own: .ipynb_checkpoints, ._a.jpg, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not is_hidden(path.name) and path.is_file()
