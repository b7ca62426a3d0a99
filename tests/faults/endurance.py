"""One long run under observation: `python tests/faults/endurance.py --steps 10000`.

Samples every second the memory, open files and threads of the driver, the workers and Ray's own
processes, the files of the output folder, /dev/shm, and Ray's logs. Writes JSON; exits 1 if
anything grew that should not.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
os.environ.update(
    HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", TQDM_DISABLE="1"
)

import psutil
from world import make_world

from raymerge.runs.merge import merge

Sample = dict[str, float]
MIB = 2**20
ALLOWED = {"rss_mib": 8.0, "files": 3.0, "threads": 1.0}
ALLOWED_FOR_RAY = {**ALLOWED, "threads": 4.0}  # seven processes, whose gRPC pools come and go
"""Allowed growth of the median from the second to the last fifth of a run.

The first fifth is left out, because it allocates what is allocated once.
"""


def process_figures(process: psutil.Process) -> Sample:
    with process.oneshot():
        return {
            "rss_mib": process.memory_info().rss / MIB,
            "files": float(process.num_fds()),
            "threads": float(process.num_threads()),
        }


def kind_of(process: psutil.Process) -> str:
    """Return ``worker`` for raymerge's actors, else ``ray``."""
    return "worker" if " ".join(process.cmdline()).startswith("ray::MergeWorker") else "ray"


def run_figures(driver: psutil.Process, output: Path, logs: Callable[[], int]) -> Sample:
    """Return the sums over the processes of each kind, named ``kind/figure``."""
    sample = {f"driver/{name}": value for name, value in process_figures(driver).items()}
    for child in driver.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            kind = kind_of(child)
            for name, value in process_figures(child).items():
                sample[f"{kind}/{name}"] = sample.get(f"{kind}/{name}", 0.0) + value
    files = [file for file in output.rglob("*") if file.is_file()]
    sample["output/files"] = float(len(files))
    sample["output/metrics_mib"] = size_of(output / "metrics.jsonl") / MIB
    shm = os.statvfs("/dev/shm")
    sample["shm/used_mib"] = (shm.f_blocks - shm.f_bfree) * shm.f_frsize / MIB
    sample["logs/mib"] = logs() / MIB
    return sample


def size_of(file: Path) -> int:
    with suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


def session_logs() -> int:
    """Return the bytes of the logs of the Ray that this process started."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess, StopIteration):
            words = child.cmdline()
            folder = next(w for w in words if w.startswith("--session-dir=")).partition("=")[2]
            return sum(size_of(file) for file in (Path(folder) / "logs").rglob("*"))
    return 0


@contextmanager
def sampled(output: Path, every_s: float) -> Iterator[list[tuple[int, Sample]]]:
    """Collect pairs of step and sample while the block runs."""
    samples: list[tuple[int, Sample]] = []
    driver, stop = psutil.Process(), threading.Event()

    def sample() -> None:
        while not stop.wait(every_s):
            with suppress(psutil.NoSuchProcess, FileNotFoundError):
                step = steps_in(output / "metrics.jsonl")
                if step:
                    samples.append((step, run_figures(driver, output, session_logs)))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def steps_in(metrics: Path) -> int:
    with metrics.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(MIB), b""))


def growth(samples: Sequence[tuple[int, Sample]], steps: int) -> dict[str, dict[str, float]]:
    """Return each figure's median in the second and last fifth of the steps, and its maximum."""
    early = [sample for step, sample in samples if steps / 5 < step <= 2 * steps / 5]
    late = [sample for step, sample in samples if 4 * steps / 5 < step < steps]
    out = {}
    for name in sorted(set.intersection(*(set(sample) for sample in [*early, *late]))):
        then, now = (median(sample[name] for sample in part) for part in (early, late))
        out[name] = {
            "early": then,
            "late": now,
            "growth": now - then,
            "most": max(sample.get(name, 0.0) for _, sample in samples),
        }
    return out


def excessive_growth(figures: dict[str, dict[str, float]]) -> list[str]:
    """Return the names of the figures that grew by more than is allowed."""
    grew = []
    for name, figure in figures.items():
        kind, _, what = name.partition("/")
        if figure["growth"] > (ALLOWED_FOR_RAY if kind == "ray" else ALLOWED).get(
            what, float("inf")
        ):
            grew.append(name)
    return grew


def endure(steps: int, workers: int, shards: int, every_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        world, output = make_world(Path(scratch) / "world"), Path(scratch) / "out"
        cluster = {"workers": workers, "shards": shards}
        config = world.parse(output, optimizer={"steps": steps, "lr": 1e-4}, cluster=cluster)
        began = time.monotonic()
        with sampled(output, every_s) as samples:
            result = merge(config)
        figures = growth(samples, steps)
        return {
            "steps": steps_in(output / "metrics.jsonl"),
            "workers": workers,
            "shards": shards,
            "seconds": time.monotonic() - began,
            "steps_seconds": result.seconds["steps"],
            "samples": len(samples),
            "figures": figures,
            "grew": excessive_growth(figures),
            "course": samples,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("endurance.json"))
    args = parser.parse_args()
    out = endure(args.steps, args.workers, args.shards, every_s=1.0)
    args.output.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in out.items() if name != "course"}, indent=1))
    return 1 if out["grew"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
