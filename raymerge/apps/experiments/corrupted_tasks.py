"""Corrupted copies of images: made once, kept in the cache, the same on every machine.

    $RAYMERGE_CACHE/corrupted/jpeg-2-cifar-1f0c…/<the images' own paths>.png
    $RAYMERGE_CACHE/corrupted/jpeg-2-cifar-77e1…/00000.tar

The first is a copy of an image folder, the second of a stored data set, as tar shards in its order.
A copy's name is a digest of everything that decides it: the corruption with its parameters and
seed, and the source's path with the names, sizes and times of its images or files. It appears by
one rename, so it is complete or absent. PNG is lossless, so no level changes before scoring.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from raymerge.apps.experiments.corruptions import corrupt, image_seed
from raymerge.config import TaskConfig
from raymerge.data.images import DECODE_ERRORS, ImageList, Item, StoredImages, open_image
from raymerge.data.sources import labelled_images, unlabeled_images
from raymerge.data.sources.urls import local_reference
from raymerge.errors import DataError
from raymerge.files.atomic import cache_folder, stage_folder
from raymerge.files.progress import Progress, progress_bar

_FORMAT = 1  # increased when the files of a key would differ
_CHUNK = 64
_FEW = 4 * _CHUNK  # up to so many images one process is faster than starting several


@dataclass(frozen=True)
class Corruption:
    """The arguments of :func:`~raymerge.apps.experiments.corruptions.corrupt`; the run's seed."""

    name: str
    severity: int = 2
    parameters: str = "cifar"
    seed: int = 0


def corrupted_tasks(
    tasks: Sequence[TaskConfig], corruption: Corruption, workers: int = 1
) -> tuple[TaskConfig, ...]:
    """Return the tasks with corrupted copies of their images; missing copies are made.

    ``workers``: processes. An image's draws depend only on its path below its folder and the seed,
    so a task that adapts on its test images adapts on the same corrupted ones. Raises
    :class:`DataError` for a wrong folder or image.
    """
    sources = [_sources(task, f"tasks[{i}]") for i, task in enumerate(tasks)]
    missing = {
        source: None
        for task in sources
        for source in task.values()
        if not _target(source, corruption).is_dir()
    }
    if missing:
        _make(list(missing), corruption, workers)
    return tuple(
        task.model_copy(
            update={key: str(_target(source, corruption)) for key, source in own.items()}
        )
        for task, own in zip(tasks, sources, strict=True)
    )


