"""Measure one adaptive step of raymerge, of a bare forward and backward, and of the peers.

    python benchmarks/step.py --tasks 8 --batch 16 --cases bare bare-passes raymerge raymerge-bf16
    python benchmarks/step.py --peers PYTHON --fusion-bench CLONE --adamerging CLONE --cases …

All have the same inputs. Each case is a process of its own; their steps are interleaved, so that
all see the same load (use ``--one-by-one`` where they do not fit into memory together). The first
step of each is left out. λ after the last step is compared with raymerge's in float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from case import add_case_arguments, make_case, make_inputs, model_config
from measure import Stepper, machine, median, print_json

HERE = Path(__file__).parent


def main() -> None:
    args = _arguments()
    case = make_case(args.root, args.tasks, args.batch, args.arch)
    make_inputs(case)
    rates = print_json(**machine())
    limit = limit_s(args, rates)
    with tempfile.TemporaryDirectory() as folder:
        summaries = _run(args, case, Path(folder))
        lambdas = {
            name: dict(np.load(path))
            for name in summaries
            if (path := Path(folder, f"{name}.npz")).exists()
        }
    bare = summaries["bare"]["median_s"] if "bare" in summaries else None
    for name, summary in summaries.items():
        print_json(
            case=name,
            tasks=args.tasks,
            batch=args.batch,
            steps=args.steps,
            limit_s=limit["bfloat16" if name.endswith("bf16") else "float32"],
            ratio_to_bare=summary["median_s"] / bare if bare else None,
            lambda_difference=_difference(lambdas, name),
            **summary,
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    add_case_arguments(parser)
    parser.add_argument("--cases", nargs="+", default=["bare", "raymerge"], choices=[*_COMMANDS])
    parser.add_argument("--one-by-one", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", default=sys.executable, help="the Python that has the peers")
    parser.add_argument("--fusion-bench", type=Path, help="a clone")
    parser.add_argument("--adamerging", type=Path, help="a clone")
    return parser.parse_args()


def _own(tool: str, *more: str) -> list[str]:
    return [sys.executable, str(HERE / "one_step.py"), "--tool", tool, *more]


_COMMANDS = {
    "bare": lambda args: _own("bare"),
    "bare-passes": lambda args: _own("bare", "--pass", "15"),
    "bare-bf16": lambda args: _own("bare", "--precision", "bfloat16"),
    "raymerge": lambda args: _own("raymerge"),
    "raymerge-bf16": lambda args: _own(
        "raymerge", "--precision", "bfloat16", "--vectors", "bfloat16"
    ),
    "raymerge-bf16-vectors": lambda args: _own("raymerge", "--vectors", "bfloat16"),
    "raymerge-1-actor": lambda args: _own("raymerge", "--workers", "1"),
    "raymerge-2-actors": lambda args: _own("raymerge", "--workers", "2"),
    "fusion_bench": lambda args: [
        args.peers, str(HERE / "peers" / "fusion_bench_step.py"), "--repo", str(args.fusion_bench)
    ],
    "adamerging": lambda args: [
        args.peers, str(HERE / "peers" / "adamerging_step.py"), "--repo", str(args.adamerging)
    ],
}  # fmt: skip


def _run(args: argparse.Namespace, case: Path, folder: Path) -> dict[str, dict[str, float]]:
    groups = [[name] for name in args.cases] if args.one_by_one else [args.cases]
    summaries = {}
    for names in groups:
        steppers = [_start(args, name, case, folder) for name in names]
        for _ in range(args.steps):
            for stepper in steppers:
                stepper.step()
        for stepper in steppers:
            summary = stepper.finish()
            summary.pop("tasks", None), summary.pop("batch", None)
            timed = stepper.seconds[1:] or stepper.seconds
            summaries[stepper.name] = {**summary, "median_s": median(timed), "min_s": min(timed)}
    return summaries


def _start(args: argparse.Namespace, name: str, case: Path, folder: Path) -> Stepper:
    threads = 1 if name == "raymerge-2-actors" else args.threads
    command = [*_COMMANDS[name](args), "--case", case, "--steps", args.steps, "--pause"]
    return Stepper(name, [*command, "--threads", threads, "--out", folder / f"{name}.npz"])


def limit_s(args: argparse.Namespace, rates: dict[str, object]) -> dict[str, float]:
    """Return a step's seconds at the measured rates: FLOPs of the passes and two reads of V."""
    flops = 3 * args.tasks * args.batch * forward_flops(args.arch)
    parameters = visual_parameters(args.arch)
    out = {}
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        compute = flops / (float(str(rates[f"{dtype}_gflops"])) * 1e9)
        read = 2 * args.tasks * parameters * size / (float(str(rates["read_gb_s"])) * 1e9)
        out[dtype] = compute + read
    return out


def _visual(arch: str) -> torch.nn.Module:
    import open_clip

    with torch.device("meta"):
        visual: torch.nn.Module = open_clip.CLIP(**model_config(arch)).visual
    return visual.eval()


def visual_parameters(arch: str) -> int:
    """Return the number of parameters of the image encoder."""
    return sum(p.numel() for p in _visual(arch).parameters())


def forward_flops(arch: str) -> int:
    """Return the FLOPs of the forward pass of one image."""
    from torch.utils.flop_counter import FlopCounterMode

    visual = _visual(arch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        visual(torch.empty(1, 3, *visual.image_size, device="meta"))
    total: int = counter.get_total_flops()
    return total


def _difference(lambdas: dict[str, dict[str, np.ndarray]], name: str) -> float | None:
    """Return the largest |Δλ| to raymerge in float32, with layers matched by name."""
    if name not in lambdas or "raymerge" not in lambdas:
        return None
    ours, other = lambdas["raymerge"], lambdas[name]
    order = [list(other["names"]).index(layer) for layer in ours["names"]]
    return float(np.abs(ours["lambdas"] - other["lambdas"][:, order]).max())


if __name__ == "__main__":
    main()
