"""``raymerge experiment``: from its config to ``experiment.json``, a report and a printed table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

from raymerge.apps.experiments.bench import Bench, say
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
"""Each is a module here with ``run(bench, options) -> Findings``."""


def run_experiment(config: ExperimentConfig, *, overwrite: bool = False) -> str:
    """Run it, write ``experiment.json`` and ``report.html``, return the tables as text.

    Raises :class:`UserError` before any work where the input is wrong.
    """
    output = Path(config.output).absolute()
    marks, flags = ("experiment.json", "runs"), {"overwrite": overwrite}
    require_output(output, marks, writer="`raymerge experiment`", flags=flags)
    began = perf_counter()
    reseed = partial(base_config, config)
    bench = Bench(reseed(config.seed), output, config.methods, reseed)
    for name, changes in (config.methods or {}).items():
        bench.config(changes, name)  # a wrong one is refused before the first runs
    run: Callable[[Bench, Any], Findings] = import_module(
        f"raymerge.apps.experiments.{config.experiment.name}"
    ).run
    findings = run(bench, config.experiment)
    record = {
        "experiment": config.experiment.name,
        **findings.to_json(),
        "config": config.model_dump(mode="json", exclude_none=True),
        "timings": {"seconds": {**bench.seconds, "all": perf_counter() - began}},
    }
    write_json(output / "experiment.json", record)
    report = write_report(output)
    say(f"{perf_counter() - began:.0f} s in all; report: {report}")
    return text(findings)


def base_config(config: ExperimentConfig, seed: int) -> Config:
    """The merge config that the experiment changes, with this seed; an embedded world is built."""
    if config.base in EMBEDDED:
        return world_config(config.base, seed, joint=config.experiment.name == "methods")
    return load_config(config.base, [f"seed={seed}"])


def world_config(world: str, seed: int, *, joint: bool) -> Config:
    """The embedded world of this seed, from the cache if it is there; merges run in this process,
    which for so small a model is faster than to start workers."""
    from raymerge.apps.zoo import WORLDS, build_zoo

    recipe = WORLDS[world]
    root = cache_folder() / f"zoo-{recipe.fingerprint(seed)}"
    say(f"zoo in {root}")
    paths = build_zoo(root, seed=seed, workers=2, recipe=recipe, joint=joint)
    return load_config(paths.config, [f"seed={seed}", "cluster.workers=0"])
