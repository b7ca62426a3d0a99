"""Compare the accuracy of short cosine schedules with that of the paper's 500 steps.

    python benchmarks/schedule.py ZOO [ZOO …]

Each ZOO is a folder that ``raymerge demo --zoo DIR --seed N`` has built. For each schedule, the
mean top-1 over the zoo's tasks and the seconds of the steps are printed. ``--image-seeds`` repeats
each schedule with other images in its steps.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from measure import machine, median, print_json

from raymerge.config import load_config
from raymerge.runs.merge import merge
from raymerge.runs.workers import open_group

SCHEDULES = ["500:1e-3:constant", "100:1e-2:cosine", "50:1e-2:cosine", "50:2e-2:cosine"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("zoos", nargs="+", type=Path)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, metavar="STEPS:LR:SHAPE")
    parser.add_argument("--image-seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    print_json(**machine())
    for zoo in args.zoos:
        base = load_config(zoo / "zoo.yaml", ["cluster.workers=0"])
        with open_group(base, None) as group:
            for schedule in args.schedules:
                steps, rate, shape = schedule.split(":")
                options = [f"optimizer.steps={steps}", f"optimizer.lr={rate}"]
                options += [f"optimizer.schedule={shape}", "cluster.workers=0"]
                top1, seconds = [], []
                for seed in args.image_seeds:
                    with tempfile.TemporaryDirectory() as folder:
                        overrides = [*options, f"seed={seed}", f"output={folder}/run"]
                        result = merge(load_config(zoo / "zoo.yaml", overrides), group=group)
                    top1.append(100 * (result.top1 or 0.0))
                    seconds.append(result.seconds["steps"])
                print_json(case=schedule, zoo=zoo.name, top1=top1, steps_s=median(seconds))


if __name__ == "__main__":
    main()
