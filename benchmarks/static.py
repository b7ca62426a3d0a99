"""Measure task arithmetic, average and TIES as whole processes, beside the peers.

    python benchmarks/static.py --tasks 8 --rounds 3
    python benchmarks/static.py --peers PYTHON --fusion-bench CLONE --mergekit mergekit-pytorch …

Every round runs each tool once, one after the other; the median over the rounds is printed. In the
first round raymerge also hashes its inputs (it remembers the digests), so that round is printed
apart. Outputs are compared entry by entry.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from case import add_case_arguments, make_case, make_inputs
from measure import ProcessRun, machine, median, print_json, raymerge, run
from safetensors import safe_open

HERE = Path(__file__).parent
METHODS = {
    "task_arithmetic": ["method={name: task_arithmetic, scaling: 0.3}"],
    "average": ["method=average"],
    "ties": ["method={name: ties, density: 0.2, scaling: 0.3}"],
    "ties-tensor": ["method={name: ties, density: 0.2, scaling: 0.3, trim_scope: tensor}"],
}


def main() -> None:
    args = _arguments()
    case = make_case(args.root, args.tasks, args.batch, args.arch)
    make_inputs(case)
    print_json(**machine())
    for method in args.methods:
        with tempfile.TemporaryDirectory(dir=args.root) as folder:
            _compare(args, case, method, Path(folder))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    add_case_arguments(parser, batch=1)
    parser.add_argument("--peers", default=sys.executable, help="the Python that has the peers")
    parser.add_argument("--fusion-bench", type=Path, help="a clone")
    parser.add_argument("--mergekit", help="the mergekit-pytorch command")
    return parser.parse_args()


def _compare(args: argparse.Namespace, case: Path, method: str, folder: Path) -> None:
    commands = {
        name: command
        for name, command in _commands(args, case, method, folder).items()
        if command is not None
    }
    runs: dict[str, list[ProcessRun]] = {name: [] for name in commands}
    cache = {"RAYMERGE_CACHE": str(folder / "cache")}
    for _ in range(args.rounds):
        for name, command in commands.items():
            runs[name].append(run(command, cache))
    ours = folder / "raymerge" / "open_clip_model.safetensors"
    outputs = {"mergekit": folder / "mergekit" / "model.safetensors", "fusion_bench": folder / "fb"}
    for name, timed in runs.items():
        print_json(
            case=f"{method} {name}",
            tasks=args.tasks,
            median_s=median([r.seconds for r in timed[1:] or timed]),
            first_s=timed[0].seconds,
            peak_gb=max(r.anonymous_gb for r in timed),
            mapped_gb=max(r.mapped_gb for r in timed),
            **(difference(ours, outputs[name]) if name in outputs else {}),
        )


def _commands(
    args: argparse.Namespace, case: Path, method: str, folder: Path
) -> dict[str, list[object] | None]:
    overrides = [part for override in METHODS[method] for part in ("-o", override)]
    own = [*raymerge(), "merge", case / "merge.yaml", "--output", folder / "raymerge"]
    theirs = method.removesuffix("-tensor")
    fusion_bench = None
    if args.fusion_bench and method != "ties-tensor":
        script = HERE / "peers" / "fusion_bench_static.py"
        fusion_bench = [args.peers, script, "--case", case, "--repo", args.fusion_bench]
        fusion_bench += ["--method", theirs, "--out", folder / "fb"]
    mergekit = None
    if args.mergekit and method != "ties":
        script, config = HERE / "peers" / "mergekit_config.py", folder / "mergekit.yaml"
        run([args.peers, script, "--case", case, "--method", theirs, "--out", config])
        mergekit = [args.mergekit, config, folder / "mergekit", "--num-threads"]
        mergekit.append(torch.get_num_threads())
    return {
        "raymerge": [*own, "--overwrite", *overrides],
        "mergekit": mergekit,
        "fusion_bench": fusion_bench,
    }


def difference(ours: Path, theirs: Path) -> dict[str, float]:
    """Return the largest difference of entries, and how many differ by more than rounding."""
    largest, differing, total = 0.0, 0, 0
    with safe_open(ours, "pt") as a, safe_open(theirs, "pt") as b:
        for key in b.keys():  # noqa: SIM118
            name = key if key.startswith("visual.") else f"visual.{key}"
            gap = (a.get_tensor(name) - b.get_tensor(key)).abs()
            largest = max(largest, float(gap.max()))
            differing += int((gap > 1e-6).sum())
            total += gap.numel()
    return {"largest_difference": largest, "differing": differing, "of": total}


if __name__ == "__main__":
    main()
