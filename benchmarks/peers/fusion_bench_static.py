"""Merge a case with fusion_bench's task arithmetic, simple average or TIES into one file.

    python fusion_bench_static.py --case CASE --repo fusion_bench --method ties --out FILE

Its algorithm classes run unchanged on a model pool that opens a checkpoint (memory-mapped) when it
is asked for one. One JSON line is printed: seconds to import fusion_bench (after torch and
open_clip), to read and merge, and to write.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import time
from pathlib import Path
from typing import Any

import peer
import torch
from safetensors.torch import save_file
from torch import nn


def main() -> None:
    args = _arguments()
    sys.path.insert(0, str(args.repo.resolve()))
    if args.threads:
        torch.set_num_threads(args.threads)
    with contextlib.redirect_stdout(sys.stderr):
        run(args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--repo", type=Path, required=True, help="a clone of fusion_bench")
    parser.add_argument("--method", choices=["task_arithmetic", "average", "ties"], required=True)
    parser.add_argument("--scaling", type=float, default=0.3)
    parser.add_argument("--density", type=float, default=0.2, help="ties: fraction kept")
    parser.add_argument("--merge-func", choices=["sum", "mean", "max"], default="sum")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    algorithm = make_algorithm(args)
    pool = make_pool(args.case)
    imported = time.perf_counter()
    merged = algorithm.run(pool)
    done = time.perf_counter()
    state = {peer.PREFIX + name: t.contiguous() for name, t in merged.state_dict().items()}
    save_file(state, args.out)
    peer.print_json(
        peer="fusion_bench",
        commit=peer.commit(args.repo),
        method=args.method,
        import_s=imported - began,
        merge_s=done - imported,
        write_s=time.perf_counter() - done,
        peak_rss_gb=peer.peak_rss_gb(),
        tasks=len(pool.model_names),
    )


def make_algorithm(args: argparse.Namespace) -> Any:
    from fusion_bench import method

    if args.method == "task_arithmetic":
        return method.TaskArithmeticAlgorithm(scaling_factor=args.scaling)
    if args.method == "average":
        return method.SimpleAverageAlgorithm()
    return method.TiesMergingAlgorithm(
        scaling_factor=args.scaling,
        threshold=args.density,
        remove_keys=[],
        merge_func=args.merge_func,
    )


def make_pool(case: Path) -> Any:
    from fusion_bench.modelpool import BaseModelPool

    files = {f.stem: f for f in peer.expert_files(case, peer.task_count(case))}
    files["_pretrained_"] = peer.pretrained_file(case)
    empty = peer.empty_visual(case)

    class Files(BaseModelPool):
        def load_model(self, name: str) -> nn.Module:
            visual = copy.deepcopy(empty)
            visual.load_state_dict(peer.visual_state(files[name]), assign=True)
            return visual

    return Files({name: str(file) for name, file in files.items()})


if __name__ == "__main__":
    main()