class _Source(Protocol):
    """Images to copy; hashable."""

    def __len__(self) -> int: ...

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the copy, except the corruption."""
        ...

    def part(self, start: int) -> _Source:
        """Return the ``_CHUNK`` images from ``start`` on."""
        ...

    def write(self, corruption: Corruption, partial: Path) -> int:
        """Write the copies and return their number."""
        ...


def _target(source: _Source, corruption: Corruption) -> Path:
    key = {"format": _FORMAT, **asdict(corruption), **source.identity()}
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    name = f"{corruption.name}-{corruption.severity}-{corruption.parameters}-{digest}"
    return cache_folder() / "corrupted" / name


@dataclass(frozen=True)
class _Folder:
    """An image folder, with the sorted paths of its images below it."""

    root: Path
    images: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, Any]:
        stats = [(self.root / image).stat() for image in self.images]
        return {
            "root": str(self.root.resolve()),
            "images": [
                (image.as_posix(), stat.st_size, stat.st_mtime_ns)
                for image, stat in zip(self.images, stats, strict=True)
            ],
        }

    def part(self, start: int) -> _Folder:
        return _Folder(self.root, self.images[start : start + _CHUNK])

    def write(self, corruption: Corruption, partial: Path) -> int:
        for image in self.images:
            copy = partial / _png(image)
            copy.parent.mkdir(parents=True, exist_ok=True)
            pixels_HW3 = corrupt_image(self.root / image, image.as_posix(), corruption)
            Image.fromarray(pixels_HW3).save(copy, "PNG")
        return len(self)


@dataclass(frozen=True)
class _Stored:
    """A stored data set, or the part of it from ``start`` on.

    ``labels``: indices of the task's class names; empty if the data set has none.
    """

    reference: str
    images: StoredImages
    labels: tuple[int, ...]
    start: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, Any]:
        return {
            "data": self.reference,
            "files": repr(self.images.source),
            "images": len(self.images),
            "labels": self.labels,
        }

    def part(self, start: int) -> _Stored:
        here = slice(start, start + _CHUNK)
        return _Stored(self.reference, self.images[here], self.labels[here], start)

    def write(self, corruption: Corruption, partial: Path) -> int:
        with tarfile.open(partial / f"{self.start:08}.tar", "x") as shard:
            for i in range(len(self)):
                image = self.images[i]
                content = io.BytesIO()
                pixels_HW3 = corrupt_image(image, image.key, corruption)
                Image.fromarray(pixels_HW3).save(content, "PNG")
                _add(shard, f"{self.start + i:08}.png", content.getvalue())
                if self.labels:
                    _add(shard, f"{self.start + i:08}.cls", str(self.labels[i]).encode())
        return len(self)


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def _sources(task: TaskConfig, where: str) -> dict[str, _Source]:
    """Return the sources of ``adapt`` and ``test``, if the task has them."""
    sources: dict[str, _Source] = {}
    if task.adapt is not None:
        images = unlabeled_images(task.adapt, f"{where}.adapt")
        if isinstance(images.items, StoredImages):
            images = _with_labels(task, images)
        sources["adapt"] = _source(task.adapt, images)
    if task.test is not None:
        images = labelled_images(task.test, task.classnames, f"{where}.test")
        sources["test"] = _source(task.test, images)
    return sources


def _with_labels(task: TaskConfig, images: ImageList) -> ImageList:
    """Return the images with their labels if they have any, so that the copy has them too."""
    try:
        return labelled_images(str(task.adapt), task.classnames, "adapt")
    except DataError:
        return images


def _source(reference: str, images: ImageList) -> _Source:
    if isinstance(images.items, StoredImages):
        labels = images.labels if min(images.labels) >= 0 else ()
        return _Stored(reference, images.items, labels)
    root = Path(local_reference(reference))
    return _folder(root, [item for item in images.items if isinstance(item, Path)])


def _folder(root: Path, paths: Iterable[Path]) -> _Folder:
    images = tuple(sorted(path.relative_to(root) for path in paths))
    copies = {_png(image): image for image in images}
    for image in images:
        if copies[_png(image)] != image:
            raise DataError(
                f"image {root / image}: its copy would have the same name as the copy of "
                f"{copies[_png(image)].name}; rename one of them"
            )
    return _Folder(root, images)


def _png(image: Path) -> Path:
    """Return the path of the copy below its folder; its name ends in .png."""
    return image if image.suffix == ".png" else image.with_name(image.name + ".png")


# --- making the copies -------------------------------------------------------------------------


def _make(sources: Sequence[_Source], corruption: Corruption, workers: int) -> None:
    count = sum(map(len, sources))
    with (
        _pool(workers if count > _FEW else 1) as pool,
        progress_bar(f"corrupting: {corruption.name}", unit="img", total=count) as progress,
    ):
        for source in sources:
            _make_one(source, corruption, pool, progress)


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    if workers <= 1:
        yield None
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield pool


def _make_one(
    source: _Source, corruption: Corruption, pool: ProcessPoolExecutor | None, progress: Progress
) -> None:
    parts = [source.part(start) for start in range(0, len(source), _CHUNK)]
    with stage_folder(_target(source, corruption), exist_ok=True) as partial:
        jobs = [(part, corruption, partial) for part in parts]
        for done in (pool.map if pool else map)(_write_part, jobs):
            progress(done)


def _write_part(job: tuple[_Source, Corruption, Path]) -> int:
    part, corruption, partial = job
    return part.write(corruption, partial)


def corrupt_image(item: Item, key: str, corruption: Corruption) -> np.ndarray:
    """Return the corrupted image (H, W, 3) uint8 at its own resolution; ``key`` seeds it."""
    try:
        with open_image(item) as opened:
            pixels_HW3 = np.asarray(opened.convert("RGB"))
    except DECODE_ERRORS as error:
        raise DataError(
            f"image {item}: does not decode ({type(error).__name__}); replace or remove it"
        ) from error
    seed = image_seed(corruption.seed, key)
    return corrupt(
        pixels_HW3,
        corruption.name,
        corruption.severity,
        parameters=corruption.parameters,
        seed=seed,
    )
