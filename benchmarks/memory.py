"""Compare the peak memory of a learned merge with the estimate of ``raymerge plan``.

    python benchmarks/memory.py --cases 16:float32:device 16:bfloat16:device 64:bfloat16:device

A case is K:dtype:location of the task vectors, with B = 1 image a task. The peak is the sampled
anonymous memory of the process; pages of mapped files are printed beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from case import add_case_arguments, make_case
from measure import machine, median, print_json, raymerge, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", metavar="K:DTYPE:LOCATION", help="instead of --tasks")
    parser.add_argument("--steps", type=int, default=3)
    add_case_arguments(parser, tasks=16, batch=1)
    args = parser.parse_args()
    print_json(**machine())
    both = [f"{args.tasks}:float32:device", f"{args.tasks}:bfloat16:device"]
    for case in args.cases or both:
        tasks, dtype, location = case.split(":")
        print_json(**measure(args, int(tasks), dtype, location))


def measure(args: argparse.Namespace, tasks: int, dtype: str, location: str) -> dict[str, object]:
    """Return the planned and the measured memory of one merge, and its seconds."""
    config = make_case(args.root, tasks, args.batch, args.arch) / "merge.yaml"
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
