"""Run steps of fusion_bench's layer-wise AdaMerging, in its own loop, on a case.

    python fusion_bench_step.py --case CASE --repo fusion_bench --steps 5 --out lambdas.npz

``construct_layer_wise_merged_model`` and ``test_time_adaptation`` of its
``LayerWiseAdaMergingAlgorithm`` run unchanged, on its own classification heads, with the settings
of its ``config/method/adamerging/clip.yaml``. This adapter adds only what its abstract methods ask
for (images and logits) and the clock, which starts when the loop asks for the first images of a
step and stops when it logs the step: K forward and backward passes, Adam, and the merge for the
next step.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import peer
import torch
from torch import Tensor, nn


def main() -> None:
    parser = peer.step_arguments(__doc__.splitlines()[0])
    parser.add_argument("--clamp", choices=["none", "forward"], default="none")
    args = parser.parse_args()
    sys.path.insert(0, str(args.repo.resolve()))
    if args.threads:
        torch.set_num_threads(args.threads)
    with contextlib.redirect_stdout(sys.stderr):
        run(args)


def run(args: argparse.Namespace) -> None:
    pixels, heads = peer.load_inputs(args.case)
    clock = peer.Clock(args.pause)
    pool = make_pool(args, len(pixels))
    algorithm = make_algorithm(settings(args), pool, pixels, heads, clock)
    merged = algorithm.construct_layer_wise_merged_model(pool)
    names = [name for name, _ in merged.pretrained_model.named_parameters()]
    merged = algorithm.test_time_adaptation(merged)
    lambdas_KL = merged.merge_weight
    if args.clamp == "forward":
        lambdas_KL = lambdas_KL.clamp(0, 1)
    peer.report("fusion_bench", args, clock, lambdas_KL, names, len(pixels[0]))


def settings(args: argparse.Namespace) -> dict[str, object]:
    """Return the settings of its clip.yaml, where ``clamp_weights`` is false."""
    return {
        "weights": None,
        "init_values": peer.INIT,
        "clamp_weights": args.clamp == "forward",
        "tie_weights": True,
        "strict": False,
        "optimizer": "adam",
        "lr": args.lr,
        "max_steps": args.steps,
    }


def make_pool(args: argparse.Namespace, tasks: int) -> Any:
    from fusion_bench.modelpool import BaseModelPool

    files = peer.expert_files(args.case, tasks)
    models = {f"task{k}": peer.load_visual(args.case, file) for k, file in enumerate(files)}
    pretrained = peer.load_visual(args.case, peer.pretrained_file(args.case))
    return BaseModelPool({"_pretrained_": pretrained, **models})


def make_algorithm(
    config: dict[str, object],
    pool: Any,
    pixels: list[Tensor],
    heads: list[Tensor],
    clock: peer.Clock,
) -> Any:
    """Return its algorithm on the case's images, with a fabric whose log stops the clock."""
    from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
    from fusion_bench.models.open_clip.modeling import ClassificationHead
    from lightning import Fabric
    from omegaconf import OmegaConf

    names = list(pool.model_names)
    images = dict(zip(names, pixels, strict=True))
    classify = {
        name: ClassificationHead(True, head_DC.T).requires_grad_(False)
        for name, head_DC in zip(names, heads, strict=True)
    }

    class Measured(LayerWiseAdaMergingAlgorithm):
        def get_shuffled_test_loader_iter(self, task: str) -> Iterator[tuple[Tensor]]:
            if task == names[0]:
                clock.start()
            return iter([(images[task],)])

        def compute_logits(self, module: nn.Module, images: Tensor, task: str) -> Tensor:
            return classify[task](module(images))

    algorithm = Measured(OmegaConf.create(config))
    algorithm.modelpool = pool
    algorithm.fabric = Fabric(accelerator="cpu", devices=1)
    algorithm.fabric.log_dict = lambda metrics, step: clock.stop()
    return algorithm


if __name__ == "__main__":
    main()
