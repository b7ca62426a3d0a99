"""Peak memory of a learned merge against what ``raymerge plan`` says, for many tasks.

    python benchmarks/memory.py --cases 16:float32:device 16:bfloat16:device 64:bfloat16:device

A case is K:dtype:location of the task vectors, B = 1 image a task. Peak: what the process holds of
its own (anonymous memory), sampled; pages of mapped files are given beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from case import make_case
from measure import machine, median, raymerge, run, say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["16:float32:device", "16:bfloat16:device"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir(), "raymerge-cases"))
    args = parser.parse_args()
    say(**machine())
    for case in args.cases:
        tasks, dtype, location = case.split(":")
        say(**measure(args, int(tasks), dtype, location))


def measure(args: argparse.Namespace, tasks: int, dtype: str, location: str) -> dict[str, object]:
    config = make_case(args.root, tasks, args.batch) / "merge.yaml"
    overrides = [f"vectors.dtype={dtype}", f"vectors.location={location}"]
    overrides += [f"vectors.folder={args.root}", f"optimizer.steps={args.steps}"]
    options = [part for override in overrides for part in ("-o", override)]
    plan = json.loads(run([*raymerge(), "plan", config, "--json", *options]).output)
    with tempfile.TemporaryDirectory(dir=args.root) as folder:
        output = Path(folder, "run")
        ran = run([*raymerge(), "merge", config, "--output", output, *options])
        text = (output / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        seconds = json.loads((output / "results.json").read_text())["timings"]["seconds"]
    planned = plan["total_bytes_per_worker"] / 1e9
    return {
        "case": f"K={tasks} B={args.batch} vectors {dtype} {location}",
        "planned_gb": planned,
        "peak_gb": ran.anonymous_gb,
        "planned_over_peak": planned / ran.anonymous_gb,
        "mapped_gb": ran.mapped_gb,
        "vector_gb": plan["vector_bytes"] / 1e9,
        "step_s": median([line["seconds"] for line in lines[1:]]),
        "load_s": seconds["load"],
        "whole_s": ran.seconds,
    }


if __name__ == "__main__":
    main()
