"""Corrupted copies: deterministic, of the same names and classes, made once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from commands import tree
from PIL import Image
from world import World, write_image

from raymerge.apps.experiments.corrupted_tasks import Corruption, corrupted_tasks
from raymerge.apps.experiments.corruptions import corrupt, image_seed
from raymerge.config import TaskConfig
from raymerge.data.folder import labelled_images
from raymerge.errors import DataError

NOISE = Corruption("gaussian_noise", seed=3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _task(world: World, index: int = 0) -> TaskConfig:
    return world.parse().tasks[index]


def _content(folder: str) -> dict[str, str]:
    root = Path(folder)
    return {str(Path(path).relative_to(root)): digest for path, digest in tree(root).items()}


def test_a_copy_has_the_names_and_classes_of_its_source(world: World, cache: Path) -> None:
    task = _task(world)
    (copy,) = corrupted_tasks([task], NOISE)
    for key in ("adapt", "test"):
        source, made = _content(getattr(task, key)), _content(getattr(copy, key))
        assert list(source) == list(made)
        files = [path for path, digest in source.items() if digest != "folder"]
        assert all(source[path] != made[path] for path in files)
    labels = labelled_images(copy.test or "", copy.classnames, "test").labels
    assert labels == labelled_images(task.test or "", task.classnames, "test").labels
    assert copy.model_copy(update={"adapt": task.adapt, "test": task.test}) == task


def test_an_image_is_corrupted_at_its_own_resolution_by_its_own_seed(
    world: World, cache: Path
) -> None:
    task = _task(world)
    (copy,) = corrupted_tasks([task], NOISE)
    path = Path("red") / "000.png"
    source = np.asarray(Image.open(Path(task.test or "") / path))
    expected = corrupt(source, "gaussian_noise", seed=image_seed(3, "red/000.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(Path(copy.test or "") / path)), expected)


def test_the_same_bytes_in_another_cache_and_others_with_another_seed(
    world: World, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = _task(world)
    (first,) = corrupted_tasks([task], NOISE)
    (other,) = corrupted_tasks([task], Corruption("gaussian_noise", seed=4))
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "elsewhere"))
    (again,) = corrupted_tasks([task], NOISE)
    assert again.test != first.test
    assert _content(again.test or "") == _content(first.test or "")
    assert _content(other.test or "") != _content(first.test or "")


def test_copies_are_made_once(world: World, cache: Path) -> None:
    task = _task(world)
    corrupted_tasks([task], NOISE)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    corrupted_tasks([task], NOISE)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    assert not [path for path in (cache / "corrupted").iterdir() if path.name.startswith(".")]


def test_a_source_that_changed_is_copied_anew(tmp_path: Path, cache: Path) -> None:
    task = _flat(tmp_path / "images")
    (first,) = corrupted_tasks([task], NOISE)
    write_image(tmp_path / "images" / "new.png", np.random.default_rng(1))
    (second,) = corrupted_tasks([task], NOISE)
    assert first.adapt != second.adapt
    assert len(_content(second.adapt or "")) == len(_content(first.adapt or "")) + 1


def test_a_task_that_adapts_on_its_test_images_gets_one_copy(world: World, cache: Path) -> None:
    task = _task(world)
    same = task.model_copy(update={"adapt": task.test})
    (copy,) = corrupted_tasks([same], NOISE)
    assert copy.adapt == copy.test


def test_processes_write_what_one_writes(
    world: World, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymerge.apps.experiments.corrupted_tasks._FEW", 0)
    (parallel,) = corrupted_tasks([_task(world)], NOISE, workers=2)
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "alone"))
    (alone,) = corrupted_tasks([_task(world)], NOISE)
    assert _content(parallel.test or "") == _content(alone.test or "")


def test_a_jpeg_becomes_a_png_of_its_own_name(tmp_path: Path, cache: Path) -> None:
    task = _flat(tmp_path / "images")
    Image.open(tmp_path / "images" / "a.png").save(tmp_path / "images" / "a.jpg")
    (copy,) = corrupted_tasks([task], NOISE)
    assert sorted(_content(copy.adapt or "")) == ["a.jpg.png", "a.png"]
    Image.open(tmp_path / "images" / "a.png").save(tmp_path / "images" / "a.jpg.png")
    with pytest.raises(DataError, match=r"a\.jpg.*would have the same name.*rename one"):
        corrupted_tasks([task], NOISE)


def test_a_damaged_image_is_named_and_leaves_no_copy(tmp_path: Path, cache: Path) -> None:
    task = _flat(tmp_path / "images")
    (tmp_path / "images" / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png: does not decode .*; replace or remove it"):
        corrupted_tasks([task], NOISE)
    assert list((cache / "corrupted").iterdir()) == []


def _flat(folder: Path) -> TaskConfig:
    write_image(folder / "a.png", np.random.default_rng(0))
    return TaskConfig(
        name="flat", checkpoint="x.safetensors", classnames=("a", "b"), adapt=str(folder)
    )
