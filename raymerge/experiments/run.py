"""``raymerge experiment``: from its config to ``experiment.json``, a report and a printed table."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

from raymerge.config import Config, load_config
from raymerge.config.experiments import ExperimentConfig
from raymerge.errors import UserError
from raymerge.experiments.bench import Bench, say
from raymerge.experiments.findings import Findings, text
from raymerge.files import cache_folder, write_json
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
    _check_output(output, overwrite)
    began = perf_counter()
    base = base_config(config)
    bench = Bench(base, output, config.methods)
    for name, changes in (config.methods or {}).items():
        bench.config(changes, name)  # a wrong one is refused before the first runs
    run: Callable[[Bench, Any], Findings] = import_module(
        f"raymerge.experiments.{config.experiment.name}"
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


def base_config(config: ExperimentConfig) -> Config:
    """The merge config that the experiment changes; the embedded world is built for ``demo``."""
    if config.base != "demo":
        return load_config(config.base, [f"seed={config.seed}"])
    return demo_config(config.seed)


def demo_config(seed: int) -> Config:
    """The embedded world of this seed, from the cache if it is there; merges run in this process,
    which for so small a model is faster than to start workers."""
    from raymerge.zoo import ZooRecipe, build_zoo

    recipe = ZooRecipe()
    root = cache_folder() / f"zoo-{recipe.fingerprint(seed)}"
    say(f"zoo in {root}")
    paths = build_zoo(root, seed=seed, workers=2, recipe=recipe)
    return load_config(paths.config, [f"seed={seed}", "cluster.workers=0"])


def _check_output(output: Path, overwrite: bool) -> None:
    """A folder is taken if it is new, empty, or an earlier experiment's that may be replaced."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output}: is a file; name a folder")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / "experiment.json").exists() and not (output / "runs").is_dir():
        raise UserError(f"output {output}: is in use and no experiment wrote it; name another")
    if not overwrite:
        raise UserError(
            f"output {output}: holds an experiment; give another folder, or --overwrite"
        )
