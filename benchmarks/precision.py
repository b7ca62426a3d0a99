"""Compare λ and accuracy in bfloat16 with those in float32, on a demo zoo.

    python benchmarks/precision.py ZOO [ZOO …] [--steps 50 500]

A ZOO is a folder that ``raymerge demo --zoo`` has built. There is one row for each number of steps
and each dtype of compute and vectors. The row ``float32, other seed`` shows how far λ moves when
only the images of each step change.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from measure import machine, print_json

from raymerge.config import load_config
from raymerge.runs.merge import MergeResult, merge

CASES = {
    "float32": [],
    "bfloat16 vectors": ["vectors.dtype=bfloat16"],
    "bfloat16 compute": ["precision=bfloat16"],
    "bfloat16 both": ["precision=bfloat16", "vectors.dtype=bfloat16"],
    "float32, other seed": ["seed=1"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("zoos", nargs="+", type=Path)
    parser.add_argument("--steps", nargs="+", type=int, default=[50, 500])
    args = parser.parse_args()
    print_json(**machine())
    for zoo in args.zoos:
        for steps in args.steps:
            results = {name: _merge(zoo, steps, options) for name, options in CASES.items()}
            for name, result in results.items():
                print_json(
                    case=name, zoo=zoo.name, steps=steps, **_differences(result, results["float32"])
                )


def _merge(zoo: Path, steps: int, options: list[str]) -> MergeResult:
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"optimizer.steps={steps}", f"output={folder}/run", *options]
        return merge(load_config(zoo / "zoo.yaml", overrides))


def _differences(result: MergeResult, reference: MergeResult) -> dict[str, float]:
    assert result.lambdas is not None
    assert reference.lambdas is not None
    gap_KL: torch.Tensor = (result.lambdas - reference.lambdas).abs()
    return {
        "largest_difference": float(gap_KL.max()),
        "mean_difference": float(gap_KL.mean()),
        "top1": 100 * (result.top1 or 0.0),
        "steps_s": result.seconds["steps"],
    }


if __name__ == "__main__":
    main()
