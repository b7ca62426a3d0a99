"""The Grafana dashboard: valid expressions, panels that do not overlap, and a choice of run."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import promql_parser
import pytest
from commands import read_json
from dashboard import GRAFANA, expressions, metric_names


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return dict(read_json(GRAFANA))


def test_every_expression_is_promql(dashboard: dict[str, Any]) -> None:
    for each in expressions(dashboard):
        promql_parser.parse(each)
    with pytest.raises(ValueError, match="left parenthesis"):
        promql_parser.parse("sum by (run (ray_raymerge_step)")


def test_every_panel_plots_a_known_metric(
    dashboard: dict[str, Any],
) -> None:
    for panel in dashboard["panels"]:
        assert metric_names({"panels": [panel]}), panel["title"]


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = (one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]) or (
            one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
    assert all(at["x"] + at["w"] <= 24 for at in (panel["gridPos"] for panel in panels))


def test_the_reader_chooses_the_source_and_the_run(dashboard: dict[str, Any]) -> None:
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert names == ["datasource", "run"]
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            if "raymerge" in target["expr"]:
                assert 'run=~"$run"' in target["expr"]
