"""Which file a checkpoint reference means. Imports no torch: it is used before that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raymerge.errors import CheckpointError

WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_model.bin")


def locate(reference: str) -> Path:
    """The file behind a checkpoint reference: a file, an open_clip folder, or a hub id."""
    if reference.startswith("hf-hub:"):
        return _download(reference.removeprefix("hf-hub:"))
    path = Path(reference.removeprefix("local-dir:"))
    try:
        return _located(path)
    except OSError as error:  # no permission on the way, or too long a name
        raise CheckpointError(f"checkpoint {path}: cannot be read: {error.strerror}") from error


def _located(path: Path) -> Path:
    if path.is_dir():
        for name in WEIGHT_FILES:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(
            f"checkpoint {path}: the folder holds none of {', '.join(WEIGHT_FILES)}"
        )
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    return path


def _download(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    )

    for name in WEIGHT_FILES:
        try:
            return Path(hf_hub_download(repository, name))
        except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(
                error, LocalEntryNotFoundError
            ):
                continue
            raise CheckpointError(
                f"checkpoint hf-hub:{repository}: cannot be fetched ({one_line(error)})"
            ) from error
    raise CheckpointError(
        f"checkpoint hf-hub:{repository}: holds none of {', '.join(WEIGHT_FILES)}"
    )


def one_line(error: BaseException, limit: int = 120) -> str:
    """What an error says, short enough for a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def read_json(path: Path) -> Any:
    """A JSON file, or a :class:`CheckpointError` in one line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {one_line(error)}") from error
