"""Measure ``--help``, the imports, and a one-step merge from the command to the results.

python benchmarks/startup.py [--tasks 8] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from case import add_case_arguments, make_case
from measure import machine, median, print_json, raymerge, run

STAGES = {
    "python": "pass",
    "raymerge --help": "import sys, runpy; sys.argv = ['raymerge', '--help']\n"
    "runpy.run_module('raymerge', run_name='__main__')",
    "config": "import raymerge.config",
    "torch": "import torch",
    "open_clip (with torch)": "import open_clip",
    "raymerge.runs.merge": "import raymerge.runs.merge",
    "raymerge.engine.worker.worker": "import raymerge.engine.worker.worker",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    add_case_arguments(parser)
    args = parser.parse_args()
    config = make_case(args.root, args.tasks, args.batch, args.arch) / "merge.yaml"
    print_json(**machine())
    for name, code in STAGES.items():
        seconds = [run([sys.executable, "-c", code]).seconds for _ in range(args.rounds)]
        print_json(case=name, median_s=median(seconds))
    for workers in (0, 1):
        rows = [_first_step(args.root, config, workers) for _ in range(args.rounds)]
        print_json(
            case=f"raymerge merge, workers: {workers}",
            tasks=args.tasks,
            batch=args.batch,
            **{key: median([row[key] for row in rows]) for key in rows[0]},
        )


def _first_step(root: Path, config: Path, workers: int) -> dict[str, float]:
    """Return the seconds of a one-step merge and of its parts."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        output = Path(folder, "run")
        options = ["-o", "optimizer.steps=1", "-o", f"cluster.workers={workers}"]
        process = run([*raymerge(), "merge", config, "--output", output, *options])
        phases = json.loads((output / "results.json").read_text())["timings"]["seconds"]
    rest = process.seconds - sum(phases.values())
    return {"whole_s": process.seconds, "before_load_and_after_export_s": rest, **phases}


if __name__ == "__main__":
    main()
