"""Means and spreads over seeds, checked by hand."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest
from experiment_worlds import ARITHMETIC, STEPS, bench
from world import World

from raymerge.apps.experiments import seeds
from raymerge.apps.experiments.seeds import UNIFORM, table
from raymerge.config.experiments import Seeds
from raymerge.errors import UserError


def test_gains_are_taken_seed_by_seed() -> None:
    found = {"adamerging": [0.5, 0.75], "kl": [0.625, 0.875], UNIFORM: [0.5, 0.625]}
    made = table([3, 4], found)
    assert made.columns[:4] == ["seed 3", "seed 4", "mean", "sd"]
    assert made.rows["kl"][:3] == [0.625, 0.875, 0.75]
    assert made.rows["kl"][3] == pytest.approx(0.25 / 2**0.5)
    # Over AdaMerging the gain is the same in both worlds, though the worlds differ.
    assert made.rows["kl"][4:6] == [0.125, 0.0]
    assert made.rows["kl"][6:] == [0.1875, pytest.approx(0.125 / 2**0.5)]


def test_one_seed_has_no_spread() -> None:
    row = table([0], {"kl": [0.5], "adamerging": [0.25]}).rows["kl"]
    assert row == [0.5, 0.5, None, 0.25, None]


def test_every_seed_is_merged_and_scanned(world: World, tmp_path: Path) -> None:
    asked: list[int] = []
    given = bench(world, tmp_path, {"adamerging": STEPS, "task_arithmetic": ARITHMETIC})

    def reseed(seed: int):  # type: ignore[no-untyped-def]
        asked.append(seed)
        return given.base.model_copy(update={"seed": seed})

    given.reseed = reseed
    made = seeds.run(given, Seeds(name="seeds", seeds=(5, 6))).tables[0]
    assert asked == [5, 6]
    assert list(made.rows) == [UNIFORM, "adamerging", "task_arithmetic"]
    for name, row in made.rows.items():
        assert row[2] == pytest.approx(mean(row[:2])), name
        assert (tmp_path / "runs" / "seed6" / name).is_dir() or name == UNIFORM
    best, arithmetic = made.rows[UNIFORM], made.rows["task_arithmetic"]
    assert all(a >= b for a, b in zip(best[:2], arithmetic[:2], strict=True))


def test_a_base_without_test_images_is_refused(world: World, tmp_path: Path) -> None:
    given = bench(world, tmp_path)
    tasks = tuple(task.model_copy(update={"test": None}) for task in given.base.tasks)
    given.base = given.base.model_copy(update={"tasks": tasks})
    with pytest.raises(UserError, match="no task of the base config has test images"):
        seeds.run(given, Seeds(name="seeds"))
