"""Digests of a CLIP run's inputs, by which nodes are compared; no file is read whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

from raymerge.config import ModelConfig
from raymerge.data.sources import unlabeled_images
from raymerge.engine.worker.identity import sample_digest
from raymerge.models.checkpoints.locate import files_of, locate
from raymerge.models.resolve import resolve_model


def model_digest(model: ModelConfig) -> str:
    """Return the digest of the pretrained model: its config and its weights."""
    resolved = resolve_model(model)
    config = hashlib.sha256(resolved.config_json.encode()).hexdigest()[:16]
    return config + _digest_of(files_of(resolved.weights))


def weights_digest(reference: str) -> str:
    """Return the digest of a checkpoint's files."""
    return _digest_of(files_of(locate(reference)))


def images_digest(reference: str, where: str) -> str:
    """Return the digest of the images' names in their order, and of image files' sizes."""
    images = unlabeled_images(reference, where)
    digest = hashlib.sha256("\n".join(images.keys(reference.partition("?")[0])).encode())
    for item in images.items:
        if isinstance(item, Path):
            digest.update(item.stat().st_size.to_bytes(8, "little"))
    return digest.hexdigest()[:16]


def _digest_of(files: list[Path]) -> str:
    return "".join(sample_digest(file) for file in files)
