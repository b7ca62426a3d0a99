"""Which file a checkpoint reference means. Imports no torch: it is used before that."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raymerge.errors import CheckpointError, RemoteError, one_line
from raymerge.files.urls import is_remote

WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_model.bin",
    "model.safetensors",  # Hugging Face's
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",  # PEFT's
    "adapter_model.bin",
)
_SHARD = re.compile(r"(pytorch_)?model-\d+-of-\d+\.(safetensors|bin)")
_MOST_JSON_BYTES = 1 << 27
"""Of a config or an index: one of a million tensors has 100 MB."""
_LONGEST_NAME = 255


def locate(reference: str) -> Path:
    """The file behind a checkpoint reference: a file, an open_clip folder, a hub id, or a URL of a
    file or a folder, which is fetched."""
    if is_remote(reference):
        return _fetched(reference)
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


def _fetched(url: str) -> Path:
    from raymerge.files.remote import fetch, fetch_folder, is_folder

    folder, _, name = url.rpartition("/")
    try:
        if is_folder(url):
            return _located(fetch_folder(url, needed_files))
        if name.endswith(".index.json") or name.startswith("adapter_model."):
            return fetch_folder(folder, needed_files) / name  # of no use without what is beside it
        return fetch(url)
    except RemoteError as error:
        raise CheckpointError(f"checkpoint {error}") from None


def outline(reference: str, folder: Path) -> Path:
    """What stands in for a URL where headers are enough: a file, or a folder of the same names,
    made in ``folder``. All but safetensors files are fetched."""
    from raymerge.files import remote

    try:
        if not remote.is_folder(reference):
            return remote.outline(reference, folder)
        names = remote.list_folder(reference, needed_files)
        for name in names:
            url = f"{reference.rstrip('/')}/{name}"
            if name.endswith(".safetensors"):
                remote.outline(url, folder)
            else:
                (folder / name).symlink_to(remote.fetch(url))
        return folder
    except RemoteError as error:
        raise CheckpointError(f"checkpoint {error}") from None


def needed_files(names: Sequence[str]) -> list[str]:
    """Of a model folder: the weights that would be opened, and the small files beside them."""
    weights = [name for name in WEIGHT_FILES if name in names][:1]
    if any(name.endswith(".index.json") for name in weights):
        weights = [name for name in names if _SHARD.fullmatch(name)]  # .json comes below
    return [*weights, *(name for name in names if name.endswith((".json", ".txt")))]


def files_of(path: Path) -> list[Path]:
    """All files that a located checkpoint is in: an index and the shards that it names."""
    if not path.name.endswith(".index.json"):
        return [path]
    return [path, *(path.parent / name for name in sorted(set(weight_map(path).values())))]


def weight_map(index: Path) -> dict[str, str]:
    """Tensor → the name of the file beside ``index`` that holds it. Raises
    :class:`CheckpointError`, also for a name that leads elsewhere."""
    content = read_json(index)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"checkpoint {index}: has no weight_map (tensor → file); no index?")
    for name in found.values():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise CheckpointError(
                f"checkpoint {index}: refused: its weight_map names {str(name)[:80]!r}, which is "
                "no file beside it"
            )
    return found


def _is_plain_name(name: str) -> bool:
    """Of a file in the same folder, on any system."""
    plain = name.isprintable() and not set(name) & set("/\\:") and name not in ("", ".", "..")
    return plain and len(name.encode()) <= _LONGEST_NAME


def _download(repository: str) -> Path:
    path = _download_weights(repository)
    for name in [file.name for file in files_of(path)[1:]]:
        hub_file(repository, name)
    if not path.name.startswith("open_clip"):
        beside = "adapter_config.json" if path.name.startswith("adapter") else "config.json"
        hub_file(repository, beside, missing_ok=True)
    return path


def hub_file(repository: str, name: str, *, missing_ok: bool = False) -> Path | None:
    """A file of a hub repository; None for one that is not there, if ``missing_ok``.

    Raises :class:`CheckpointError` in one line.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # offline, unknown id, gated: one line for all of them
        if missing_ok and isinstance(error, EntryNotFoundError):
            return None
        raise CheckpointError(
            f"hf-hub:{repository}: {name} cannot be fetched ({one_line(error)})"
        ) from error


def _download_weights(repository: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
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
            if isinstance(error, LocalEntryNotFoundError):  # offline: what is here will do
                for cached in (try_to_load_from_cache(repository, name) for name in WEIGHT_FILES):
                    if isinstance(cached, str):
                        return Path(cached)
            raise CheckpointError(
                f"checkpoint hf-hub:{repository}: cannot be fetched ({one_line(error)})"
            ) from error
    raise CheckpointError(
        f"checkpoint hf-hub:{repository}: holds none of {', '.join(WEIGHT_FILES)}"
    )


def read_json(path: Path) -> Any:
    """A JSON file, or a :class:`CheckpointError` in one line."""
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise ValueError(f"it has more than {_MOST_JSON_BYTES >> 20} MiB")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {one_line(error)}") from error
