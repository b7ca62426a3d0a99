"""``raymerge experiment``: run one experiment and write ``experiment.json`` and a report.

The experiments are modules of this folder; their merges write below ``runs/`` of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

from raymerge.apps.experiments.bench import Bench, report_line
from raymerge.apps.experiments.findings import Findings, text
from raymerge.config import Config, load_config
from raymerge.config.experiments import EMBEDDED, ExperimentConfig
from raymerge.files.atomic import cache_folder, write_json
from raymerge.files.output_folder import require_output
from raymerge.report import write_report

EXPERIMENTS = (
    "methods",
    "generalisation",
    "robustness",
    "entropy_loss",
    "lambda_scan",
    "fw_scaling",
    "seeds",
)
"""Each is a module of this folder with ``run(bench, options) -> Findings``."""


def run_experiment(config: ExperimentConfig, *, overwrite: bool = False) -> str:
    """Run the experiment, write its files and return the tables as text.

    Raises :class:`~raymerge.errors.UserError` before any work if the input is wrong.
    """
    output = Path(config.output).absolute()
    marks, flags = ("experiment.json", "runs"), {"overwrite": overwrite}
    require_output(output, marks, writer="`raymerge experiment`", flags=flags)
    began = perf_counter()
    reseed = partial(base_config, config)
    bench = Bench(reseed(config.seed), output, config.methods, reseed)
    for name, changes in (config.methods or {}).items():
        bench.config(changes, name)  # a wrong method is refused before the first one runs
    # Only the module of this experiment is imported.
    run: Callable[[Bench, Any], Findings] = import_module(
        f"raymerge.apps.experiments.{config.experiment.name}"
    ).run
    findings = run(bench, config.experiment)
    # The record holds everything that the report draws.
    record = {
        "experiment": config.experiment.name,
        **findings.to_json(),
        "config": config.model_dump(mode="json", exclude_none=True),
        "timings": {"seconds": {**bench.seconds, "all": perf_counter() - began}},
    }
    write_json(output / "experiment.json", record)
    report = write_report(output)
    report_line(f"{perf_counter() - began:.0f} s in all; report: {report}")
    return text(findings)


def base_config(config: ExperimentConfig, seed: int) -> Config:
    """Return the merge config that the experiment changes; an embedded world is built."""
    if config.base in EMBEDDED:
        return world_config(config.base, seed, joint=config.experiment.name == "methods")
    return load_config(config.base, [f"seed={seed}"])


def world_config(world: str, seed: int, *, joint: bool) -> Config:
    """Return the config of the embedded world of this seed, built unless it is in the cache.

    Merges run in this process, which for so small a model is faster than starting workers.
    """
    from raymerge.apps.zoo import WORLDS, build_zoo

    recipe = WORLDS[world]
    root = cache_folder() / f"zoo-{recipe.fingerprint(seed)}"
    report_line(f"zoo in {root}")
    paths = build_zoo(root, seed=seed, workers=2, recipe=recipe, joint=joint)
    return load_config(paths.config, [f"seed={seed}", "cluster.workers=0"])
