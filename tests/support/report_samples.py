"""Seeded sample folders, shaped like those that a merge and a demo write."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from raymerge.apps.experiments.findings import Curves, Findings, Table
from raymerge.report.data import Metrics

EIGHT = ("sun397", "stanford_cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
TWENTY = (
    *EIGHT,
    *("cifar10", "cifar100", "stl10", "flowers102", "oxford_iiit_pet", "pcam", "fer2013"),
    *("emnist", "food101", "fashion_mnist", "rendered_sst2", "kmnist"),
)
METHODS = {
    "zero_shot": 0.48,
    "individual": 0.905,
    "average": 0.66,
    "task_arithmetic": 0.691,
    "ties": 0.724,
    "adamerging_task": 0.711,
    "adamerging": 0.802,
    "adamerging_pp": 0.811,
}
LEARNED = ("adamerging_task", "adamerging", "adamerging_pp")
CONFIG = """\
model:
  arch: ViT-B-32-quickgelu
  pretrained: openai
method:
  name: {method}
  granularity: {granularity}
  task_vectors: raw
  objective: entropy
  init: 0.3
optimizer: {{name: adam, lr: 0.001, betas: [0.9, 0.999], steps: 500, batch_size: 16}}
seed: 0
"""


def vit_layers(blocks: int, per_block: int = 12) -> list[str]:
    """State-dict names of an open_clip visual tower, in its order."""
    inner = (
        *("ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias"),
        *("attn.out_proj.weight", "attn.out_proj.bias", "ln_2.weight", "ln_2.bias"),
        *("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    )[:per_block]
    stem = ["class_embedding", "positional_embedding", "proj", "conv1.weight"]
    stem += ["ln_pre.weight", "ln_pre.bias"]
    body = [f"transformer.resblocks.{b}.{name}" for b in range(blocks) for name in inner]
    return [*stem, *body, "ln_post.weight", "ln_post.bias"]


def results(rng: random.Random, method: str, tasks: tuple[str, ...], mean: float) -> dict:
    scores = {}
    for task in tasks:
        top1 = min(0.998, max(0.05, rng.gauss(mean, 0.12 if mean < 0.9 else 0.05)))
        loss = 2.6 * (1 - top1) + 0.05 * rng.random()
        examples = 1000 + 137 * len(task) + 1811 * tasks.index(task)
        entropy = loss * rng.uniform(0.4, 0.9)
        scores[task] = {"top1": top1, "loss": loss, "entropy": entropy, "examples": examples}
    average = sum(score["top1"] for score in scores.values()) / len(scores)
    return {"method": method, "average": {"top1": average}, "tasks": scores}


def lambdas(rng: random.Random, tasks: tuple[str, ...], layers: list[str]) -> dict:
    rows = []
    for _ in tasks:
        level = rng.uniform(0.15, 0.45)
        depth = [level * (0.6 + 0.9 * column / len(layers)) for column in range(len(layers))]
        rows.append([min(1.0, max(0.0, rng.gauss(mean, 0.08))) for mean in depth])
    return {"tasks": list(tasks), "layers": layers, "values": rows}


def metrics(rng: random.Random, final: dict, steps: int) -> list[dict]:
    """λ goes from 0.3 to its final mean, entropy falls with noise."""
    ends = {t: sum(row) / len(row) for t, row in zip(final["tasks"], final["values"], strict=True)}
    starts = {task: rng.uniform(0.4, 1.8) for task in ends}
    lines = []
    for step in range(1, steps + 1):
        left = math.exp(-4 * step / steps)
        noise = {task: rng.gauss(0, 0.08) for task in ends}
        entropy = {t: max(0.01, starts[t] * (0.35 + 0.65 * left) + noise[t]) for t in ends}
        lines.append(
            {
                "step": step,
                "loss": sum(entropy.values()),
                "entropy": entropy,
                "lambdas": {task: end + (0.3 - end) * left for task, end in ends.items()},
                "seconds": 0.21 + 0.02 * rng.random(),
            }
        )
    return lines


def environment(rng: random.Random, tasks: tuple[str, ...]) -> dict:
    return {
        "raymerge": "0.1.0",
        "python": "3.11.7",
        "torch": "2.9.0",
        "ray": "2.52.0",
        "open_clip": "3.2.0",
        "platform": "Linux-6.1-x86_64",
        "device": "cpu",
        "hashes": {f"ckpts/{t}/finetuned.pt": f"{rng.getrandbits(256):064x}" for t in tasks},
    }


def dump(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_learned(
    folder: Path, rng: random.Random, tasks: tuple[str, ...], layers: list[str], steps: int
) -> None:
    final = lambdas(rng, tasks, layers)
    dump(folder / "lambdas.json", final)
    lines = [json.dumps(line) + "\n" for line in metrics(rng, final, steps)]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


def write_run(
    folder: Path,
    tasks: tuple[str, ...] = EIGHT,
    layers: list[str] | None = None,
    steps: int = 500,
    seed: int = 0,
) -> Path:
    """The folder of an ``adamerging`` run, with every optional file."""
    rng = random.Random(seed)
    layers = layers if layers is not None else vit_layers(11, per_block=4)
    write_learned(folder, rng, tasks, layers, steps)
    scores = results(rng, "adamerging", tasks, 0.802)
    scores["timings"] = {
        "seconds": {"load": 4.21, "steps": 105.3, "export": 0.84, "evaluate": 42.0}
    }
    dump(folder / "results.json", scores)
    dump(folder / "environment.json", environment(rng, tasks))
    granularity = "task" if len(layers) == 1 else "tensor"
    config = CONFIG.format(method="adamerging", granularity=granularity)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    return folder


def write_comparison(
    folder: Path,
    tasks: tuple[str, ...] = EIGHT,
    layers: list[str] | None = None,
    steps: int = 500,
    seed: int = 0,
) -> Path:
    """The folder of a demo: eight methods, three of them learned, a scan and notes."""
    rng = random.Random(seed)
    layers = layers if layers is not None else vit_layers(11, per_block=4)
    scalings = [round(0.1 * index, 1) for index in range(1, 11)]
    top1 = [0.70 - 0.9 * (scaling - 0.32) ** 2 for scaling in scalings]
    for name in LEARNED:
        columns = ["all"] if name.endswith("_task") else layers
        write_learned(folder / "runs" / name, rng, tasks, columns, steps)
    comparison = {
        "methods": {name: results(rng, name, tasks, mean) for name, mean in METHODS.items()},
        "uniform_scan": {"scalings": scalings, "top1": top1},
        "notes": ["Glyph images at 32 × 32 pixels.", "All experts share one zero-shot head."],
        "timings": {"seconds": {"zoo": 61.5, "merges": 31.8}},
    }
    dump(folder / "comparison.json", comparison)
    dump(folder / "environment.json", environment(rng, tasks))
    return folder


def write_experiment(folder: Path, seed: int = 0) -> Path:
    """What an experiment leaves: all methods on eight tasks, conditions, text cells and curves."""
    rng = random.Random(seed)

    def top1(mean: float) -> float:
        return min(0.99, rng.gauss(mean, 0.1))

    by_task = {
        name: [*(top1(mean) for _ in EIGHT), mean, 0.65 + 0.1 * rng.random(), None]
        for name, mean in METHODS.items()
    }
    conditions = {
        condition: [top1(0.6), top1(0.7), "eurosat; svhn" if condition == "clean" else None]
        for condition in ("clean", "motion_blur", "impulse_noise", "jpeg_compression")
    }
    bins = {
        f"({i / 10:.1f}, {i / 10 + 0.1:.1f}]": [f"{91 * i:,}", f"{i / 9:.2f}"] for i in range(8)
    }
    x = [i / 10 for i in range(11)]
    findings = Findings(
        "Performance on all tasks",
        tables=[
            Table("All methods", [*EIGHT, "mean", "B/32", "L/14"], by_task, "Top-1 in %."),
            Table("All conditions", ["ties", "adamerging", "collapsed"], conditions),
            Table("Mean loss by entropy", ["images", "mean loss"], bins, "In nats."),
        ],
        curves=[
            Curves("Top-1 against λ", "λ", "top-1", x, {n: [top1(0.6) for _ in x] for n in EIGHT}),
            Curves("Memory", "models", "peak, MB", [10, 20, 40], {"files": [300, None, 310]}, "A."),
        ],
        notes=["base: 8 models", "0.87 is published."],
    )
    config = {"experiment": {"name": "methods"}, "base": "demo", "seed": 7}
    timings = {"seconds": {"ties": 3.21, "all": 754.0}}
    dump(folder / "experiment.json", {**findings.to_json(), "config": config, "timings": timings})
    dump(folder / "runs" / "ties" / "environment.json", environment(rng, EIGHT))
    return folder


def metrics_of(
    lambdas: dict[str, tuple[float | None, ...]] | None = None,
    entropy: dict[str, tuple[float | None, ...]] | None = None,
) -> Metrics:
    """The metrics of a run that measured only these."""
    lambdas, entropy = lambdas or {}, entropy or {}
    count = len(next(iter([*lambdas.values(), *entropy.values()])))
    nothing = (None,) * count
    return Metrics(tuple(range(1, count + 1)), nothing, entropy, lambdas, nothing)
