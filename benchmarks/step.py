"""One adaptive step at ViT-B/32 size: seconds, peak memory, against a bare forward and backward.

    python benchmarks/step.py [--tasks 8] [--batch 16] [--steps 5] [--world DIR]

Random weights and noise images of the real sizes, made once in DIR. One JSON line per case: the
bare forward and backward of the same number of images, in-process, and W = 1 and 2 Ray workers.
Peak memory is the sum of proportional set sizes over the process tree, sampled every 0.2 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

ARCH = "ViT-B-32"
CLASSES = 10


def main() -> None:
    args = _arguments()
    world = Path(args.world or tempfile.mkdtemp(prefix="raymerge-step-"))
    make_world(world, args.tasks, images=args.batch * 2)
    print(json.dumps(bare(args.tasks * args.batch, args.steps)), flush=True)
    for workers in args.workers:
        print(json.dumps(run(world, args, workers)), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--world")
    return parser.parse_args()


def make_world(root: Path, tasks: int, images: int) -> None:
    """``root/pretrained``, ``root/experts``, ``root/data`` and ``root/merge.yaml``."""
    import open_clip

    if not (root / "pretrained" / "open_clip_model.safetensors").exists():
        (root / "pretrained").mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        state = {k: v.contiguous() for k, v in open_clip.create_model(ARCH).state_dict().items()}
        save_file(state, root / "pretrained" / "open_clip_model.safetensors")
        cfg = {"model_cfg": open_clip.get_model_config(ARCH)}
        (root / "pretrained" / "open_clip_config.json").write_text(json.dumps(cfg))
    for k in range(tasks):
        _make_task(root, k, images)
    (root / "merge.yaml").write_text(yaml.safe_dump(_config(tasks)))


def _make_task(root: Path, k: int, images: int) -> None:
    from safetensors.torch import load_file

    path = root / "experts" / f"task{k}.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(k)
        state = load_file(root / "pretrained" / "open_clip_model.safetensors")
        visual = {key: t for key, t in state.items() if key.startswith("visual.")}
        save_file(
            {n: t + 1e-3 * torch.randn(t.shape, generator=generator) for n, t in visual.items()},
            path,
        )
    folder = root / "data" / f"task{k}"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(k)
    for i in range(len(list(folder.iterdir())), images):
        pixels = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.jpg")


def _config(tasks: int) -> dict[str, object]:
    names = [f"class {c}" for c in range(CLASSES)]
    return {
        "model": "local-dir:pretrained",
        "tasks": [
            {
                "name": f"task{k}",
                "checkpoint": f"experts/task{k}.safetensors",
                "classnames": names,
                "adapt": f"data/task{k}",
            }
            for k in range(tasks)
        ],
        "method": "adamerging",
    }


def bare(images: int, steps: int) -> dict[str, object]:
    """Forward and backward of the visual tower alone, same images, fp32, all threads."""
    import open_clip

    visual = open_clip.create_model(ARCH).visual.eval()
    pixels = torch.randn(images, 3, 224, 224)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        visual.zero_grad(set_to_none=False)
        visual(pixels).square().sum().backward()
        seconds.append(time.perf_counter() - began)
    return {"case": "bare", "images": images, "seconds_per_step": statistics.median(seconds[1:])}


def run(world: Path, args: argparse.Namespace, workers: int) -> dict[str, object]:
    """A whole ``raymerge merge`` as its own process; steps after the first count."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "raymerge", "merge", str(world / "merge.yaml")]
        for override in (
            f"optimizer.steps={args.steps}",
            f"optimizer.batch_size={args.batch}",
            f"cluster.workers={workers}",
            f"cluster.shards={args.shards if workers else 1}",
        ):
            command += ["-o", override]
        began = time.perf_counter()
        process = subprocess.Popen([*command, "--output", f"{output}/run"], stderr=subprocess.PIPE)
        peak = _watch(process)
        if process.returncode:
            assert process.stderr is not None
            raise SystemExit(process.stderr.read().decode()[-2000:])
        wall = time.perf_counter() - began
        lines = Path(output, "run", "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines][1:]
    return {
        "case": f"workers={workers}" + (f", shards={args.shards}" if args.shards > 1 else ""),
        "tasks": args.tasks,
        "batch": args.batch,
        "seconds_per_step": statistics.median(step["seconds"] for step in steps),
        "phases": {
            phase: statistics.median(step["phases"][phase] for step in steps)
            for phase in steps[0]["phases"]
        },
        "peak_gb": peak / 1e9,
        "whole_process_s": wall,
    }


def _watch(process: subprocess.Popen[bytes]) -> float:
    """Peak bytes of the process and all its descendants while it runs."""
    peak = 0.0
    drain = threading.Thread(target=process.wait)
    drain.start()
    tree = psutil.Process(process.pid)
    while drain.is_alive():
        total = 0
        try:
            for member in [tree, *tree.children(recursive=True)]:
                total += member.memory_full_info().pss
        except psutil.Error:
            pass
        peak = max(peak, total)
        drain.join(0.2)
    return peak


if __name__ == "__main__":
    main()
