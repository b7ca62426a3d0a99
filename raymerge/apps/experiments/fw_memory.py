"""The memory that a merge by Frank-Wolfe takes, against the number of candidate models.

Each merge is a process of its own, whose peak anonymous memory is sampled from /proc.

Legend: K candidate models.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from raymerge.apps.experiments.bench import Bench, Changes, report_line
from raymerge.apps.experiments.findings import Cell, Curves, Table
from raymerge.config import TaskConfig
from raymerge.config.loading import dump_config
from raymerge.errors import RunError

MEMORY_MODELS = (10, 20, 40)
LOCATIONS = ("files", "device")
_METHOD: Changes = {"name": "fw_hard", "iterations": 3, "step_size": 1.0, "images": 16}
_MICRO_BATCH = 16
"""Images in one pass: few, so that the task vectors and not the activations decide the peak."""
_SAMPLE_S = 0.02

Peaks = dict[str, dict[int, int]]
"""Location of the task vectors → K → peak anonymous bytes of a whole merge."""


def measure_memory(bench: Bench, pool: Sequence[TaskConfig], objective: str) -> Peaks:
    """Return the peak memory by location and K; empty on a system without /proc."""
    if not Path("/proc/self/status").exists():
        return {}
    peaks: Peaks = {}
    for location in LOCATIONS:
        peaks[location] = {}
        for models in MEMORY_MODELS:
            changes = {
                "method": {**_METHOD, "objective": objective},
                "vectors": {"location": location},
                "cluster": {"workers": 0, "micro_batch": _MICRO_BATCH},
            }
            tasks = repeat_models(pool, models)
            peaks[location][models] = _peak(bench, f"memory_{location}_{models}", changes, tasks)
    return peaks


def repeat_models(tasks: Sequence[TaskConfig], models: int) -> list[TaskConfig]:
    """Return that many models without tests: the tasks' own, then the same under other names."""
    untested = [task.model_copy(update={"test": None}) for task in tasks if task.checkpoint]
    copies = [
        TaskConfig(name=f"{task.name}-{i}", checkpoint=task.checkpoint)
        for i in range(1, -(-models // len(untested)))
        for task in untested
    ]
    return [*untested, *copies][:models]


def _peak(bench: Bench, name: str, changes: Changes, tasks: Sequence[TaskConfig]) -> int:
    config = bench.config(changes, name, tasks)
    path = bench.output / "runs" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_config(config), encoding="utf-8")
    began = time.perf_counter()
    command = [sys.executable, "-m", "raymerge", "merge", str(path), "--overwrite"]
    peak = peak_anonymous_bytes(command)
    bench.seconds[name] = time.perf_counter() - began
    report_line(f"{name}: {peak / 1e6:.0f} MB ({bench.seconds[name]:.0f} s)")
    return peak


def peak_anonymous_bytes(command: Sequence[str]) -> int:
    """Return the peak anonymous memory of a process and its children, sampled from /proc.

    Raises :class:`RunError` if the process fails.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TQDM_DISABLE": "1"},
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(_SAMPLE_S)
    errors = process.communicate()[1]
    if process.returncode:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"experiment: {' '.join(command[1:])}: {last}; run it alone to see more")
    return peak


def _anonymous_bytes(pid: int) -> int:
    total = 0
    try:
        tree = psutil.Process(pid)
        for member in [tree, *tree.children(recursive=True)]:
            lines = Path(f"/proc/{member.pid}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
    except (psutil.Error, OSError):
        pass  # the process has just ended
    return total * 1024


def memory_tables(memory: Peaks) -> list[Table]:
    if not memory:
        return []
    first, last = MEMORY_MODELS[0], MEMORY_MODELS[-1]
    rows: dict[str, list[Cell]] = {
        f"vectors.location: {location}": [
            *(f"{peaks[models] / 1e6:.0f} MB" for models in MEMORY_MODELS),
            f"{peaks[last] / peaks[first] - 1:+.1%}",
        ]
        for location, peaks in memory.items()
    }
    columns = [*(f"K = {models}" for models in MEMORY_MODELS), f"{last} against {first}"]
    caption = "Peak anonymous memory of a whole `raymerge merge` with fw_hard, Python included."
    return [Table("Memory against the candidate models", columns, rows, caption)]


def memory_curves(memory: Peaks) -> list[Curves]:
    if not memory:
        return []
    series: dict[str, list[float | None]] = {
        location: [peaks[models] / 1e6 for models in MEMORY_MODELS]
        for location, peaks in memory.items()
    }
    title = "Memory of a merge"
    return [Curves(title, "candidate models", "peak, MB", list(MEMORY_MODELS), series)]
