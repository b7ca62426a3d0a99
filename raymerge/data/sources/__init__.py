"""Open a task's images from a reference: an image folder, or a stored data set.

Only this module decides which format a reference means; docs/data.md describes the references.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raymerge.data import folder
from raymerge.data.images import ImageList, Source, StoredImages
from raymerge.data.sources.labels import as_places, class_indices
from raymerge.data.sources.reference import DataReference, parse_reference
from raymerge.data.sources.unread import other_form, remedy_of
from raymerge.data.sources.urls import local_reference
from raymerge.errors import DataError

_MOST_IMAGES = 1 << 27


def unlabeled_images(reference: str, where: str) -> ImageList:
    """Return every image, in sorted order (a folder) or as stored, without labels.

    Raises :class:`DataError`, as does ``labelled_images``.
    """
    with _prefix_errors(where):
        reference = local_reference(reference)
    selection = _find(reference, where)
    if selection is None:
        return folder.unlabeled_images(reference, where)
    source, rows = selection
    return ImageList(StoredImages(source, rows), (-1,) * len(rows))


def labelled_images(reference: str, classnames: Sequence[str], where: str) -> ImageList:
    """Return images with indices into ``classnames``: by class (a folder), or as stored."""
    with _prefix_errors(where):
        reference = local_reference(reference)
    selection = _find(reference, where)
    if selection is None:
        return folder.labelled_images(reference, classnames, where)
    source, rows = selection
    with _prefix_errors(where):
        stored = source.labels()
    if parse_reference(reference).options.get("match") == "index":
        stored = as_places(stored, f"{where}: {reference}")
    indices = class_indices(stored, classnames, f"{where}: {reference}")
    return ImageList(StoredImages(source, rows), tuple(indices[rows].tolist()))


def labels_in_order(reference: str, classnames: Sequence[str], where: str) -> tuple[int, ...]:
    """Return the labels of ``unlabeled_images`` in its order; raises :class:`DataError`."""
    images = unlabeled_images(reference, where)
    labelled = labelled_images(reference, classnames, where)
    if isinstance(images.items, StoredImages):
        return labelled.labels
    label_of = dict(zip(labelled.items, labelled.labels, strict=True))
    if label_of.keys() != set(images.items):
        raise DataError(
            f"{where}: {reference}: some images lie in no class folder; move them into one"
        )
    return tuple(label_of[item] for item in images.items)


def is_folder(reference: str) -> bool:
    """Return whether a reference is a folder of image files; raises :class:`DataError`."""
    return _open(parse_reference(local_reference(reference))) is None


def _find(reference: str, where: str) -> tuple[Source, NDArray[np.int64]] | None:
    """Return the data set and the selected rows; None for an image folder."""
    with _prefix_errors(where):
        parsed = parse_reference(reference)
        source = _open(parsed)
        if source is None:
            return None
        limit = parsed.number("limit") or len(source)
    count = len(source)
    if count > _MOST_IMAGES:
        raise DataError(
            f"{where}: {reference}: says that it has {count} images; none has so many; "
            "write it again"
        )
    if limit >= count:
        return source, np.arange(count)
    return source, np.arange(limit) * count // limit  # evenly: data sets are often sorted by class


@contextmanager
def _prefix_errors(where: str) -> Iterator[None]:
    """Prefix the errors of a data set with the config key that names it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except OSError as error:  # no permission on the way, or too long a name
        raise DataError(f"{where}: {error.filename}: {error.strerror}; check the path") from error


# --- which format ------------------------------------------------------------------------------


def _open(reference: DataReference) -> Source | None:
    # Schemes: other libraries find the files.
    if reference.scheme == "hf":
        from raymerge.data.sources.hub import open_hub

        return open_hub(reference)
    if reference.scheme == "torchvision":
        from raymerge.data.sources.torchvision_sets import open_vision

        return open_vision(reference)

    # Paths: the suffix decides; shards may be a pattern that is no file itself.
    path = Path(reference.place)
    suffix = path.suffix.lower()
    if path.is_dir():
        return _open_folder(reference, path)
    if suffix == ".parquet":
        from raymerge.data.sources.parquet import open_parquet

        reference.require_options("image", "label")
        return open_parquet(reference, [path])
    if suffix == ".tar":
        from raymerge.data.sources.shards import expand, open_shards

        return open_shards(reference, [path] if path.is_file() else expand(reference.place))
    if suffix == ".npz":
        from raymerge.data.sources.arrays import open_arrays

        return open_arrays(reference, path)
    if path.is_file():
        raise DataError(
            f"{path}: is no image folder and no .parquet, .tar or .npz file; "
            f"{remedy_of(path) or 'see docs/data.md'}"
        )
    _refuse_options(reference)
    return None


def _open_folder(reference: DataReference, root: Path) -> Source | None:
    """Open a folder of Parquet or tar files; None for a folder that holds any image."""
    stored = _stored_files(root)
    if not stored or folder.image_files(root):
        form = other_form(root, _near(root, 3)) if stored == [] else ""
        if form and not folder.image_files(root):  # images may lie deeper
            raise DataError(f"{root}: {form}")
        _refuse_options(reference)
        return None
    if stored[0].suffix.lower() == ".tar":
        from raymerge.data.sources.shards import open_shards

        return open_shards(reference, stored)
    from raymerge.data.sources.parquet import open_parquet, split_files

    reference.require_options("image", "label", "split", "config")
    split, config = reference.options.get("split"), reference.options.get("config")
    files = split_files(stored, root, split, config, reference.text)
    return open_parquet(reference, files)


def _stored_files(root: Path) -> list[Path] | None:
    """Return the tar files of a folder, or its Parquet files at most two folders deeper.

    The search ends at the first image, and returns None.
    """
    files: list[Path] = []
    for path in _near(root, 3):
        if folder.is_image(path):
            return None
        if path.suffix.lower() == ".parquet" or (
            path.suffix.lower() == ".tar" and path.parent == root
        ):
            files.append(path)
    parquet = sorted(path for path in files if path.suffix.lower() == ".parquet")
    return parquet or sorted(files)


def _near(root: Path, depth: int) -> Iterator[Path]:
    """Yield files that are not hidden, those of a folder before those of its subfolders."""
    folders = []
    with os.scandir(root) as entries:
        for entry in entries:
            if folder.is_hidden(entry.name):
                continue
            if entry.is_file():
                yield Path(entry.path)
            elif depth > 1 and entry.is_dir():
                folders.append(Path(entry.path))
    for path in folders:
        yield from _near(path, depth - 1)


def _refuse_options(reference: DataReference) -> None:
    if reference.options:
        raise DataError(
            f"{reference.text}: a folder of images has no options; write {reference.place}"
        )
