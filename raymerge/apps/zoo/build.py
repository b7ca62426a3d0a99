"""Build the demo world on disk: pretrained model, experts, images, class names and a config.

Every part is written under a temporary name and renamed when it is complete, so an interrupted
build continues where it stopped. The marker file is written last: with it a build returns at once.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml
from PIL import Image
from tqdm import tqdm

from raymerge.apps.zoo.experts import train_expert
from raymerge.apps.zoo.images import FAMILIES, Split, draw_images
from raymerge.apps.zoo.joint import train_joint
from raymerge.apps.zoo.pretrain import pretrain, save_model
from raymerge.apps.zoo.recipe import TEMPLATE, ZooRecipe
from raymerge.files.atomic import write_text
from raymerge.files.output_folder import require_output

T = TypeVar("T")

_MARKER = "zoo.fingerprint"
_STARTED = ".zoo.started"
_EXPERT_WEIGHT = 30
"""Steps of the progress bar for one expert: about as long as so many pretraining steps."""


class RunTasks(Protocol):
    """Calls a picklable function once per argument tuple, in any process and order.

    Yields each result as it is finished; errors propagate.
    """

    def __call__(
        self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]], /
    ) -> Iterator[T]: ...


@dataclass(frozen=True)
class ZooPaths:
    """The paths of a built world's parts."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "zoo.yaml"

    @property
    def pretrained(self) -> Path:
        return self.root / "pretrained"

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(FAMILIES)

    @property
    def joint(self) -> Path:
        return self.root / "joint.safetensors"

    def expert(self, task: str) -> Path:
        return self.root / "experts" / f"{task}.safetensors"

    def images(self, task: str, split: Split) -> Path:
        return self.root / "data" / task / split

    def classnames(self, task: str) -> Path:
        return self.root / "classnames" / f"{task}.txt"


def build_zoo(
    root: Path,
    *,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
    run_tasks: RunTasks | None = None,
    recipe: ZooRecipe | None = None,
    joint: bool = True,
) -> ZooPaths:
    """Build the world under ``root`` unless it exists, and return its paths.

    ``joint``: also train the joint reference. ``run_tasks`` runs the independent parts (image
    folders, experts); by default ``workers`` processes do, or this one if that is None or 1. The
    files do not depend on it. A world of another seed or recipe is rebuilt. Raises
    :class:`~raymerge.errors.UserError` for a folder that holds anything else.
    """
    recipe = recipe or ZooRecipe()
    paths = ZooPaths(Path(root).absolute())
    fingerprint = recipe.fingerprint(seed)
    # The marker is written last: without it, missing parts are made.
    if _read(paths.root / _MARKER) != fingerprint:
        _prepare(paths, fingerprint)
        _build(paths, recipe, seed, run_tasks or in_processes(workers), progress)
        write_text(paths.root / _MARKER, fingerprint)
    if joint:
        train_joint(paths.root, seed, recipe)
    return paths


def _build(paths: ZooPaths, recipe: ZooRecipe, seed: int, run: RunTasks, progress: bool) -> None:
    total = recipe.pretrain.steps + len(paths.tasks) * (1 + _EXPERT_WEIGHT)
    with tqdm(
        total=total, desc="zoo: images", unit="step", file=sys.stderr, disable=not progress
    ) as bar:
        _write_texts(paths)
        for _ in run(write_images, [(paths.root, task, seed, recipe) for task in paths.tasks]):
            bar.update(1)
        bar.set_description("zoo: pretraining")
        _pretrain(paths, recipe, seed, bar)
        bar.set_description("zoo: experts")
        for _ in run(train_expert, [(paths.root, task, seed, recipe) for task in paths.tasks]):
            bar.update(_EXPERT_WEIGHT)


def _prepare(paths: ZooPaths, fingerprint: str) -> None:
    """Create the folders; parts of another recipe or seed are removed first.

    A folder that holds anything else is refused, so that no ``data`` of the user's is deleted.
    """
    require_output(paths.root, [_STARTED], writer="`raymerge demo`", what="zoo")
    if _read(paths.root / _STARTED) != fingerprint:
        (paths.root / _MARKER).unlink(missing_ok=True)
        paths.joint.unlink(missing_ok=True)
        for part in ("pretrained", "experts", "data", "classnames"):
            shutil.rmtree(paths.root / part, ignore_errors=True)
    paths.root.mkdir(parents=True, exist_ok=True)
    write_text(paths.root / _STARTED, fingerprint)
    for part in ("experts", "data", "classnames"):
        (paths.root / part).mkdir(exist_ok=True)


# --- parts -------------------------------------------------------------------------------------


def write_images(root: Path, task: str, seed: int, recipe: ZooRecipe) -> Path:
    """Write ``data/<task>/``: a flat ``adapt`` folder, and ``test`` with a folder per class."""
    target = root / "data" / task

    def fill(folder: Path) -> None:
        names = FAMILIES[task].classnames
        for name in names:
            (folder / "test" / name).mkdir(parents=True)
        (folder / "adapt").mkdir()
        for index, image in enumerate(draw_images(seed, task, "adapt", recipe.adapt_images)[0]):
            Image.fromarray(image).save(folder / "adapt" / f"{index:04d}.png")
        tests = zip(*draw_images(seed, task, "test", recipe.test_images), strict=True)
        for index, (image, label) in enumerate(tests):
            Image.fromarray(image).save(folder / "test" / names[label] / f"{index:04d}.png")

    _make_folder(target, fill)
    return target


def _pretrain(paths: ZooPaths, recipe: ZooRecipe, seed: int, bar: tqdm[Any]) -> None:
    def advance(steps: int) -> None:
        bar.update(steps)

    def fill(folder: Path) -> None:
        save_model(pretrain(recipe, seed, advance), recipe.model, folder)

    if not paths.pretrained.exists():
        _make_folder(paths.pretrained, fill)
    else:
        bar.update(recipe.pretrain.steps)


def _write_texts(paths: ZooPaths) -> None:
    for task in paths.tasks:
        write_text(paths.classnames(task), "\n".join(FAMILIES[task].classnames) + "\n")
    write_text(paths.config, yaml.safe_dump(_config(paths.tasks), sort_keys=False))


def _config(tasks: Sequence[str]) -> dict[str, Any]:
    """Return the raymerge config, with paths relative to the world's root."""
    return {
        "model": "local-dir:pretrained",
        "tasks": [
            {
                "name": task,
                "checkpoint": f"experts/{task}.safetensors",
                "classnames": f"classnames/{task}.txt",
                "templates": [TEMPLATE],
                "adapt": f"data/{task}/adapt",
                "test": f"data/{task}/test",
            }
            for task in tasks
        ],
        "method": {"name": "adamerging"},
        "optimizer": {"steps": 500, "batch_size": 16, "lr": 0.001},
        "seed": 0,
    }


# --- files and processes -----------------------------------------------------------------------


def _read(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None


def _make_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill ``folder`` under a temporary name, then rename it; does nothing if it exists."""
    if folder.exists():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    partial.rename(folder)


def in_processes(workers: int | None) -> RunTasks:
    """Return a function that runs tasks in ``workers`` processes; in this one for None or 1."""

    def run(function: Callable[..., T], arguments: Sequence[tuple[Any, ...]], /) -> Iterator[T]:
        if workers is None or workers <= 1:
            yield from (function(*each) for each in arguments)
            return
        count = min(workers, len(arguments), os.cpu_count() or 1)
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            for future in [pool.submit(function, *each) for each in arguments]:
                yield future.result()

    return run
