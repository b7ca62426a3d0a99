"""How long a step will take here: its FLOPs and bytes at rates that a short probe measures."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from raymerge.models import make_preprocess

_EFFICIENCY = 0.8
"""Of a transformer's pass against its largest matrix product alone (benchmarks/step.py)."""


def forward_flops(visual: nn.Module) -> int:
    """Of one image; ``visual`` is the tower on ``meta``."""
    from torch.utils.flop_counter import FlopCounterMode

    height, width = make_preprocess(visual).size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        visual.train(False).requires_grad_(False)(torch.empty(1, 3, height, width, device="meta"))
    flops: int = counter.get_total_flops()
    return flops


def step_seconds(flops_per_image: int, images: int, vector_bytes: int, dtype: torch.dtype) -> float:
    """Seconds of one worker's step on this machine: a forward and a backward pass (three forward
    passes' work) of its images, and two reads of its task vectors."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops_s, bytes_s = _rates(device, dtype)
    return 3 * flops_per_image * images / (_EFFICIENCY * flops_s) + 2 * vector_bytes / bytes_s


def _rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOPs and bytes per second of a ViT-B's largest product and of a long sum."""
    a_BW = torch.ones(800, 768, device=device, dtype=dtype)
    w_VW = torch.ones(3072, 768, device=device, dtype=dtype)
    long_N = torch.ones(8_000_000, device=device)
    product_s = _fastest(lambda: nn.functional.linear(a_BW, w_VW), device)
    return 2 * 800 * 768 * 3072 / product_s, long_N.nbytes / _fastest(long_N.sum, device)


def _fastest(work: Callable[[], Tensor], device: torch.device) -> float:
    seconds = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
