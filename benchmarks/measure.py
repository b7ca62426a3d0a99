"""Shared by the benchmarks: the machine and its rates, child processes, JSON lines."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch


def print_json(**line: object) -> dict[str, object]:
    """Print one JSON line and return it."""
    print(json.dumps(line), flush=True)
    return line


def best_of(work: Callable[[], object], times: int = 5) -> float:
    """Return the seconds of the fastest of several runs, after one that warms up."""
    work()
    return min(_timed(work) for _ in range(times))


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def machine() -> dict[str, object]:
    """Return the machine, the versions, and the rates that limit the benchmarks."""
    return {
        "case": "machine",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "open_clip_torch", "ray")},
        "date": time.strftime("%Y-%m-%d"),
        **rates(),
    }


def rates() -> dict[str, float]:
    """Return GFLOP/s of a ViT-B's largest matrix product, and GB/s of a read and of a copy."""
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1600, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
        seconds = best_of(lambda a=a, b=b: torch.nn.functional.linear(a, b), 10)  # type: ignore[misc]
        name = str(dtype).removeprefix("torch.")
        out[f"{name}_gflops"] = round(2 * 1600 * 768 * 3072 / seconds / 1e9, 1)
    source, target = torch.ones(2, 64_000_000)
    out["read_gb_s"] = round(source.nbytes / best_of(source.sum) / 1e9, 1)
    out["copy_gb_s"] = round(2 * source.nbytes / best_of(lambda: target.copy_(source)) / 1e9, 1)
    return out


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def peak_rss_gb() -> float:
    """Return the peak resident memory (VmHWM) of this process, in 1e9 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e9


class Stepper:
    """A child process that takes a step for each line it reads, and prints a JSON line for each."""

    def __init__(self, name: str, command: Sequence[object]) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TQDM_DISABLE": "1"},
        )
        self._errors: list[str] = []
        threading.Thread(target=self._drain, daemon=True).start()
        self._answer()  # the child has loaded its inputs

    def step(self) -> None:
        """Let the child take a step, and append its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.seconds.append(self._answer()["seconds"])

    def finish(self) -> dict[str, Any]:
        """Return the child's last line, once it has ended."""
        summary = self._answer()
        self.process.wait()
        return summary

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early:\n" + "".join(self._errors[-15:]))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _drain(self) -> None:
        assert self.process.stderr is not None
        self._errors.extend(self.process.stderr)


@dataclass
class ProcessRun:
    """The seconds of a whole process, and the peak memory of it and its children."""

    seconds: float
    anonymous_gb: float
    """Memory of its own, which it cannot run without."""
    mapped_gb: float
    """Pages of mapped files at that moment, which the system takes back when it needs to."""
    output: str = field(repr=False, default="")


def run(command: Sequence[object], env: dict[str, str] | None = None) -> ProcessRun:
    """Run a command, sampling memory every 0.2 s; raise SystemExit with its output if it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TQDM_DISABLE": "1", **(env or {})},
    )
    # One thread reads the output while this one samples the memory of the whole process tree.
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.append(process.communicate()[0]))
    reader.start()
    anonymous, mapped = 0.0, 0.0
    tree = psutil.Process(process.pid)
    while reader.is_alive():
        own, files = _memory(tree)
        mapped = files if own > anonymous else mapped
        anonymous = max(anonymous, own)
        reader.join(0.2)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{output[0][-3000:]}")
    return ProcessRun(seconds, anonymous / 1e9, mapped / 1e9, output[0])


def _memory(tree: psutil.Process) -> tuple[float, float]:
    own = files = 0.0
    try:
        for member in [tree, *tree.children(recursive=True)]:
            text = Path(f"/proc/{member.pid}/status").read_text()
            fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
            own += int(fields.get("RssAnon", "0 kB").split()[0]) * 1024
            files += sum(
                int(fields.get(key, "0 kB").split()[0]) * 1024 for key in ("RssFile", "RssShmem")
            )
    except (psutil.Error, OSError):
        pass
    return own, files


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def raymerge() -> list[str]:
    """Return the start of a raymerge command in this Python."""
    return [sys.executable, "-m", "raymerge"]
