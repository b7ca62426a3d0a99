"""Shared by the adapters: reading a case, timing steps, reporting. Imports no peer.

A case is a folder: ``pretrained/open_clip_config.json`` and ``open_clip_model.safetensors`` (a
whole CLIP, of which ``visual.*`` is merged), ``experts/task{k}.safetensors`` (``visual.*``, fp32)
and ``inputs.safetensors`` with ``pixels.{k}`` (B, 3, H, W), normalised, and ``head.{k}`` (D, C).

Legend: K tasks, L layers (parameter tensors), B images of a task, D features, C classes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

PREFIX = "visual."
INIT = 0.3


def step_arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments of the scripts that take steps."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--repo", type=Path, required=True, help="a clone of the peer")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="write lambdas (K, L) and names to this .npz")
    parser.add_argument("--pause", action="store_true", help="each step waits for a line on stdin")
    return parser


def print_json(**line: object) -> None:
    """Print one JSON line on the real stdout; what a peer prints goes to stderr."""
    print(json.dumps(line), file=sys.__stdout__, flush=True)


@dataclass
class Clock:
    """Measures each step from the peer's first action in it to its last."""

    pause: bool = False
    seconds: list[float] = field(default_factory=list)
    began: float = 0.0

    def start(self) -> None:
        if not self.seconds:
            print_json(ready=True)
        if self.pause and not sys.stdin.readline():
            raise SystemExit("stdin closed while --pause waited for a line")
        self.began = time.perf_counter()

    def stop(self) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        print_json(step=len(self.seconds) - 1, seconds=self.seconds[-1])


def task_count(case: Path) -> int:
    return sum(name.startswith("pixels.") for name in load_file(case / "inputs.safetensors"))


def load_inputs(case: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Return the images (B, 3, H, W) and the head (D, C) of each task, in memory of their own."""
    tensors = load_file(case / "inputs.safetensors")
    tasks = range(task_count(case))
    return [tensors[f"pixels.{k}"].clone() for k in tasks], [
        tensors[f"head.{k}"].clone() for k in tasks
    ]


def visual_state(file: Path) -> dict[str, Tensor]:
    """Return the ``visual.*`` tensors of a file, without the prefix; memory-mapped."""
    return {
        name.removeprefix(PREFIX): tensor
        for name, tensor in load_file(file).items()
        if name.startswith(PREFIX)
    }


def pretrained_file(case: Path) -> Path:
    return case / "pretrained" / "open_clip_model.safetensors"


def expert_files(case: Path, tasks: int) -> list[Path]:
    return [case / "experts" / f"task{k}.safetensors" for k in range(tasks)]


def empty_visual(case: Path) -> nn.Module:
    """Return the visual tower without memory (on the meta device)."""
    config = json.loads((case / "pretrained" / "open_clip_config.json").read_text())
    with torch.device("meta"):
        return open_clip.CLIP(**config["model_cfg"]).visual


def load_visual(case: Path, file: Path) -> nn.Module:
    """Return the visual tower with the weights of ``file``, in memory of its own."""
    visual = empty_visual(case).to_empty(device="cpu")
    visual.load_state_dict(visual_state(file))
    return visual


def commit(repo: Path) -> str:
    if not (repo / ".git").exists():
        return "unknown (not a clone)"
    command = ["git", "-C", str(repo), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def peak_rss_gb() -> float:
    """Return VmHWM of this process in 1e9 bytes; resident pages of mapped files count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return kib * 1024 / 1e9


def report(
    peer: str,
    args: argparse.Namespace,
    clock: Clock,
    lambdas_KL: Tensor,
    names: list[str],
    batch: int,
) -> None:
    """Print the last JSON line; write λ (K, L) and the names of the L tensors to ``args.out``."""
    if args.out:
        np.savez(args.out, lambdas=lambdas_KL.detach().double().numpy(), names=np.array(names))
    print_json(
        peer=peer,
        commit=commit(args.repo),
        median_s=statistics.median(clock.seconds[1:] or clock.seconds),
        peak_rss_gb=peak_rss_gb(),
        tasks=lambdas_KL.shape[0],
        batch=batch,
        threads=torch.get_num_threads(),
    )
