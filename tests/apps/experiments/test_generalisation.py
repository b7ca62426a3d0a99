"""Generalisation: unseen tasks are neither merged nor adapted on, and are tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from experiment_worlds import ARITHMETIC, STEPS, bench
from world import World

from raymerge.apps.experiments import generalisation
from raymerge.apps.experiments.published_numbers import SPLITS
from raymerge.config import load_config
from raymerge.config.experiments import Generalisation
from raymerge.errors import UserError


def _options(*unseen: tuple[str, ...]) -> Generalisation:
    return Generalisation(name="generalisation", unseen=unseen)


def test_unseen_tasks_have_no_row_of_lambda_and_no_images(world: World, tmp_path: Path) -> None:
    methods = {"adamerging": STEPS, "task_arithmetic": ARITHMETIC}
    findings = generalisation.run(bench(world, tmp_path, methods), _options(("shade", "shape")))
    run = tmp_path / "runs" / "unseen-shade-shape" / "adamerging"
    assert json.loads((run / "lambdas.json").read_text())["tasks"] == ["colour", "tone"]
    unseen = [t for t in load_config(run / "config.yaml").tasks if t.name in ("shade", "shape")]
    assert [(task.checkpoint, task.adapt) for task in unseen] == [(None, None)] * 2

    table = findings.tables[0]
    assert table.columns == [
        *("colour", "tone", "seen mean"),
        *("shade", "shape", "unseen mean"),
    ]
    for row in table.rows.values():
        seen, unseen_part = row[:3], row[3:]
        for one, two, mean in (seen, unseen_part):
            assert mean == pytest.approx((one + two) / 2)


def test_a_split_has_a_table_and_every_published_pair_another(world: World, tmp_path: Path) -> None:
    methods = {"task_arithmetic": ARITHMETIC}
    findings = generalisation.run(bench(world, tmp_path, methods), _options(("tone",), ("shape",)))
    titles = [table.title for table in findings.tables]
    assert titles == [
        "Unseen: tone",
        "Unseen: shape",
        "Published, unseen: mnist, eurosat",
        "Published, unseen: resisc45, svhn",
    ]
    for table in findings.tables:
        assert {len(row) for row in table.rows.values()} == {len(table.columns)}
    assert all("not for this world" in table.caption for table in findings.tables[2:])


def test_the_published_numbers_improve_on_task_arithmetic() -> None:
    for split in SPLITS:
        ours, theirs = split.means["adamerging"], split.means["task_arithmetic"]
        assert all(a > b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("unseen", "says"),
    [
        (("colur",), "'colur' is not in the base config; it has colour, shade"),
        (("colour", "shade", "tone", "shape"), "no task is left to merge"),
    ],
)
def test_a_wrong_split_is_refused_before_any_merge(
    world: World, tmp_path: Path, unseen: tuple[str, ...], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        generalisation.run(bench(world, tmp_path / "out"), _options(("tone",), unseen))
    assert not (tmp_path / "out").exists()
