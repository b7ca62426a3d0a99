"""Corrupted copies of images: made once, kept in the cache, the same on every machine.

    $RAYMERGE_CACHE/corrupted/jpeg-2-cifar-1f0c…/<the images' own paths>.png
    $RAYMERGE_CACHE/corrupted/jpeg-2-cifar-77e1…/00000.tar

The first is an image folder's; that of a stored data set is one too, of tar shards in its order.
A copy is named after all that decides it: the corruption with its parameters and seed, and the
source's path with the names, sizes and times of its images or files. It appears by one rename, so
it is whole or absent. PNG keeps every level, so what is scored is what the corruption made.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import tempfile
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
from raymerge.errors import DataError, RunError
from raymerge.files.atomic import cache_folder
from raymerge.files.progress import Progress, progress_bar

_FORMAT = 1  # another number when the files that one key stands for would differ
_CHUNK = 64
_ALONE = 4 * _CHUNK  # so few images are sooner done than processes are started


@dataclass(frozen=True)
class Corruption:
    """As in :func:`~raymerge.apps.experiments.corruptions.corrupt`; ``seed``: of the run."""

    name: str
    severity: int = 2
    parameters: str = "cifar"
    seed: int = 0


def corrupted_tasks(
    tasks: Sequence[TaskConfig], corruption: Corruption, workers: int = 1
) -> tuple[TaskConfig, ...]:
    """The tasks on corrupted copies of their images; copies that are there are not made again.

    ``workers``: processes. An image's draws depend on its path below its folder and the seed alone,
    so a task that adapts on its test images does so on the same corrupted ones. Raises
    :class:`DataError` for a folder or an image that is wrong.
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
    """What is copied; hashable."""

    def __len__(self) -> int: ...

    def what(self) -> dict[str, Any]:
        """Decides the copy, but for the corruption."""
        ...

    def part(self, start: int) -> _Source:
        """The ``_CHUNK`` images from ``start`` on."""
        ...

    def write(self, corruption: Corruption, partial: Path) -> int:
        """Copy the images; returns how many."""
        ...


def _target(source: _Source, corruption: Corruption) -> Path:
    key = {"format": _FORMAT, **asdict(corruption), **source.what()}
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    name = f"{corruption.name}-{corruption.severity}-{corruption.parameters}-{digest}"
    return cache_folder() / "corrupted" / name


@dataclass(frozen=True)
class _Folder:
    """One folder and its images' paths below it, sorted."""

    root: Path
    images: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.images)

    def what(self) -> dict[str, Any]:
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
            pixels_HW3 = corrupted(self.root / image, image.as_posix(), corruption)
            Image.fromarray(pixels_HW3).save(copy, "PNG")
        return len(self)


@dataclass(frozen=True)
class _Stored:
    """A data set; ``labels``: places in the task's class names, empty if it has none.
    ``start``: of this part."""

    reference: str
    images: StoredImages
    labels: tuple[int, ...]
    start: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def what(self) -> dict[str, Any]:
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
                pixels_HW3 = corrupted(image, image.key, corruption)
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
    """By the task's key: ``adapt`` and ``test``, where it has them."""
    found: dict[str, _Source] = {}
    if task.adapt is not None:
        images = unlabeled_images(task.adapt, f"{where}.adapt")
        if isinstance(images.items, StoredImages):
            images = _with_labels(task, images)
        found["adapt"] = _source(task.adapt, images)
    if task.test is not None:
        images = labelled_images(task.test, task.classnames, f"{where}.test")
        found["test"] = _source(task.test, images)
    return found


def _with_labels(task: TaskConfig, images: ImageList) -> ImageList:
    """A data set's labels, if it has any: methods that look at them find them in the copy."""
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
                f"image {root / image}: its copy would have the name of that of "
                f"{copies[_png(image)].name}; rename one"
            )
    return _Folder(root, images)


def _png(image: Path) -> Path:
    """Where the copy lies below its folder; its name ends in .png."""
    return image if image.suffix == ".png" else image.with_name(image.name + ".png")


# --- making them -------------------------------------------------------------------------------


def _make(sources: Sequence[_Source], corruption: Corruption, workers: int) -> None:
    count = sum(map(len, sources))
    with (
        _pool(workers if count > _ALONE else 1) as pool,
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
    target = _target(source, corruption)
    parts = [source.part(start) for start in range(0, len(source), _CHUNK)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            jobs = [(part, corruption, partial) for part in parts]
            for done in (pool.map if pool else map)(_write_part, jobs):
                progress(done)
            partial.chmod(0o755)
            _rename(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {error.strerror or error}") from error


def _rename(partial: Path, target: Path) -> None:
    """Into place; another process may have made the same copy meanwhile."""
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _write_part(job: tuple[_Source, Corruption, Path]) -> int:
    part, corruption, partial = job
    return part.write(corruption, partial)


def corrupted(item: Item, key: str, corruption: Corruption) -> np.ndarray:
    """(H, W, 3) uint8: the image corrupted, at its own resolution; ``key`` decides its draws."""
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
