"""``hf:ORG/NAME[@REVISION]:SPLIT[?config=NAME&image=COLUMN&label=COLUMN]``: the hub's Parquet
files, or tar shards."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from raymerge.data.folder import is_hidden_path
from raymerge.data.sources.parquet import ParquetRows, open_parquet, split_files
from raymerge.data.sources.reference import DataReference
from raymerge.data.sources.shards import TarShards, open_shards
from raymerge.errors import DataError, one_line

_CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps a copy in Parquet of data sets in other forms."""
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

    A repository with neither is read as the hub has converted it, unless a revision is named.
    ``text``: the data set's name in errors.
    """
    root = _fetch(text, name, revision, split, config)
    if not _files_below(root, split) and revision is None:
        with suppress(DataError):  # the error of what the user named says more
            converted = _fetch(text, name, _CONVERTED, split, config)
            root = converted if _files_below(converted, split) else root
    files = _files_below(root, split)
    if files and files[0].suffix == ".tar":
        return files
    return split_files(files, root, split, config, text)


def _files_below(root: Path, split: str) -> list[Path]:
    """Return the Parquet files below a folder, or else the shards of a split, sorted."""
    visible = [p for p in sorted(root.rglob("*")) if not is_hidden_path(str(p.relative_to(root)))]
    parquet = [path for path in visible if path.suffix == ".parquet"]
    shards = [path for path in visible if path.suffix == ".tar" and _is_of(path, split)]
    return parquet or shards


def _is_of(shard: Path, split: str) -> bool:
    return shard.parent.name == split or shard.stem.partition("-")[0] == split


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
