"""Image folders: flat, or one folder per class."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from raymerge.config.suites.specs import DATA_SETS, load_data_set
from raymerge.data.images import ImageList
from raymerge.errors import DataError, excerpt

logger = logging.getLogger(__name__)

SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)

_SYSTEM_NAMES = frozenset(
    ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
     "desktop.ini")
)  # fmt: skip
"""The folders and files that systems add to any folder; some hold small images."""


def unlabeled_images(folder: str, where: str) -> ImageList:
    """Return every image below ``folder`` in sorted order, without labels."""
    root = _existing(folder, where)
    paths = image_files(root)
    if not paths:
        raise DataError(
            f"{where}: {root}: holds no image ({', '.join(sorted(SUFFIXES))}); name a folder that "
            "holds some"
        )
    filled = {path.relative_to(root).parts[0] for path in paths}
    empty = [p.name for p in sorted(root.iterdir()) if _is_class_folder(p) and p.name not in filled]
    if empty:
        logger.warning("%s: %d folders hold no image (%s)", where, len(empty), quote_names(empty))
    return ImageList(tuple(paths), (-1,) * len(paths))


def labelled_images(folder: str, classnames: Sequence[str], where: str) -> ImageList:
    """Return images by class folder; each folder must be a class, in any order.

    Classes without an image are said in a warning.
    """
    root = _existing(folder, where)
    folders = [path.name for path in root.iterdir() if _is_class_folder(path)]
    names = dict(zip(folders, _classes_of(folders, classnames, where, root), strict=True))
    of_class: dict[int, list[Path]] = {label: [] for label in range(len(classnames))}
    beside = 0
    for path in image_files(root):
        inside = path.relative_to(root).parts
        if len(inside) > 1:
            of_class[names[inside[0]]].append(path)
        else:
            beside += 1
    warn_of_empty([classnames[c] for c, paths in of_class.items() if not paths], classnames, where)
    if beside:
        logger.warning(
            "%s: %d images lie in %s itself, so they have no label and are left out",
            where, beside, root,
        )  # fmt: skip
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
        taken = set(places)
        missing = [name for c, name in enumerate(classnames) if c not in taken]
        deeper = [root / name for name in folders if _holds_classes(root / name, classnames)]
        raise DataError(
            f"{where}: {root}: {len(folders)} class folders for {len(classnames)} class names"
            + (f"; no folder for {quote_names(missing)}" if missing else "")
            + (f"; no class for folder {quote_names(unexpected)}" if unexpected else "")
            + (
                f"; the class folders lie in {deeper[0]}: name that"
                if deeper
                else "; name the folders as in classnames"
            )
        )
    return [place for place in places if place is not None]


def _is_class_folder(path: Path) -> bool:
    return path.is_dir() and not is_hidden(path.name)


def _holds_classes(folder: Path, classnames: Sequence[str]) -> bool:
    """Return whether all visible folders in a folder are classes by name."""
    plain = {plain_name(name) for name in classnames}
    with suppress(OSError):
        names = [path.name for path in folder.iterdir() if _is_class_folder(path)]
        return bool(names) and all(plain_name(name) in plain for name in names)
    return False


def match_names(
    names: Sequence[str], classnames: Sequence[str], where: str, what: str
) -> list[int | None]:
    """Return the class of each of a data set's own names; None for a name that is no class.

    A name matches a class exactly, by its letters and digits (a_b is "A b"), as the data set's card
    knows it (AnnualCrop), or as the class's number in a set of such (00000). Raises
    :class:`DataError` for a class or a name that is there twice.
    """
    for group, title in ((names, f"{what} of the data set"), (classnames, "class in classnames")):
        name, times = Counter(group).most_common(1)[0] if group else ("", 0)
        if times > 1:
            raise DataError(
                f"{where}: {title} {excerpt(name)} is there twice, so it is ambiguous; rename "
                "one of them"
            )
    # Exact names come first, so that "a b" and "a_b" can be different classes.
    place_of = {name: place for place, name in enumerate(classnames)}
    found = {name: place_of[name] for name in names if name in place_of}
    for spellings in _spellings(classnames):
        unmatched = [name for name in names if name not in found]
        if not unmatched:
            break
        taken = set(found.values())
        left = {plain_name(each): c for c, each in enumerate(spellings) if c not in taken}
        for name in unmatched:
            if plain_name(name) in left:
                found[name] = left.pop(plain_name(name))
    if not found and names and all(re.fullmatch(r"[0-9]{1,9}", name) for name in names):
        return _numbered(names, classnames, where, what)
    return [found.get(name) for name in names]


def _spellings(classnames: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield the classes as the config names them, then as the data sets with these classes do."""
    yield classnames
    yield from _card_labels(tuple(classnames))


def _numbered(
    names: Sequence[str], classnames: Sequence[str], where: str, what: str
) -> list[int | None]:
    """Return the classes of names that are numbers: from 1 if exactly 1 to C are there, else from
    0; all None if they are no such numbers."""
    numbers = [int(name) for name in names]
    first = int(sorted(numbers) == list(range(1, len(classnames) + 1)))
    places = [number - first for number in numbers]
    if len(set(places)) < len(places) or max(places) >= len(classnames):
        return [None] * len(names)
    logger.warning(
        "%s: the names of its %d classes are numbers; they are taken as places in classnames, "
        "where %s %s is %s",
        where, len(names), what, names[0], excerpt(classnames[places[0]]),
    )  # fmt: skip
    return list(places)


@cache
def _card_labels(classnames: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the own names of the data sets that have these class names."""
    # The config may list the classes in another order than the card.
    labels = []
    for name in DATA_SETS:
        card = load_data_set(name)
        label_of = dict(zip(card.classnames, card.labels or (), strict=False))
        if label_of.keys() == set(classnames):
            labels.append(tuple(label_of[each] for each in classnames))
    return labels


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
    """Return the images below a folder in sorted order, without those in hidden folders.

    Links to folders are followed, but not again behind a link, nor to a folder that holds them.
    Raises :class:`DataError` for a folder that cannot be read.
    """
    found: list[Path] = []
    behind: set[Path] = set()
    for name, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        place, entered = Path(name), []
        for child in (place / each for each in folders if not is_hidden(each)):
            is_link = child.is_symlink()
            if is_link and (place in behind or _leads_up(child)):
                continue
            entered.append(child.name)
            if is_link or place in behind:
                behind.add(child)
        folders[:] = entered  # walk enters only these
        found += [path for path in map(place.joinpath, names) if is_image(path)]
    return sorted(found)


def _leads_up(link: Path) -> bool:
    parent = link.parent.resolve()
    return link.resolve() in (parent, *parent.parents)


def _refuse(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: cannot be read ({error.strerror}); change its permissions, or move it "
        "out of the folder of images"
    ) from error


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is a program's own: .ipynb_checkpoints, ._a.jpg, __MACOSX."""
    return name.startswith(".") or name.casefold() in _SYSTEM_NAMES


def is_hidden_path(name: str) -> bool:
    """Return whether a relative name leads through anything hidden."""
    return any(is_hidden(part) for part in name.split("/") if part not in (".", ".."))


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not is_hidden(path.name) and path.is_file()
