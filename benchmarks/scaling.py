"""Measure strong scaling on one machine, and a step's bytes against docs/scaling.md's formula.

    python benchmarks/scaling.py --tasks 8 --batch 4 --workers 1 2 --shards 1 2

Every worker has one thread. The collectives' bytes are read from the loopback interface, so nothing
else should use the network of the machine; bytes through Ray are those of the pickled messages.
"""

from __future__ import annotations

import argparse
import pickle
import time
from pathlib import Path

import psutil
from case import add_case_arguments, make_case
from measure import machine, median, print_json

from raymerge.config import load_config
from raymerge.engine.messages import StepRequest
from raymerge.runs.inputs import MergeInputs
from raymerge.runs.workers import open_group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2])
    add_case_arguments(parser, batch=4)
    args = parser.parse_args()
    case = make_case(args.root, args.tasks, args.batch, args.arch)
    print_json(**machine())
    for workers in args.workers:
        for shards in args.shards:
            if workers % shards == 0:
                print_json(**measure(args, case, workers, shards))


def measure(args: argparse.Namespace, case: Path, workers: int, shards: int) -> dict[str, object]:
    """Return medians of a step's seconds and bytes, without the first step."""
    config = load_config(
        case / "merge.yaml",
        [
            f"cluster.workers={workers}",
            f"cluster.shards={shards}",
            "cluster.cpus_per_worker=1",
            f"optimizer.steps={args.steps}",
        ],
    )
    inputs = MergeInputs(config)
    seconds, loopback_bytes, phases = [], [], []
    with open_group(config, inputs.slots) as group:
        reports = group.load(inputs.load_request())
        lambdas_KL = inputs.initial_lambdas().numpy()
        for step in range(args.steps):
            before, began = _loopback_bytes(), time.perf_counter()
            request = StepRequest(step, lambdas_KL)
            results = group.step(request)
            seconds.append(time.perf_counter() - began)
            loopback_bytes.append(_loopback_bytes() - before)
            phases.append(results[0].seconds)
    columns = inputs.pretrained.layout.shard(0, shards).padded_columns
    return {
        "case": f"W={workers} S={shards}",
        "tasks": args.tasks,
        "batch": args.batch,
        "step_s": median(seconds[1:]),
        "phases": {key: median([p[key] for p in phases[1:]]) for key in phases[0]},
        "load_s": max(report.seconds for report in reports),
        "vector_gb_per_worker": max(report.vector_bytes for report in reports) / 1e9,
        "loopback_mb": median(loopback_bytes[1:]) / 1e6,
        "formula_mb": workers * 2 * (shards - 1) / shards * columns * 4 / 1e6,
        "request_bytes": len(pickle.dumps(request)),
        "result_bytes": len(pickle.dumps(results[0])),
    }


def _loopback_bytes() -> int:
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)


if __name__ == "__main__":
    main()
