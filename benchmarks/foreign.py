"""Merge other tools' own files (mergekit's YAML, fusion_bench's pools) with them and raymerge.

    python benchmarks/foreign.py --mergekit mergekit-pytorch
    python benchmarks/foreign.py --peers PYTHON --fusion-bench CLONE --mergekit mergekit-pytorch …

By default there are eight experts of 351 MB. Every round runs each tool once; the median is printed
without the first round, in which raymerge also hashes its inputs. Outputs are compared entry by
entry. For DARE only the norms of the merged vectors mean something, since the random masks differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from case import add_case_arguments, make_case, make_inputs
from measure import ProcessRun, machine, median, print_json, raymerge, run
from safetensors import safe_open

HERE = Path(__file__).parent
MERGEKIT: dict[str, dict[str, object]] = {
    "task_arithmetic": {"merge_method": "task_arithmetic"},
    "linear": {"merge_method": "linear"},
    "ties": {"merge_method": "ties", "density": 0.2},
    "ties-bfloat16": {"merge_method": "ties", "density": 0.2, "dtype": "bfloat16"},
    "dare_linear": {"merge_method": "dare_linear", "density": 0.2},
}
FUSION_BENCH: dict[str, dict[str, object]] = {
    "fb-average": {"name": "simple_average"},
    "fb-task_arithmetic": {"name": "task_arithmetic", "scaling_factor": 0.3},
    "fb-ties": {"name": "ties_merging", "scaling_factor": 0.3, "threshold": 20},
}


def main() -> None:
    args = _arguments()
    case = make_case(args.root, args.tasks, args.batch, args.arch)
    make_inputs(case)
    print_json(**machine())
    for name in args.cases:
        with tempfile.TemporaryDirectory(dir=args.root) as folder:
            _compare(args, case, name, Path(folder))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [*MERGEKIT, *FUSION_BENCH]
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=known, choices=known)
    add_case_arguments(parser, batch=1)
    parser.add_argument("--peers", default=sys.executable, help="the Python that has the peers")
    parser.add_argument("--fusion-bench", type=Path, help="a clone")
    parser.add_argument("--mergekit", help="the mergekit-pytorch command")
    return parser.parse_args()


def _compare(args: argparse.Namespace, case: Path, name: str, folder: Path) -> None:
    config, theirs, output = folder / "config.yaml", None, folder / "theirs"
    if name in MERGEKIT:
        config.write_text(yaml.safe_dump(_mergekit(case, dict(MERGEKIT[name])), sort_keys=False))
        if args.mergekit:
            theirs = [args.mergekit, config, output, "--num-threads", torch.get_num_threads()]
    else:
        config.write_text(yaml.safe_dump(_pool(case, FUSION_BENCH[name]), sort_keys=False))
        if args.fusion_bench:
            method = name.removeprefix("fb-")
            theirs = [args.peers, HERE / "peers" / "fusion_bench_static.py", "--case", case]
            theirs += ["--repo", args.fusion_bench, "--method", method, "--out", output]
    ours = [*raymerge(), "merge", config, "--output", folder / "ours"]
    runs: dict[str, list[ProcessRun]] = {"raymerge": [], "theirs": []}
    for turn in range(args.rounds):
        again = ["--overwrite"] if turn else []
        runs["raymerge"].append(run([*ours, *again], {"RAYMERGE_CACHE": str(folder / "cache")}))
        if theirs:
            runs["theirs"].append(run(theirs))
    for tool, timed in runs.items():
        if timed:
            print_json(
                case=f"{name} {tool}",
                tasks=args.tasks,
                median_s=median([r.seconds for r in timed[1:] or timed]),
                first_s=timed[0].seconds,
                peak_gb=max(r.anonymous_gb for r in timed),
                mapped_gb=max(r.mapped_gb for r in timed),
            )
    if theirs:
        their_model = output if output.is_file() else output / "model.safetensors"
        base = case / "pretrained" / "open_clip_model.safetensors"
        print_json(case=f"{name} difference", **_difference(folder / "ours", their_model, base))


def _experts(case: Path) -> list[str]:
    count = len(list((case / "experts").glob("task*.safetensors")))
    return [str((case / "experts" / f"task{k}.safetensors").resolve()) for k in range(count)]


def _mergekit(case: Path, options: dict[str, object]) -> dict[str, object]:
    own = {"weight": 0.3}
    if "density" in options:
        own["density"] = float(str(options.pop("density")))
    if options["merge_method"] != "linear":
        options["base_model"] = str((case / "pretrained" / "open_clip_model.safetensors").resolve())
    models = [{"model": file, "parameters": dict(own)} for file in _experts(case)]
    return {**options, "models": models}


def _pool(case: Path, method: dict[str, object]) -> dict[str, object]:
    base = str((case / "pretrained" / "open_clip_model.safetensors").resolve())
    models = {f"task{k}": file for k, file in enumerate(_experts(case))}
    return {"models": {"_pretrained_": base, **models}, "method": method}


def _difference(ours: Path, theirs: Path, base: Path) -> dict[str, object]:
    """Return how far and how often entries differ, and the ratio of the norms of θ − θ₀."""
    largest, differing, total, norms = 0.0, 0, 0, [0.0, 0.0]
    with (
        safe_open(ours / "model.safetensors", "pt") as a,
        safe_open(theirs, "pt") as b,
        safe_open(base, "pt") as c,
    ):
        if set(a.keys()) != set(b.keys()):
            raise SystemExit(
                f"the outputs have different tensors: {sorted(set(a.keys()) ^ set(b.keys()))[:4]}"
            )
        for key in b.keys():  # noqa: SIM118
            both = [file.get_tensor(key).double() for file in (a, b)]
            gap = (both[0] - both[1]).abs()
            largest = max(largest, float(gap.max()))
            differing += int((gap > 1e-6).sum())
            total += gap.numel()
            for i, merged in enumerate(both):
                norms[i] += float((merged - c.get_tensor(key).double()).square().sum())
    return {
        "largest_difference": largest,
        "differing": differing,
        "of": total,
        "norm_ratio": (norms[0] / norms[1]) ** 0.5 if norms[1] else None,
    }


if __name__ == "__main__":
    main()
