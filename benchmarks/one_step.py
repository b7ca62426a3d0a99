"""Take a step of raymerge, or of a bare forward and backward, for each line read: see step.py.

    python one_step.py --case CASE --tool raymerge [--precision bfloat16] [--vectors bfloat16]

``raymerge`` runs the real driver loop on a worker in this process. ``bare`` is open_clip's image
encoder on the same images with ordinary parameters: all at once, or ``--pass`` images at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from measure import peak_rss_gb, print_json
from safetensors.torch import load_file


def main() -> None:
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    (_raymerge if args.tool == "raymerge" else _bare)(args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--tool", choices=["raymerge", "bare"], required=True)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--vectors", default="float32")
    parser.add_argument("--location", default="auto")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pass", dest="images", type=int, help="bare: images in one pass")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--pause", action="store_true")
    parser.add_argument(
        "--out", type=Path, help="raymerge: write lambdas (K, L) and names to this .npz"
    )
    return parser.parse_args()


def _wait(args: argparse.Namespace) -> None:
    if args.pause and not sys.stdin.readline():
        raise SystemExit("stdin closed")


def _raymerge(args: argparse.Namespace) -> None:
    from raymerge.config import load_config
    from raymerge.engine.driver.loop import StepRecord, learn
    from raymerge.engine.driver.state import LearningState
    from raymerge.runs.inputs import MergeInputs
    from raymerge.runs.workers import open_group

    config = load_config(
        args.case / "merge.yaml",
        [
            f"optimizer.steps={args.steps}",
            f"precision={args.precision}",
            f"vectors.dtype={args.vectors}",
            f"vectors.location={args.location}",
            f"cluster.workers={args.workers}",
            f"cluster.shards={args.shards}",
            *([f"cluster.cpus_per_worker={args.threads}"] if args.threads else []),
        ],
    )
    inputs = MergeInputs(config)
    phases: list[dict[str, float]] = []
    began = time.perf_counter()
    with open_group(config, inputs.slots) as group:
        reports = group.load(inputs.load_request())
        load_s = time.perf_counter() - began
        print_json(ready=True)
        _wait(args)

        def observe(record: StepRecord, state: LearningState) -> None:
            phases.append(record.phases)
            print_json(step=record.step - 1, seconds=record.seconds)
            if record.step < args.steps:
                _wait(args)

        start = LearningState.initial(inputs.initial_lambdas())
        learning = inputs.learning(group)
        state = learn(group, learning.optimizer, start, args.steps, learning.monitor, observe)
    if args.out:
        np.savez(args.out, lambdas=state.lambdas.numpy(), names=np.array(inputs.layers.names))
    print_json(
        peak_rss_gb=peak_rss_gb(),
        load_s=load_s,
        vector_bytes=[report.vector_bytes for report in reports],
        micro_batch=inputs.plan.micro_batch,
        planned_gb=sum(inputs.plan.bytes_per_worker.values()) / 1e9,
        phases={k: sorted(p[k] for p in phases)[len(phases) // 2] for k in phases[0]},
    )


def _bare(args: argparse.Namespace) -> None:
    import open_clip

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = json.loads((args.case / "pretrained" / "open_clip_config.json").read_text())
    visual = open_clip.CLIP(**cfg["model_cfg"]).visual.eval().to(device)
    inputs = load_file(args.case / "inputs.safetensors")
    tasks = sum(name.startswith("pixels.") for name in inputs)
    pixels_B3HW = torch.cat([inputs[f"pixels.{k}"] for k in range(tasks)]).to(device)
    print_json(ready=True)
    for step in range(args.steps):
        _wait(args)
        began = time.perf_counter()
        visual.zero_grad(set_to_none=False)
        for part in pixels_B3HW.split(args.images or len(pixels_B3HW)):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16"):
                features_BD = visual(part)
            features_BD.float().square().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        print_json(step=step, seconds=time.perf_counter() - began)
    print_json(peak_rss_gb=peak_rss_gb())


if __name__ == "__main__":
    main()
