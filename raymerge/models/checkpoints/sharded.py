"""Sharded checkpoints: the files that an index, such as ``model.safetensors.index.json``, names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from raymerge.errors import CheckpointError
from raymerge.models.checkpoints.checkpoint import Checkpoint, ViewCheckpoint
from raymerge.models.checkpoints.locate import weight_map


def open_sharded(path: Path, open_shard: Callable[[Path], Checkpoint]) -> Checkpoint:
    """Open an index as one checkpoint; ``open_shard`` opens one of the files that it names.

    Raises :class:`CheckpointError` where the index and its files do not agree.
    """
    shards: dict[str, Checkpoint] = {}
    names = weight_map(path)
    for name in sorted(set(names.values())):
        if not (path.parent / name).is_file():
            raise CheckpointError(f"checkpoint {path}: {name} is missing beside it; fetch it again")
        shards[name] = open_shard(path.parent / name)
    for key, name in names.items():
        if key not in shards[name].specs:
            raise CheckpointError(
                f"checkpoint {path}: says that {key} is in {name}, which does not hold it; fetch "
                "both again"
            )
    kind = f"sharded {next(iter(shards.values())).kind}"
    return ViewCheckpoint(path, kind, {key: (shards[name], key) for key, name in names.items()})
