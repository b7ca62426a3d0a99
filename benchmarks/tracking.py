"""Measure the time that each tracker takes to log a step, in microseconds.

python benchmarks/tracking.py [--tasks 8] [--steps 2000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import machine, median, print_json

from raymerge.config import WandbConfig, parse_config
from raymerge.distributed.cluster import connect
from raymerge.distributed.metrics import RayMetrics
from raymerge.engine.driver.loop import StepRecord
from raymerge.runs.tracking import TensorBoard, Tracker, Wandb

PHASES = ("merge", "gather", "compute", "reduce", "inner_products")


def record(step: int, tasks: int) -> StepRecord:
    """Return the record of a step with made-up values."""
    names = [f"task{k}" for k in range(tasks)]
    values = {name: (step + 1) / (k + 1) for k, name in enumerate(names)}
    return StepRecord(step, 1.0, values, values, values, 0.1, dict.fromkeys(PHASES, 0.02))


@contextmanager
def open_trackers(folder: Path) -> Iterator[dict[str, Tracker]]:
    """Open every tracker, on a Ray cluster of this process for Ray's metrics."""
    tasks = [{"name": "a", "checkpoint": "a.pt", "classnames": ["x", "y"]}]
    config = parse_config({"model": "local-dir:m", "tasks": tasks}, root=folder)
    with connect(None, 2):
        out: dict[str, Tracker] = {
            "Ray's metrics": RayMetrics("benchmark", 1),
            "TensorBoard": TensorBoard(folder / "tensorboard", 0),
            "Weights & Biases, offline": Wandb(WandbConfig(mode="offline"), folder, config),
        }
        try:
            yield out
        finally:
            for each in out.values():
                each.close(failed=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print_json(**machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, secrets.token_hex(4))
        folder.mkdir()
        with open_trackers(folder) as trackers:
            seconds = {
                name: [log_steps(tracker, args.steps, args.tasks) for _ in range(args.rounds)]
                for name, tracker in trackers.items()
            }
    for name, taken in seconds.items():
        print_json(case=name, tasks=args.tasks, us_a_step=1e6 * median(taken) / args.steps)


def log_steps(tracker: Tracker, steps: int, tasks: int) -> float:
    """Log so many steps and return the seconds that it took."""
    began = time.perf_counter()
    for step in range(steps):
        tracker.observe(record(step, tasks), 2, ())
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
