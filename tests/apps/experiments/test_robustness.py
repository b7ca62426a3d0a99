"""Robustness: every condition with its own images, and the collapsed tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiment_worlds import ARITHMETIC, STEPS, bench
from world import World

from raymerge.apps.experiments import robustness
from raymerge.apps.experiments.bench import collapsed
from raymerge.apps.experiments.corruptions import CORRUPTIONS
from raymerge.apps.experiments.published_numbers import ROBUSTNESS
from raymerge.config.experiments import Robustness
from raymerge.errors import UserError


def test_the_tables_have_a_row_for_each_condition(world: World, tmp_path: Path) -> None:
    options = Robustness(
        name="robustness", tasks=("colour", "shape"), corruptions=("jpeg", "contrast")
    )
    methods = {"adamerging": STEPS, "task_arithmetic": ARITHMETIC}
    findings = robustness.run(bench(world, tmp_path, methods), options)
    means, *by_task = findings.tables
    conditions = ["clean", "jpeg", "contrast"]
    assert list(means.columns[:3]) == ["adamerging", "task_arithmetic", "collapsed tasks"]
    assert [table.columns for table in by_task] == [["colour", "shape"]] * 2
    for table in findings.tables:
        assert list(table.rows) == conditions
        assert {len(row) for row in table.rows.values()} == {len(table.columns)}
    for i, table in enumerate(by_task):
        for condition in conditions:
            each = table.rows[condition]
            assert means.rows[condition][i] == pytest.approx(sum(each) / 2)


def test_a_collapsed_task_is_reported(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_collapse(guard, state, entropy_K, marginal_K):  # type: ignore[no-untyped-def]
        seen = observe(guard, state, entropy_K, marginal_K)
        return seen[0], [1]

    from raymerge.merging.guard import CollapseGuard

    observe = CollapseGuard.observe
    monkeypatch.setattr(CollapseGuard, "observe", all_collapse)
    given = bench(world, tmp_path, {"adamerging": STEPS})
    options = Robustness(name="robustness", tasks=("colour", "shape"), corruptions=())
    table = robustness.run(given, options).tables[0]
    assert table.rows["clean"][1] == "adamerging: shape"


def test_a_method_without_learning_reports_no_collapse(world: World, tmp_path: Path) -> None:
    given = bench(world, tmp_path)
    with given.workers() as group:
        assert collapsed(given.merge("average", {"method": {"name": "average"}}, group)) == ()
        assert collapsed(given.merge("adamerging", STEPS, group)) == ()


def test_the_published_conditions_are_the_corruptions() -> None:
    for table in ROBUSTNESS.values():
        for means in table.values():
            assert tuple(means) == ("clean", *CORRUPTIONS)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": ("colour", "shapes")}, "task 'shapes' is not in the base config"),
        (
            {"corruptions": ("fog",)},
            "experiment.corruptions: 'fog' is unknown .known: motion_blur",
        ),
    ],
)
def test_wrong_names_are_refused_before_any_merge(
    world: World, tmp_path: Path, changes: dict[str, tuple[str, ...]], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        robustness.run(bench(world, tmp_path / "out"), Robustness(name="robustness", **changes))
    assert not (tmp_path / "out").exists()
