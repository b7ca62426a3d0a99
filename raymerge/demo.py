"""``raymerge demo``: build the zoo, merge it with every main method, print one table, draw it.

Every merge goes through the same ``session.merge`` as a user's own; the workers (Ray actors, one
per core) are opened once and serve all of them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from raymerge.architecture import WEIGHTS_FILE
from raymerge.config import Config, load_config, parse_config
from raymerge.driver import WorkerGroup
from raymerge.errors import UserError
from raymerge.evaluation import results_json
from raymerge.files import cache_folder, write_json
from raymerge.merging.registry import describe
from raymerge.placement import environment_address
from raymerge.plan import local_resources
from raymerge.report import comparison_table, write_plots, write_report
from raymerge.session import Merging, merge, open_group, score
from raymerge.zoo import ZooPaths, ZooRecipe, build_zoo

SCALINGS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

FAST: Mapping[str, Any] = {"preset": "fast"}
PAPER: Mapping[str, Any] = {"optimizer": {"steps": 500, "lr": 1e-3, "batch_size": 16}}

METHODS: Mapping[str, Mapping[str, Any]] = {
    "zero_shot": {"method": {"name": "zero_shot"}},
    "individual": {"method": {"name": "individual"}},
    "average": {"method": {"name": "average"}},
    "task_arithmetic": {"method": {"name": "task_arithmetic", "scaling": 0.3}},
    "ties": {"method": {"name": "ties", "density": 0.2, "scaling": 0.3}},
    "adamerging_task": {"method": {"name": "adamerging", "granularity": "task"}, **FAST},
    "adamerging": {"method": {"name": "adamerging"}, **FAST},
    "adamerging_pp": {"method": {"name": "adamerging", "task_vectors": "ties"}, **FAST},
    "adamerging_500": {"method": {"name": "adamerging"}, **PAPER},
}
"""What each row changes in the zoo's config. The last is the paper's own optimiser settings."""


@dataclass(frozen=True)
class _Demo:
    """The zoo's config, the workers that serve it, where to write, and a limit on steps."""

    base: Config
    group: WorkerGroup
    output: Path
    steps: int | None = None

    def config(self, changes: Mapping[str, Any], name: str) -> Config:
        """The zoo's config with ``changes``, writing to ``runs/name``."""
        data = self.base.model_dump(mode="json", exclude_none=True, exclude={"optimizer"})
        data = {**data, **changes, "output": str(self.output / "runs" / name)}
        if self.steps is not None:
            data["optimizer"] = {**data.get("optimizer", {}), "steps": self.steps}
        return parse_config(data, root=self.output)


def run_demo(
    output: Path,
    zoo: Path | None = None,
    seed: int = 0,
    *,
    recipe: ZooRecipe | None = None,
    steps: int | None = None,
) -> str:
    """Write the comparison below ``output`` and return its table as text.

    ``recipe`` and ``steps`` are for a smaller world and shorter merges, as tests want them.

    Raises :class:`UserError` before any work if ``output`` holds something that no demo wrote.
    """
    from raymerge.distributed.cluster import connected

    output = output.absolute()
    _check_output(output)
    began = perf_counter()
    workers = _workers()
    with connected(None, local_resources().cpus):
        paths = _zoo(zoo, seed, recipe or ZooRecipe())
        built = perf_counter()
        base = load_config(paths.config, [f"seed={seed}"])
        base = base.model_copy(update={"cluster": base.cluster.model_copy(update=workers)})
        with open_group(base, None) as group:
            comparison = _compare(_Demo(base, group, output, steps))
    comparison["timings"] = {"seconds": {"zoo": built - began, "merges": perf_counter() - built}}
    write_json(output / "comparison.json", comparison)
    write_plots(output)
    report = write_report(output)
    _say(f"{perf_counter() - began:.0f} s in all; report: {report}")
    return comparison_table(comparison["methods"], comparison["uniform_scan"])


def _compare(demo: _Demo) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, changes in METHODS.items():
        began = perf_counter()
        config = demo.config(changes, name)
        result = merge(config, overwrite=True, group=demo.group)
        rows[name] = results_json(config.method.name, result.scores)
        rows[name]["timings"] = {"seconds": dict(result.seconds)}
        seconds = perf_counter() - began
        _say(f"{name}: {describe(config.method)}: {result.top1:.1%} ({seconds:.0f} s)")
    return {"methods": rows, "uniform_scan": _uniform_scan(demo), "notes": list(_NOTES)}


_NOTES = (
    "The zoo is raymerge's own: a small CLIP model made from nothing, eight tasks of drawn images; "
    "its numbers are not those of the paper's checkpoints.",
    "The best uniform λ is chosen with the test labels, which no merging method may see.",
    "Learned methods adapt on 300 unlabeled images per task, disjoint from the test images.",
    "AdaMerging rows use the preset `fast`: 50 steps, learning rate 2e-2 falling along a cosine; "
    "adamerging_500 is the paper's 500 steps at a constant 1e-3.",
)


def _uniform_scan(demo: _Demo) -> dict[str, list[float]]:
    """Task arithmetic's mean top-1 against its one λ, which needs labels to be chosen (Fig 1)."""
    merging = Merging(demo.config(METHODS["task_arithmetic"], "task_arithmetic"))
    top1 = []
    for scaling in SCALINGS:
        lambdas_KL = torch.full_like(merging.start(), scaling)
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / WEIGHTS_FILE
            merging.write(weights, lambdas_KL)
            rows = score(demo.base, demo.group, str(weights))
        top1.append(sum(row.top1 for row in rows.values()) / len(rows))
    return {"scalings": list(SCALINGS), "top1": top1}


def _check_output(output: Path) -> None:
    """A folder is taken if it is new, empty, or an earlier demo's."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output}: is a file; name a folder")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / "comparison.json").exists() and not (output / "runs").is_dir():
        raise UserError(f"output {output}: is in use and no demo wrote it; name another folder")


def _zoo(root: Path | None, seed: int, recipe: ZooRecipe) -> ZooPaths:
    """The zoo, built now or taken from the cache; its independent parts are Ray tasks."""
    from raymerge.distributed.tasks import run_tasks

    root = root or cache_folder() / f"zoo-{recipe.fingerprint(seed)}"
    _say(f"zoo in {root}")
    return build_zoo(root, seed=seed, run_tasks=run_tasks, recipe=recipe)


def _workers() -> dict[str, Any]:
    """One worker per GPU of the cluster; without GPUs one per core, up to eight."""
    resources = local_resources()
    if environment_address() or resources.gpus:
        return {"workers": "auto"}
    return {"workers": min(8, resources.cpus), "cpus_per_worker": 1}


def _say(text: str) -> None:
    print(f"raymerge: {text}", file=sys.stderr)
