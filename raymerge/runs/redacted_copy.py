"""A redacted copy of an output folder: no local path, no name of a user or of a machine.

The copy holds links to the run's files; the few files that contain paths are rewritten. Secrets in
URLs are removed by :mod:`raymerge.files.urls`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from raymerge.files.urls import redact_values
from raymerge.report import write_report

_PRIVATE_FOLDERS = ("state", "tensorboard", "wandb")
"""The saved state, and logs that contain the machine's name."""
_TEXT_KEYS = ("classnames", "templates", "authors", "license")
"""Keys whose texts are never paths, whatever they look like."""


@contextmanager
def redacted_copy(folder: Path) -> Iterator[Path]:
    """Yield a redacted copy of ``folder`` under the same name; it is removed afterwards.

    Hidden files, the saved state and the trackers' folders are left out.
    """
    with tempfile.TemporaryDirectory(prefix="raymerge-") as temporary:
        copy = Path(temporary) / folder.resolve().name
        for file in _public_files(folder):
            link = copy / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        for name, rewrite in _REWRITERS.items():
            if (copy / name).is_file():
                text = rewrite((copy / name).read_text(encoding="utf-8"))
                (copy / name).unlink()
                (copy / name).write_text(text, encoding="utf-8")
        if (copy / "report.html").is_file():
            write_report(copy)  # from the redacted files; it replaces the link
        yield copy


def _public_files(folder: Path) -> list[Path]:
    """Return the files that may be published, sorted."""
    files = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if file.is_file() and not hidden and parts[0] not in _PRIVATE_FOLDERS:
            files.append(file)
    return files


def without_paths(data: Any) -> Any:
    """Return plain data with each local path cut to its last name.

    Keys that would become equal are numbered.
    """
    if isinstance(data, dict):
        redacted: dict[Any, Any] = {}
        for key, value in data.items():
            name = _without_path(key) if isinstance(key, str) else key
            unique, number = name, 2
            while unique in redacted:
                unique, number = f"{name} ({number})", number + 1
            redacted[unique] = value if key in _TEXT_KEYS else without_paths(value)
        return redacted
    if isinstance(data, list):
        return [without_paths(value) for value in data]
    return _without_path(data) if isinstance(data, str) else data


def _without_path(text: str) -> str:
    """Return a reference without its local folders; text that is no path stays as it is."""
    scheme = next((s for s in ("local-dir:", "file://", "local://") if text.startswith(s)), "")
    bare = text.removeprefix(scheme)
    head, root, option = bare.partition("root=")
    if bare.startswith("torchvision:") and root:
        value, ampersand, others = option.partition("&")
        return head + root + PurePosixPath(value).name + ampersand + others
    path, mark, options = bare.partition("?")
    if PurePosixPath(path).is_absolute() or path.startswith("~"):
        return scheme.replace("//", "") + (PurePosixPath(path).name + mark + options or "/")
    if PureWindowsPath(path).is_absolute():
        return PureWindowsPath(path).name + mark + options
    return text


# --- files that contain paths --------------------------------------------------------------------


def redacted_config(data: dict[str, Any]) -> dict[str, Any]:
    """Return a config as plain data without paths, cluster address and tracking accounts."""
    config: dict[str, Any] = redact_values(without_paths(data))
    config.get("cluster", {}).pop("address", None)
    config.pop("tracking", None)
    return config


def _config(text: str) -> str:
    config = redacted_config(yaml.safe_load(text))
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _json(text: str) -> str:
    return json.dumps(redact_values(without_paths(json.loads(text))), indent=2) + "\n"


def _results(text: str) -> str:
    """Replace the reasons of failures, which contain addresses, by their kind."""
    data = json.loads(text)
    for incident in data.get("incidents", ()):
        incident["reason"] = str(incident["kind"])
    return json.dumps(data, indent=2) + "\n"


_REWRITERS: dict[str, Callable[[str], str]] = {
    "config.yaml": _config,
    "environment.json": _json,
    "open_clip_config.json": _json,
    "results.json": _results,
}
