"""Estimate a step's seconds and bytes from rates; docs/scaling.md explains and checks the model.

    python benchmarks/scaling_model.py --gflops 200 --memory-gb-s 20 --network-gb-s 1 --check
    python benchmarks/scaling_model.py            # the table for GPUs, from assumed rates

Symbols: K tasks, L layers, P parameters, B images a task, W = G·S workers in G groups of S shards.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from measure import print_json


@dataclass(frozen=True)
class Model:
    """Sizes of an encoder; FLOPs and activation bytes are those of one image."""

    name: str
    parameters: float
    flops: float
    layers: int
    activation_bytes: float


MODELS = [
    Model("ViT-B/32", 87.8e6, 8.8e9, 152, 36e6),
    Model("ViT-L/14", 303e6, 162e9, 296, 420e6),
    Model("1 B (ViT-g-like)", 1.01e9, 534e9, 500, 1.0e9),
]


@dataclass(frozen=True)
class Rates:
    """Rates of one worker, per second."""

    flops: float
    memory_bytes: float
    network_bytes: float
    ray_s: float = 2e-3
    """Seconds of a round trip through Ray, without its bytes."""


def step(
    model: Model, rates: Rates, tasks: int, batch: int, workers: int, shards: int, vector_bytes: int
) -> dict[str, float]:
    """Return seconds and bytes of one step for the slowest worker."""
    P, S = model.parameters, shards
    compute_s = 3 * model.flops * -(-tasks * batch // workers) / rates.flops
    # V is read twice and θ₀ once; θ is written; ∂ℒ/∂θ is zeroed and read.
    vector_s = (2 * tasks * P * vector_bytes / S + 4 * 4 * P / S) / rates.memory_bytes
    sent = 2 * (S - 1) / S * 4 * P
    collective_s = sent / rates.network_bytes
    message = 8.0 * tasks * model.layers
    driver_s = rates.ray_s + workers * 2 * message / rates.network_bytes
    return {
        "step_s": compute_s + vector_s + collective_s + driver_s,
        "compute_s": compute_s,
        "vectors_s": vector_s,
        "collectives_s": collective_s,
        "driver_s": driver_s,
        "sent_mb_per_worker": sent / 1e6,
        "message_mb": workers * 2 * message / 1e6,
        "memory_gb": memory_bytes(model, tasks, shards, vector_bytes) / 1e9,
    }


def memory_bytes(model: Model, tasks: int, shards: int, vector_bytes: int) -> float:
    """Return the bytes of whole θ and ∂ℒ/∂θ and of a shard of θ₀ and V, without activations."""
    return 8 * model.parameters + (4 + tasks * vector_bytes) * model.parameters / shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gflops", type=float, default=300_000, help="rate of one worker")
    parser.add_argument("--memory-gb-s", type=float, default=2500)
    parser.add_argument("--network-gb-s", type=float, default=40)
    parser.add_argument("--check", action="store_true", help="the cases that scaling.py measures")
    args = parser.parse_args()
    rates = Rates(args.gflops * 1e9, args.memory_gb_s * 1e9, args.network_gb_s * 1e9)
    cases = _CHECKED if args.check else _TABLE
    for name, tasks, batch, workers, shards, width in cases:
        model = next(m for m in MODELS if m.name.startswith(name))
        row = step(model, rates, tasks, batch, workers, shards, width)
        print_json(case=f"{model.name} K={tasks} B={batch} W={workers} S={shards}", **_rounded(row))


_CHECKED = [
    ("ViT-B/32", 8, 4, 1, 1, 4),
    ("ViT-B/32", 8, 4, 2, 1, 4),
    ("ViT-B/32", 8, 4, 2, 2, 4),
]
_TABLE = [
    ("ViT-B/32", 8, 16, 1, 1, 2),
    ("ViT-B/32", 8, 16, 8, 1, 2),
    ("ViT-B/32", 200, 16, 8, 1, 2),
    ("ViT-B/32", 1000, 16, 16, 4, 2),
    ("ViT-L/14", 20, 16, 8, 1, 2),
    ("ViT-L/14", 200, 16, 32, 2, 2),
    ("ViT-L/14", 1000, 16, 64, 16, 2),
    ("1 B", 20, 16, 16, 2, 2),
    ("1 B", 200, 16, 64, 8, 2),
    ("1 B", 1000, 16, 256, 32, 2),
]


def _rounded(row: dict[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.3g}") for key, value in row.items()}


if __name__ == "__main__":
    main()
