"""Image folders: flat, or one folder per class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from raymerge.data.images import ImageList
from raymerge.errors import DataError

SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


def unlabeled_images(folder: str, where: str) -> ImageList:
    """Return every image below ``folder`` in sorted order, without labels."""
    root = _existing(folder, where)
    paths = sorted(p for p in root.rglob("*") if is_image(p))
    if not paths:
        raise DataError(f"{where}: {root}: holds no image ({', '.join(sorted(SUFFIXES))})")
    for child in sorted(p for p in root.iterdir() if p.is_dir()):
        if not any(child in path.parents for path in paths):
            raise DataError(f"{where}: {child}: this folder holds no image; fill or remove it")
    return ImageList(tuple(paths), (-1,) * len(paths))


def labelled_images(folder: str, classnames: Sequence[str], where: str) -> ImageList:
    """Return images by class folder; the folders must be exactly the classes, in any order."""
    root = _existing(folder, where)
    folders = {p.name: p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    by_class = _match_folders(folders, classnames, where, root)
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classnames):
        images = sorted(p for p in by_class[name].rglob("*") if is_image(p))
        if not images:
            raise DataError(f"{where}: {by_class[name]}: this class folder holds no image")
        paths += images
        labels += [label] * len(images)
    return ImageList(tuple(paths), tuple(labels))


def _match_folders(
    folders: dict[str, Path], classnames: Sequence[str], where: str, root: Path
) -> dict[str, Path]:
    """Return the folder of each class, by exact name or by letters and digits (a_b is "A b")."""
    if len(set(classnames)) != len(classnames):
        twice = sorted({name for name in classnames if classnames.count(name) > 1})
        raise DataError(f"{where}: class {twice[0]!r} is listed twice, so its folder is ambiguous")
    matched = {name: folders[name] for name in classnames if name in folders}
    left = {plain_name(f): f for f in folders if f not in matched}
    for name in classnames:
        if name not in matched and plain_name(name) in left:
            matched[name] = folders[left.pop(plain_name(name))]
    missing = [name for name in classnames if name not in matched]
    unexpected = sorted(set(folders.values()) - set(matched.values()))
    if missing or unexpected:
        raise DataError(
            f"{where}: {root}: {len(folders)} class folders for {len(classnames)} class names"
            + (f"; no folder for {quote_names(missing)}" if missing else "")
            + (
                f"; no class for folder {quote_names([p.name for p in unexpected])}"
                if unexpected
                else ""
            )
        )
    return matched


def quote_names(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


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
        raise DataError(f"{where}: {folder}: no such folder")
    return root


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
