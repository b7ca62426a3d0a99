"""Merges described in other tools' files: mergekit's YAML, fusion_bench's model pools.

A file is mapped onto raymerge's own maths and readers, and merged as state dicts or, where images
are needed, by an ordinary run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raymerge.config.loading import apply_override, read_yaml

if TYPE_CHECKING:
    from collections.abc import Iterable

    from raymerge.apps.peers.job import Job
    from raymerge.config import Config


def open_foreign(path: str | Path, overrides: Iterable[str] = ()) -> Job | Config | None:
    """Return the merge in another tool's file, or None if the file is raymerge's own.

    It is a config if images are needed, else a job of state dicts alone. Everything that can be
    checked from headers is. Raises :class:`~raymerge.errors.UserError`.
    """
    path = Path(path)
    data = read_yaml(path)
    mergekit = "merge_method" in data
    if not mergekit and "modelpool" not in data and not _is_pool(data.get("models")):
        return None
    overrides = list(overrides)
    for override in overrides:
        apply_override(data, override)
    text = None if overrides else path.read_text(encoding="utf-8")
    if mergekit:
        from raymerge.apps.peers.mergekit import read_mergekit

        return read_mergekit(data, path, text)
    from raymerge.apps.peers.fusion_bench import read_fusion_bench

    return read_fusion_bench(data, path, text)


def _is_pool(models: object) -> bool:
    """Return True for fusion_bench's models: a mapping by name, or a list with paths."""
    if isinstance(models, list):
        return any(isinstance(item, dict) and "path" in item for item in models)
    return isinstance(models, dict)
