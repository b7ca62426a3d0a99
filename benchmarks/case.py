"""Inputs for the benchmarks: random ViT weights and noise images of the real sizes and formats.

A case is a folder: ``pretrained/`` (a whole CLIP), ``experts/task{k}.safetensors``, B images in
``data/task{k}/``, and ``merge.yaml``, a config over them. ``inputs.safetensors`` holds the decoded
images and the heads (``pixels.{k}``, ``head.{k}``), so that other tools get the same numbers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

CLASSES = 10
DISTINCT = 16
"""Number of experts that are written; further ones link to these, as 200 would fill the disk."""
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
}
"""The architecture named ``tiny``: a benchmark of seconds, to see whether it still runs."""


def add_case_arguments(parser: argparse.ArgumentParser, tasks: int = 8, batch: int = 16) -> None:
    """Add the arguments that choose a case; ``tasks`` and ``batch`` are their defaults."""
    parser.add_argument("--tasks", type=int, default=tasks)
    parser.add_argument("--batch", type=int, default=batch, help="images of a task in a step")
    parser.add_argument("--arch", default="ViT-B-32", help="an open_clip name, or tiny")
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir(), "raymerge-cases"))


def model_config(arch: str) -> dict[str, Any]:
    """Return open_clip's configuration of an architecture."""
    import open_clip

    return TINY if arch == "tiny" else open_clip.get_model_config(arch)


def make_case(root: Path, tasks: int, batch: int, arch: str = "ViT-B-32") -> Path:
    """Write the missing files of a case below ``root`` and return its folder."""
    weights = root / arch
    _make_weights(weights, min(tasks, DISTINCT), arch)
    case = root / f"{arch}-K{tasks}-B{batch}"
    if (case / "merge.yaml").exists():
        return case
    (case / "experts").mkdir(parents=True, exist_ok=True)
    _link(case / "pretrained", weights / "pretrained")
    for k in range(tasks):
        source = weights / "experts" / f"task{k % DISTINCT}.safetensors"
        _link(case / "experts" / f"task{k}.safetensors", source)
        _make_images(case / "data" / f"task{k}", k, batch)
    (case / "merge.yaml").write_text(yaml.safe_dump(_config(tasks, batch)))
    return case


def make_inputs(case: Path) -> Path:
    """Write ``inputs.safetensors`` with raymerge's preprocessing and heads; return its path."""
    path = case / "inputs.safetensors"
    if path.exists():
        return path
    from raymerge.config import load_config
    from raymerge.data.decoding import decode_all
    from raymerge.data.folder import unlabeled_images
    from raymerge.engine.messages import WorkerSpec
    from raymerge.engine.worker.clip_model import ClipModel

    config = load_config(case / "merge.yaml")
    model = ClipModel(config.model, config.tasks, WorkerSpec(use_gpu=False), {})
    preprocess, tensors = model.encoder.preprocess, {}
    for k, task in enumerate(config.tasks):
        images = unlabeled_images(str(task.adapt), task.name)
        tensors[f"pixels.{k}"] = preprocess.normalise(decode_all(images.items, preprocess))
        tensors[f"head.{k}"] = model.head(k).contiguous()
    save_file(tensors, path)
    return path


def _make_weights(root: Path, tasks: int, arch: str) -> None:
    import open_clip

    path = root / "pretrained" / "open_clip_model.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        model = open_clip.CLIP(**model_config(arch))
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(state, path)
        cfg = {"model_cfg": model_config(arch)}
        (root / "pretrained" / "open_clip_config.json").write_text(json.dumps(cfg))
    (root / "experts").mkdir(exist_ok=True)
    for k in range(tasks):
        expert = root / "experts" / f"task{k}.safetensors"
        if not expert.exists():
            _make_expert(path, expert, k)


def _make_expert(pretrained: Path, path: Path, seed: int) -> None:
    """Write an expert whose task vector is noise of about the size that fine-tuning leaves."""
    generator = torch.Generator().manual_seed(seed)
    visual = {k: t for k, t in load_file(pretrained).items() if k.startswith("visual.")}
    noisy = {n: t + 1e-3 * torch.randn(t.shape, generator=generator) for n, t in visual.items()}
    save_file(noisy, path)


def _make_images(folder: Path, seed: int, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")


def _link(path: Path, target: Path) -> None:
    if not path.exists():
        path.symlink_to(target.absolute())


def _config(tasks: int, batch: int) -> dict[str, object]:
    names = [f"class {c}" for c in range(CLASSES)]
    entries = [
        {
            "name": f"task{k}",
            "checkpoint": f"experts/task{k}.safetensors",
            "classnames": names,
            "adapt": f"data/task{k}",
        }
        for k in range(tasks)
    ]
    return {
        "model": "local-dir:pretrained",
        "tasks": entries,
        "method": {"name": "adamerging", "clamp": "none"},
        "optimizer": {"batch_size": batch},
        "cluster": {"workers": 0},
    }
