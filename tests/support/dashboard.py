"""The queries of the Grafana dashboard."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GRAFANA = Path(__file__).parents[2] / "cluster" / "grafana" / "raymerge.json"


def expressions(dashboard: Mapping[str, Any]) -> list[str]:
    """Return all panels' queries as PromQL, with Grafana's own variables replaced."""
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [each.replace("$__rate_interval", "1m").replace("$run", ".*") for each in expressions]


def metric_names(dashboard: Mapping[str, Any]) -> set[str]:
    found = re.compile(r"ray_(?:raymerge|object_store)_\w+")
    return {name for each in expressions(dashboard) for name in found.findall(each)}
