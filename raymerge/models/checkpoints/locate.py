"""Find the file that a checkpoint reference means, and the files that belong to it.

A reference is a path, a hub id or a URL. Imports no torch: it is used before torch is loaded.
Opening the files is left to ``opening``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raymerge.errors import CheckpointError, RemoteError, one_line
from raymerge.files.atomic import exists
from raymerge.files.urls import is_remote
from raymerge.models.checkpoints.foreign import WEIGHT_SUFFIXES, folder_remedy, pointer_remedy

# In order of preference; files of several libraries may lie in one folder.
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
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
_HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)
_MAX_JSON_BYTES = 1 << 27  # an index of a million tensors has 100 MB
_MAX_NAME_BYTES = 255


def locate(reference: str) -> Path:
    """Return the weights file of a reference: a file, a model folder, a hub id, or the URL of a
    file or folder, which is fetched. Raises :class:`CheckpointError`."""
    reference, _ = split_part(reference)
    if is_remote(reference):
        return _fetch(reference)
    if reference.startswith("hf-hub:"):
        return _download(reference.removeprefix("hf-hub:"))
    path = Path(reference.removeprefix("local-dir:"))
    try:
        return _weights_at(path)
    except OSError as error:  # no permission for a folder above it, or too long a name
        raise CheckpointError(
            f"checkpoint {path}: cannot be read: {error.strerror}; check the path"
        ) from error


def split_part(reference: str) -> tuple[str, str]:
    """Return a reference without ``#part``, and the part: the prefix of the keys that are meant.

    A file of several models, such as a model and its moving average, is named so. An existing path
    is taken as it is.
    """
    place, _, part = reference.rpartition("#")
    is_part = place and part and "/" not in part and not exists(Path(reference))
    return (place, part) if is_part else (reference, "")


def _weights_at(path: Path) -> Path:
    if path.is_dir():
        found = _weights_in(path)
        if found is None:
            remedy = folder_remedy(path, lambda folder: _weights_in(folder) is not None)
            names = ", ".join(WEIGHT_FILES)
            raise CheckpointError(f"checkpoint {path}: the folder holds none of {names}{remedy}")
        return found
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: {_missing(path)}")
    return path


def _missing(path: Path) -> str:
    """Return why there is no file at a path, and the remedy."""
    if path.is_symlink():
        return f"is a link to {path.readlink()}, which does not exist; fetch that file again"
    name = "/".join(path.parts[-2:])
    if path.parent.exists() or not _HUB_ID.fullmatch(name) or path.suffix in WEIGHT_SUFFIXES:
        return "no such file; check the path"
    return (
        f"no such file; check the path, or for a model of the Hugging Face hub write hf-hub:{name}"
    )


def _weights_in(folder: Path) -> Path | None:
    """Return a folder's weights, by their name; beside open_clip's config any that it takes."""
    names = list(WEIGHT_FILES)
    if exists(folder / "open_clip_config.json"):
        for suffix in (".safetensors", ".bin", ".pth"):
            names += sorted(file.name for file in folder.glob(f"*{suffix}"))
    files = (folder / name for name in names)
    return next((file for file in files if file.is_file()), None)


# --- the files of one checkpoint -----------------------------------------------------------------


def is_index(path: Path) -> bool:
    """Return whether a file lists the shards of a checkpoint."""
    return path.name.endswith(".index.json")


def needed_files(names: Sequence[str]) -> list[str]:
    """Return the files of a model folder that are read: the preferred weights, and the small files
    beside them."""
    weights = [name for name in WEIGHT_FILES if name in names][:1]
    if any(is_index(Path(name)) for name in weights):
        weights = [name for name in names if _SHARD.fullmatch(name)]  # the index is added below
    return [*weights, *(name for name in names if name.endswith((".json", ".txt")))]


def files_of(path: Path) -> list[Path]:
    """Return all files of a located checkpoint: itself, and the shards that an index names."""
    if not is_index(path):
        return [path]
    return [path, *(path.parent / name for name in sorted(set(weight_map(path).values())))]


def weight_map(index: Path) -> dict[str, str]:
    """Return, for each tensor, the name of the file beside ``index`` that holds it.

    Raises :class:`CheckpointError`, also for a name outside the index's folder.
    """
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise CheckpointError(
            f"checkpoint {index}: has no weight_map (tensor → file), so it is not an index; "
            "name the weights"
        )
    for name in names.values():
        if not isinstance(name, str) or not _is_plain_name(name) or is_index(Path(name)):
            raise CheckpointError(
                f"checkpoint {index}: refused: its weight_map names {str(name)[:80]!r}, which is "
                "not a weights file beside it; name one that is"
            )
    return names


def _is_plain_name(name: str) -> bool:
    """Return whether a name stays in its folder, on any operating system."""
    is_plain = name.isprintable() and not set(name) & set("/\\:") and name not in ("", ".", "..")
    return is_plain and len(name.encode()) <= _MAX_NAME_BYTES


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises :class:`CheckpointError`, also where it is too
    large or nested too deeply."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has more than {_MAX_JSON_BYTES >> 20} MiB")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        remedy = pointer_remedy(path) or f"cannot be read as JSON: {one_line(error)}"
        raise CheckpointError(f"{path}: {remedy}") from error


# --- URLs ----------------------------------------------------------------------------------------


def _fetch(url: str) -> Path:
    from raymerge.files.remote import fetch, fetch_folder, is_folder

    folder, _, name = url.rpartition("/")
    try:
        if is_folder(url):
            return _weights_at(fetch_folder(url, needed_files))
        if is_index(Path(name)) or name.startswith("adapter_model."):  # useless on its own
            return fetch_folder(folder, needed_files) / name
        return fetch(url)
    except RemoteError as error:
        raise CheckpointError(f"checkpoint {error}") from None


def outline(reference: str, folder: Path) -> Path:
    """Make a stand-in for a URL where headers are enough, and return it: a file, or ``folder``.

    Of safetensors files only the headers are fetched; all other files are fetched whole.
    """
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


# --- the hub -------------------------------------------------------------------------------------


def hub_folder(repository: str, names: Sequence[str] = ("*.json", "*.txt")) -> Path:
    """Return the cached folder of a hub repository, with the files of these names or patterns.

    Without a network it is an earlier download. Raises :class:`CheckpointError`.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(names)))
    except Exception as error:  # offline, an unknown id, a gated repository
        raise CheckpointError(
            f"checkpoint hf-hub:{repository}: cannot be fetched ({one_line(error)}); check the name"
        ) from error


def _download(repository: str) -> Path:
    """Return a repository's weights after downloading them with the small files beside them."""
    from huggingface_hub import model_info

    try:
        files = model_info(repository).siblings or ()
    except Exception:  # offline: an earlier download is used, or hub_folder raises the reason
        return _weights_at(hub_folder(repository))
    return _weights_at(hub_folder(repository, needed_files([file.rfilename for file in files])))
