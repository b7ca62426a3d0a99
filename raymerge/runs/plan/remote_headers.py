"""Configs whose checkpoints lie behind URLs: their headers first, then the files, all at once.

A header tells whether a model fits; a mistake is reported before gigabytes have been fetched.
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
from raymerge.models.checkpoints.locate import locate, outline

_FILES_AT_ONCE = 4


@dataclass(frozen=True)
class Outlined:
    """A config with stand-ins of the headers alone; ``names``: their paths → the public URLs."""

    config: Config
    names: dict[str, str]

    def named(self, text: str) -> str:
        """A text about it, with the URLs in place of the stand-ins."""
        for path, url in self.names.items():
            text = text.replace(path, url)
        return text


def remote_checkpoints(config: Config) -> list[str]:
    """The URLs that a merge opens, each once."""
    method = getattr(config.method, "checkpoint", None)
    given = [config.model.reference, *(task.checkpoint for task in config.models), method]
    return sorted({str(url) for url in given if url is not None and is_remote(url)})


@contextmanager
def outlined(config: Config) -> Iterator[Outlined]:
    """The config with stand-ins, which are gone afterwards. What cannot be opened stays a URL."""
    with tempfile.TemporaryDirectory(prefix="raymerge-headers-") as folder:
        stands: dict[str, str] = {}
        for i, url in enumerate(remote_checkpoints(config)):
            own = Path(folder) / str(i)
            own.mkdir()
            with suppress(RaymergeError):  # the check finds it, and says which key it is
                stands[url] = str(outline(url, own))
        yield Outlined(
            _replaced(config, stands), {path: redact_url(url) for url, path in stands.items()}
        )


def _replaced(config: Config, stands: dict[str, str]) -> Config:
    model = config.model
    if model.pretrained is not None:
        model = model.model_copy(update={"pretrained": stands.get(model.pretrained)})
        model = config.model if model.pretrained is None else model
    elif model.arch in stands:
        model = model.model_copy(update={"arch": f"local-dir:{stands[model.arch]}"})
    tasks = [
        task.model_copy(update={"checkpoint": stands.get(str(task.checkpoint), task.checkpoint)})
        for task in config.tasks
    ]
    changes: dict[str, object] = {"model": model, "tasks": tuple(tasks)}
    method = getattr(config.method, "checkpoint", None)
    if method in stands:
        changes["method"] = config.method.model_copy(update={"checkpoint": stands[method]})
    return config.model_copy(update=changes)


def fetch_checkpoints(config: Config) -> None:
    """Bring all of them into the cache, several at a time; errors are left to who opens them."""
    urls = remote_checkpoints(config)
    if not urls:
        return

    def fetch(url: str) -> None:
        with suppress(RaymergeError):
            locate(url)

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        list(pool.map(fetch, urls))
