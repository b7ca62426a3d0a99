"""``hf:ORG/NAME[@REVISION]:SPLIT[?config=NAME&image=COLUMN&label=COLUMN]``: the hub's Parquet
files, or tar shards."""

from __future__ import annotations

import re
from pathlib import Path

from raymerge.data.sources.parquet import ParquetRows, open_parquet, split_files
from raymerge.data.sources.reference import DataReference
from raymerge.data.sources.shards import TarShards, open_shards
from raymerge.errors import DataError, one_line

_FORM = re.compile(
    r"hf:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?:(?P<split>\w+(\.\w+)*)", re.ASCII
)


def open_hub(reference: DataReference) -> ParquetRows | TarShards:
    """Open a split of a hub data set; its files are fetched unless the hub's cache has them."""
    reference.require_options("config", "image", "label")
    match = _FORM.fullmatch(reference.place)
    if match is None:
        raise DataError(
            f"{reference.text}: write hf:ORG/NAME:SPLIT, with @REVISION after the name if wanted"
        )
    config = reference.options.get("config")
    files = hub_files(reference.text, match["name"], match["revision"], match["split"], config)
    if files[0].suffix == ".tar":
        return open_shards(reference, files)
    return open_parquet(reference, files, place=reference.place)


def hub_files(
    text: str, name: str, revision: str | None, split: str, config: str | None
) -> list[Path]:
    """Return a split's files in order: Parquet, or the tar shards of a repository without any.

    ``text``: the data set's name in errors.
    """
    root = _fetch(text, name, revision, split, config)
    parquet = sorted(root.rglob("*.parquet"))
    shards = [
        path
        for path in sorted(root.rglob("*.tar"))
        if path.parent.name == split or re.fullmatch(rf"{split}(-\d.*)?", path.stem)
    ]
    if shards and not parquet:
        return shards
    return split_files(parquet, root, split, config, text)


def _fetch(text: str, name: str, revision: str | None, split: str, config: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    below = "" if config in (None, "default") else f"{config}/"
    places = (f"{split}-*", f"{split}/*", split)
    forms = [f"{place}.{suffix}" for place in places for suffix in ("parquet", "tar")]
    patterns = [f"{folder}{form}" for folder in (below, f"*{'/' + below if below else '/'}")
                for form in forms]  # fmt: skip
    try:
        return Path(
            snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"{text}: cannot be fetched ({one_line(error, 300)}); check the name, the network, "
            "HF_HUB_OFFLINE and HF_TOKEN, or name local Parquet files"
        ) from error
