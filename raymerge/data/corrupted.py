"""Corrupted copies of image folders: made once, kept in the cache, the same on every machine.

    $RAYMERGE_CACHE/corrupted/jpeg-2-cifar-1f0c…/<the images' own paths>.png

A copy is named after all that decides it: the corruption with its parameters and seed, and the
source's path with the names, sizes and times of its images. It appears by one rename, so it is
whole or absent. PNG keeps every level, so what is scored is what the corruption made.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from raymerge.config import TaskConfig
from raymerge.data.corruptions import corrupt, image_seed
from raymerge.data.folder import labelled_images, unlabeled_images
from raymerge.errors import DataError, RunError
from raymerge.files import cache_folder
from raymerge.progress import Progress, progress_bar

_FORMAT = 1  # another number when the files that one key stands for would differ
_CHUNK = 64
_ALONE = 4 * _CHUNK  # so few images are sooner done than processes are started
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Corruption:
    """As in :func:`~raymerge.data.corruptions.corrupt`; ``seed``: of the run."""

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
        source: None for task in sources for source in task.values() if not source.copy(corruption)
    }
    if missing:
        _make(list(missing), corruption, workers)
    return tuple(
        task.model_copy(update={key: str(source.target(corruption)) for key, source in own.items()})
        for task, own in zip(tasks, sources, strict=True)
    )


@dataclass(frozen=True)
class _Source:
    """One folder and its images' paths below it, sorted."""

    root: Path
    images: tuple[Path, ...]

    def target(self, corruption: Corruption) -> Path:
        stats = [(self.root / image).stat() for image in self.images]
        key = {
            "format": _FORMAT,
            **asdict(corruption),
            "root": str(self.root.resolve()),
            "images": [
                (image.as_posix(), stat.st_size, stat.st_mtime_ns)
                for image, stat in zip(self.images, stats, strict=True)
            ],
        }
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
        name = f"{corruption.name}-{corruption.severity}-{corruption.parameters}-{digest}"
        return cache_folder() / "corrupted" / name

    def copy(self, corruption: Corruption) -> Path | None:
        """The copy, if it is there."""
        target = self.target(corruption)
        return target if target.is_dir() else None


def _sources(task: TaskConfig, where: str) -> dict[str, _Source]:
    """By the task's key: ``adapt`` and ``test``, where it has them."""
    found = {}
    if task.adapt is not None:
        images = unlabeled_images(task.adapt, f"{where}.adapt")
        found["adapt"] = _source(task.adapt, images.paths)
    if task.test is not None:
        images = labelled_images(task.test, task.classnames, f"{where}.test")
        found["test"] = _source(task.test, images.paths)
    return found


def _source(folder: str, paths: Iterable[Path]) -> _Source:
    root = Path(folder)
    images = tuple(sorted(path.relative_to(root) for path in paths))
    copies = {_png(image): image for image in images}
    for image in images:
        if copies[_png(image)] != image:
            raise DataError(
                f"image {root / image}: its copy would have the name of that of "
                f"{copies[_png(image)].name}; rename one"
            )
    return _Source(root, images)


def _png(image: Path) -> Path:
    """Where the copy lies below its folder; its name ends in .png."""
    return image if image.suffix == ".png" else image.with_name(image.name + ".png")


# --- making them -------------------------------------------------------------------------------


def _make(sources: Sequence[_Source], corruption: Corruption, workers: int) -> None:
    count = sum(len(source.images) for source in sources)
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
    target = source.target(corruption)
    chunks = [source.images[i : i + _CHUNK] for i in range(0, len(source.images), _CHUNK)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            jobs = [(source.root, chunk, corruption, partial) for chunk in chunks]
            for done in (pool.map if pool else map)(_write_chunk, jobs):
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


def _write_chunk(job: tuple[Path, Sequence[Path], Corruption, Path]) -> int:
    root, images, corruption, partial = job
    for image in images:
        copy = partial / _png(image)
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(corrupted(root, image, corruption)).save(copy, "PNG")
    return len(images)


def corrupted(root: Path, image: Path, corruption: Corruption) -> np.ndarray:
    """(H, W, 3) uint8: ``root / image`` corrupted, at its own resolution."""
    try:
        with Image.open(root / image) as opened:
            pixels_HW3 = np.asarray(opened.convert("RGB"))
    except _DECODE_ERRORS as error:
        raise DataError(
            f"image {root / image}: does not decode ({type(error).__name__}); replace or remove it"
        ) from error
    seed = image_seed(corruption.seed, image.as_posix())
    return corrupt(
        pixels_HW3,
        corruption.name,
        corruption.severity,
        parameters=corruption.parameters,
        seed=seed,
    )
