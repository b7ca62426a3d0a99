"""Data at URLs: fetched into the cache, then read as local folders or files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from raymerge.data.folder import is_hidden_path
from raymerge.data.sources.shards import expand
from raymerge.errors import DataError, RemoteError
from raymerge.files.urls import is_remote


def local_reference(reference: str) -> str:
    """Return a reference with the local copy in place of a URL.

    ``?`` begins the options, as for paths, except for http(s), whose query is part of the URL.
    Raises :class:`DataError`.
    """
    if not is_remote(reference):
        return reference
    place, mark, options = reference.partition("?")
    if reference.lower().startswith("http"):
        place, mark, options = reference, "", ""
    try:
        return f"{_local(place)}{mark}{options}"
    except RemoteError as error:
        raise DataError(str(error)) from None


def _local(url: str) -> str:
    from raymerge.files import remote

    folder, _, name = url.rstrip("/").rpartition("/")
    if "{" in name:
        paths = [str(path) for path in expand(name)]

        def shards(names: Sequence[str]) -> list[str]:
            for shard in paths:
                if shard not in names:
                    raise DataError(f"{url}: {shard}: no such file; check the address")
            return paths

        return str(PurePosixPath(remote.fetch_folder(folder, shards)) / name)
    if not remote.is_folder(url):
        return str(remote.fetch(url))
    return str(remote.fetch_folder(url, is_skipped=is_hidden_path))
