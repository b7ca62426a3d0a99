"""Configs whose checkpoints lie behind URLs: first their headers, then the whole files.

A header shows whether a model fits, so a mistake is reported before gigabytes are fetched. Opening
and caching one URL is left to ``models.checkpoints.locate``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from raymerge.config import Config
from raymerge.errors import RaymergeError
from raymerge.files.urls import is_remote, redact_url
from raymerge.models.checkpoints.locate import locate, outline, split_part

_FILES_AT_ONCE = 4


@dataclass(frozen=True)
class HeaderConfig:
    """A config with local files of the headers alone in place of its URLs.

    ``urls``: the path of each such file → its URL without secrets.
    """

    config: Config
    urls: dict[str, str]

    def restore_urls(self, text: str) -> str:
        """Return a text about this config with the URLs in place of the local paths."""
        for path, url in self.urls.items():
            text = text.replace(path, url)
        return text


def remote_checkpoints(config: Config) -> list[str]:
    """Return the URLs that a merge opens, each once."""
    own = getattr(config.method, "checkpoint", None)
    references = [config.model.reference, *(task.checkpoint for task in config.models), own]
    return sorted({str(url) for url in references if url is not None and is_remote(url)})


@contextmanager
def fetch_headers(config: Config) -> Iterator[HeaderConfig]:
    """Fetch the headers of remote checkpoints; the files are removed afterwards.

    A URL that cannot be opened stays in the config, so that the check of its key reports it.
    """
    with tempfile.TemporaryDirectory(prefix="raymerge-headers-") as folder:
        paths: dict[str, str] = {}
        for i, url in enumerate(remote_checkpoints(config)):
            own = Path(folder) / str(i)
            own.mkdir()
            with suppress(RaymergeError):
                place, part = split_part(url)
                paths[url] = f"{outline(place, own)}{'#' * bool(part)}{part}"
        yield HeaderConfig(
            _replace_urls(config, paths), {path: redact_url(url) for url, path in paths.items()}
        )


def _replace_urls(config: Config, paths: dict[str, str]) -> Config:
    """Return the config with each URL in ``paths`` replaced by its path."""
    model = config.model
    if model.pretrained is not None:
        model = model.model_copy(update={"pretrained": paths.get(model.pretrained)})
        model = config.model if model.pretrained is None else model
    elif model.arch in paths:
        model = model.model_copy(update={"arch": f"local-dir:{paths[model.arch]}"})
    tasks = [
        task.model_copy(update={"checkpoint": paths.get(str(task.checkpoint), task.checkpoint)})
        for task in config.tasks
    ]
    changes: dict[str, object] = {"model": model, "tasks": tuple(tasks)}
    method = getattr(config.method, "checkpoint", None)
    if method in paths:
        changes["method"] = config.method.model_copy(update={"checkpoint": paths[method]})
    return config.model_copy(update=changes)


def fetch_checkpoints(config: Config) -> None:
    """Fetch the remote checkpoints into the cache; what fails is reported where it is opened."""
    urls = remote_checkpoints(config)
    if not urls:
        return

    def fetch(url: str) -> None:
        with suppress(RaymergeError):
            locate(url)

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        list(pool.map(fetch, urls))
