"""An output folder as the world may see it: no path, no name of a user or of a machine."""

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

_NOT_SHOWN = ("state", "tensorboard", "wandb")
"""Folders of the run itself: what it goes on from, and logs with the machine's name in them."""
_WORDS = ("classnames", "templates", "authors", "license")
"""Keys whose texts are no places, whatever they look like."""


@contextmanager
def public_copy(folder: Path) -> Iterator[Path]:
    """A folder of the same name: links to the files of ``folder``, but for its state and what is
    hidden, and the few that name places written anew. It is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="raymerge-") as made:
        copy = Path(made) / folder.resolve().name
        for file in _shown(folder):
            link = copy / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        for name, rewrite in _REWRITTEN.items():
            if (copy / name).is_file():
                text = rewrite((copy / name).read_text(encoding="utf-8"))
                (copy / name).unlink()
                (copy / name).write_text(text, encoding="utf-8")
        if (copy / "report.html").is_file():
            write_report(copy)  # drawn from the files beside it, it replaces the link
        yield copy


def _shown(folder: Path) -> list[Path]:
    """The files to publish, sorted."""
    files = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if file.is_file() and not hidden and parts[0] not in _NOT_SHOWN:
            files.append(file)
    return files


def without_places(data: Any) -> Any:
    """Plain data with each path of a machine cut to its last name; names that were keys and
    would then be one are numbered."""
    if isinstance(data, dict):
        found: dict[Any, Any] = {}
        for key, value in data.items():
            name = _named(key) if isinstance(key, str) else key
            shown, number = name, 2
            while shown in found:
                shown, number = f"{name} ({number})", number + 1
            found[shown] = value if key in _WORDS else without_places(value)
        return found
    if isinstance(data, list):
        return [without_places(value) for value in data]
    return _named(data) if isinstance(data, str) else data


def _named(text: str) -> str:
    """A reference without where it is on this machine; what is no path stays as it is."""
    scheme = next((s for s in ("local-dir:", "file://", "local://") if text.startswith(s)), "")
    bare = text.removeprefix(scheme)
    head, root, option = bare.partition("root=")
    if bare.startswith("torchvision:") and root:
        value, ampersand, others = option.partition("&")
        return head + root + PurePosixPath(value).name + ampersand + others
    place, mark, options = bare.partition("?")
    if PurePosixPath(place).is_absolute() or place.startswith("~"):
        return scheme.replace("//", "") + (PurePosixPath(place).name + mark + options or "/")
    if PureWindowsPath(place).is_absolute():
        return PureWindowsPath(place).name + mark + options
    return text


# --- the files that name places ------------------------------------------------------------------


def public_config(data: dict[str, Any]) -> dict[str, Any]:
    """A config as plain data without places; nor does it say which cluster ran it, or whose
    account was told."""
    shown: dict[str, Any] = redact_values(without_places(data))
    shown.get("cluster", {}).pop("address", None)
    shown.pop("tracking", None)
    return shown


def _config(text: str) -> str:
    shown = public_config(yaml.safe_load(text))
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def _json(text: str) -> str:
    return json.dumps(redact_values(without_places(json.loads(text))), indent=2) + "\n"


def _results(text: str) -> str:
    """The reasons of failures are sentences with addresses in them: their kind is kept."""
    data = json.loads(text)
    for incident in data.get("incidents", ()):
        incident["reason"] = str(incident["kind"])
    return json.dumps(data, indent=2) + "\n"


_REWRITTEN: dict[str, Callable[[str], str]] = {
    "config.yaml": _config,
    "environment.json": _json,
    "open_clip_config.json": _json,
    "results.json": _results,
}
