"""The scan over λ: the models that the methods themselves make."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiment_worlds import ARITHMETIC, STEPS, bench
from world import World

from raymerge.apps.experiments import lambda_scan
from raymerge.apps.experiments.bench import mean_top1
from raymerge.config.experiments import LambdaScan
from raymerge.errors import UserError

TIES = {"method": {"name": "ties"}}


def _options(*scalings: float) -> LambdaScan:
    return LambdaScan(name="lambda_scan", scalings=scalings)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_scan_scores_what_the_method_makes(world: World, tmp_path: Path, method: str) -> None:
    given = bench(world, tmp_path)
    name = {"name": method, "scaling": 0.8}
    with given.workers() as group:
        config = given.config({"method": {"name": method}}, "scan")
        zero, scanned = lambda_scan.scan(config, group, (0.0, 0.8), tmp_path)
        direct = given.merge("direct", {"method": name}, group).scores
        pretrained = given.merge("zero", {"method": {"name": "zero_shot"}}, group).scores
    assert scanned == direct
    assert zero == pretrained
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_the_findings_agree_with_each_other(world: World, tmp_path: Path) -> None:
    methods = {"task_arithmetic": ARITHMETIC, "ties": TIES}
    findings = lambda_scan.run(bench(world, tmp_path, methods), _options(0.0, 0.5, 2.0))
    best, by_task, every = findings.tables
    mean, *by_method = findings.curves
    assert len(by_method) == 2
    for name in methods:
        assert mean.series[name] == every.rows[name]
        top1 = max(every.rows[name])
        assert best.rows[name][:2] == [f"{(0, 0.5, 2)[every.rows[name].index(top1)]:g}", top1]
    for name, curves in zip(methods, by_method, strict=True):
        columns = list(zip(*curves.series.values(), strict=True))
        assert [sum(column) / len(column) for column in columns] == pytest.approx(mean.series[name])
        assert by_task.rows[f"{name}: top-1"] == [max(each) for each in curves.series.values()]


def test_of_equals_the_smallest_lambda_is_best() -> None:
    assert lambda_scan._best((0.1, 0.2, 0.3), (0.5, 0.6, 0.6)) == (0.2, 0.6)


def test_a_method_without_a_single_lambda_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="methods: learned: adamerging has no single λ to scan"):
        lambda_scan.run(bench(world, tmp_path / "out", {"learned": STEPS}), _options(0.3))
    with pytest.raises(UserError, match="scalings: is empty"):
        lambda_scan.run(bench(world, tmp_path / "out"), _options())
    assert not (tmp_path / "out").exists()


def test_the_mean_of_nothing_is_none() -> None:
    assert mean_top1({}) is None
