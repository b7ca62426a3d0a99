"""Cases to measure on: random ViT weights and noise images of the real sizes and formats.

A case is a folder: ``pretrained/`` (a whole CLIP), ``experts/task{k}.safetensors``, B images in
``data/task{k}/``, ``merge.yaml`` over them, and ``inputs.safetensors`` with what the images and
class names become (``pixels.{k}``, ``head.{k}``), so that other tools get the same numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

CLASSES = 10
DISTINCT = 16
"""Experts beyond these are links to them: K = 200 would fill the disk."""


def make_case(root: Path, tasks: int, batch: int, arch: str = "ViT-B-32") -> Path:
    """Write what is missing of a case below ``root``; returns its folder."""
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
    """``inputs.safetensors`` of a case, by raymerge's own preprocessing and heads."""
    path = case / "inputs.safetensors"
    if path.exists():
        return path
    from raymerge.config import load_config
    from raymerge.data.decoding import decode_all
    from raymerge.data.folder import unlabeled_images
    from raymerge.engine.messages import WorkerSpec
    from raymerge.engine.worker.shard import ServedModel

    config = load_config(case / "merge.yaml")
    model = ServedModel(WorkerSpec(config.model, config.tasks, use_gpu=False))
    preprocess, tensors = model.encoder.preprocess, {}
    for k, task in enumerate(config.tasks):
        images = unlabeled_images(str(task.adapt), task.name)
        tensors[f"pixels.{k}"] = preprocess.normalise(decode_all(images.paths, preprocess))
        tensors[f"head.{k}"] = model.head(k).contiguous()
    save_file(tensors, path)
    return path


def _make_weights(root: Path, tasks: int, arch: str) -> None:
    import open_clip

    path = root / "pretrained" / "open_clip_model.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        state = {k: v.contiguous() for k, v in open_clip.create_model(arch).state_dict().items()}
        save_file(state, path)
        cfg = {"model_cfg": open_clip.get_model_config(arch)}
        (root / "pretrained" / "open_clip_config.json").write_text(json.dumps(cfg))
    (root / "experts").mkdir(exist_ok=True)
    for k in range(tasks):
        expert = root / "experts" / f"task{k}.safetensors"
        if not expert.exists():
            _make_expert(path, expert, k)


def _make_expert(pretrained: Path, path: Path, seed: int) -> None:
    """Its task vector is noise of about the relative size that fine-tuning leaves."""
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
