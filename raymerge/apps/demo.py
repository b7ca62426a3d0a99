"""``raymerge demo``: build the demo world, merge it with every method, print and draw one table.

Every merge is an ordinary run; the workers (Ray actors, one per core) are started once for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from raymerge.apps.experiments.bench import Bench, Changes, report_line
from raymerge.apps.experiments.lambda_scan import means, scan
from raymerge.apps.experiments.methods import METHODS, known_methods
from raymerge.apps.zoo import ZooPaths, ZooRecipe, build_zoo
from raymerge.config import Config, load_config
from raymerge.distributed.placement import environment_address
from raymerge.engine.driver.groups import WorkerGroup
from raymerge.engine.scores import results_json
from raymerge.files.atomic import cache_folder, write_json
from raymerge.files.output_folder import require_output
from raymerge.report import comparison_table, write_plots, write_report
from raymerge.runs.plan.make import local_resources

SCALINGS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def run_demo(
    output: Path,
    zoo: Path | None = None,
    seed: int = 0,
    *,
    recipe: ZooRecipe | None = None,
    steps: int | None = None,
) -> str:
    """Write the comparison below ``output`` and return its table as text.

    ``recipe`` and ``steps`` give a smaller world and shorter merges, for tests. Raises
    :class:`~raymerge.errors.UserError` before any work if ``output`` holds anything else than an
    earlier demo.
    """
    from raymerge.distributed.cluster import connect

    output = output.absolute()
    require_output(output, ("comparison.json", "runs"), writer="`raymerge demo`")
    # One Ray for the training of the world and for all merges.
    began = perf_counter()
    workers = _workers()
    with connect(None, local_resources().cpus):
        paths = _zoo(zoo, seed, recipe or ZooRecipe())
        built = perf_counter()
        base = load_config(paths.config, [f"seed={seed}"])
        base = base.model_copy(update={"cluster": base.cluster.model_copy(update=workers)})
        bench = Bench(base, output)
        with bench.workers() as group:
            comparison = _compare(bench, group, _methods(base, steps))
    # The table, as data and as pages.
    comparison["timings"] = {"seconds": {"zoo": built - began, "merges": perf_counter() - built}}
    write_json(output / "comparison.json", comparison)
    write_plots(output)
    report = write_report(output)
    report_line(f"{perf_counter() - began:.0f} s in all; report: {report}")
    return comparison_table(comparison["methods"], comparison["uniform_scan"])


def _methods(base: Config, steps: int | None) -> dict[str, Changes]:
    """Return the rows of the experiment ``methods``. ``steps``: of every method that learns."""
    methods = known_methods(base)
    if steps is None:
        return methods
    return {
        name: {**changes, "optimizer": {**changes.get("optimizer", {}), "steps": steps}}
        for name, changes in methods.items()
    }


def _compare(bench: Bench, group: WorkerGroup, methods: Mapping[str, Changes]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, changes in methods.items():
        result = bench.merge(name, changes, group)
        rows[name] = results_json(result.config.method.name, result.scores)
        rows[name]["timings"] = {"seconds": dict(result.seconds)}
    return {"methods": rows, "uniform_scan": _uniform_scan(bench, group), "notes": list(_NOTES)}


_NOTES = (
    "The zoo is raymerge's own: a small CLIP model trained from scratch and eight tasks of drawn "
    "images; its numbers are not those of the paper's checkpoints.",
    "The best uniform λ is chosen with the test labels, which no merging method may see.",
    "Methods that learn, and Fisher merging and RegMean, see 300 unlabeled images per task, "
    "disjoint from the test images.",
    "AdaMerging rows use the preset `fast`: 50 steps, learning rate 2e-2 falling along a cosine; "
    "adamerging_500 is the paper's 500 steps at a constant 1e-3.",
)


def _uniform_scan(bench: Bench, group: WorkerGroup) -> dict[str, list[float]]:
    """Return task arithmetic's mean top-1 at each λ; choosing one needs labels (Fig 1)."""
    config = bench.config(METHODS["task_arithmetic"], "task_arithmetic")
    top1 = means(scan(config, group, SCALINGS, bench.output))
    return {"scalings": list(SCALINGS), "top1": top1}


def _zoo(root: Path | None, seed: int, recipe: ZooRecipe) -> ZooPaths:
    """Return the zoo, built or from the cache; its independent parts are Ray tasks."""
    from raymerge.distributed.tasks import run_tasks

    root = root or cache_folder() / f"zoo-{recipe.fingerprint(seed)}"
    report_line(f"zoo in {root}")
    return build_zoo(root, seed=seed, run_tasks=run_tasks, recipe=recipe)


def _workers() -> dict[str, Any]:
    """Return the cluster settings: a worker per GPU, without GPUs one per core, up to eight."""
    resources = local_resources()
    if environment_address() or resources.gpus:
        return {"workers": "auto"}
    return {"workers": min(8, resources.cpus), "cpus_per_worker": 1}
