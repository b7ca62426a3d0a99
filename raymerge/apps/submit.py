"""``raymerge submit``: prepare the config that is sent to a cluster, and check it here first.

One file is sent: the resolved config, with suites, presets, overrides and the lists of text files
written out. Everything it refers to must lie where the cluster's nodes can open it. Jobs themselves
are handled by :mod:`raymerge.distributed.jobs`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from raymerge.apps.peers import open_foreign
from raymerge.config import dump_config, load_config, parse_config
from raymerge.distributed.submission import ADDRESS_VARIABLES, Submission
from raymerge.errors import UserError
from raymerge.files.urls import is_remote, redact_values

_UPLOAD_BYTES = 100 * 1024**2
"""The largest working directory that Ray accepts with a job; more gives HTTP 413."""
_MIB = 1024**2


def dashboard_address(option: str | None) -> str:
    """Return the URL of the cluster's dashboard: the option, else ``ray job submit``'s variable.

    Raises :class:`UserError` if neither is set or it is no such URL.
    """
    variables = (os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name))
    address = option or next(variables, None)
    if address is None:
        raise UserError(
            "--address: missing; give the URL of the cluster's dashboard, such as "
            "http://HEAD:8265, or set RAY_ADDRESS to it"
        )
    if not re.match(r"https?://[^/]", address):
        raise UserError(
            f"address {address}: is not a dashboard's URL; use http://HEAD:8265, HEAD being the "
            "cluster's head node, or this machine with that port forwarded"
        )
    return address.rstrip("/")


def prepare(
    path: str | Path,
    overrides: Iterable[str] = (),
    *,
    root: str | None = None,
    output: str | None = None,
) -> Submission:
    """Return the config for the cluster's nodes; the files it refers to are not opened.

    ``root``: the folder on the cluster from which relative paths start; without it relative paths
    are an error. Raises :class:`UserError`.
    """
    path, overrides = Path(path), tuple(overrides)
    if root is not None and not PurePosixPath(root).is_absolute():
        raise UserError(f"--root {root}: is relative; give an absolute path on the cluster")
    if open_foreign(path, overrides) is not None:
        raise UserError(
            f"config {path}: is another tool's file, and submit takes raymerge's own; use `ray job "
            "submit --working-dir DIR -- python -m raymerge merge` instead"
        )
    # Errors of the config and its paths are raised here, not by the job.
    load_config(path, overrides)  # for its errors, which name the file as the user did
    data = _on_the_cluster(path, overrides, root)
    if output is not None:
        joined = output if root is None or is_remote(output) else f"{root}/{output}"
        data["output"] = output if PurePosixPath(output).is_absolute() else joined
    _require_output(data.get("output"))
    _require_no_secret(data, path)
    # The text that is sent is read back, so that it is known to be a valid config.
    data["cluster"].pop("address", None)  # the job runs on the cluster that it was sent to
    config = parse_config(data, root=Path("/"), source=f"config {path}")
    text = dump_config(config)
    _require_small(text, data, path)
    return Submission(text, str(config.output))


def _on_the_cluster(path: Path, overrides: tuple[str, ...], root: str | None) -> dict[str, Any]:
    """Return the resolved config with relative references taken from ``root``.

    To recognise relative references, the file is loaded with an unusual spelling of its folder,
    with which they then begin.
    """
    folder = path.parent.resolve()
    spelling = folder / ".." / folder.name
    config = load_config(spelling / path.name, overrides)
    data = config.model_dump(mode="json", exclude_none=True)
    moved = _replaced(data, str(spelling), root or "")
    if root is None:
        for key, before, after in _changes(data, moved):
            written = _replaced(before, f"{spelling}/", "") or after
            raise UserError(
                f"config {path}: {key}: {written} starts from a folder of this machine; write the "
                "absolute path that it has on the cluster, or give the folder that relative paths "
                "start from there with --root"
            )
    return dict(moved)


def _replaced(data: Any, old: str, new: str) -> Any:
    """Return plain data with a folder in its strings replaced.

    It is also replaced where it is percent-encoded, as in ``torchvision:…?root=``.
    """
    if isinstance(data, dict):
        return {key: _replaced(value, old, new) for key, value in data.items()}
    if isinstance(data, list):
        return [_replaced(value, old, new) for value in data]
    if not isinstance(data, str):
        return data
    coded_old, coded_new = (quote(folder, safe="/:+ ~") for folder in (old, new))
    return data.replace(old, new).replace(coded_old, coded_new)


def _changes(before: Any, after: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, before, after) of each value that differs between two data of one structure."""
    if isinstance(before, dict):
        for name in before:
            yield from _changes(before[name], after[name], f"{key}.{name}" if key else name)
    elif isinstance(before, list):
        for i, pair in enumerate(zip(before, after, strict=True)):
            yield from _changes(*pair, f"{key}[{i}]")
    elif before != after:
        yield key, before, after


def _require_output(output: str | None) -> None:
    if output is None:
        raise UserError("output: missing; name a folder on the cluster, with --output")
    if is_remote(output):
        raise UserError(
            f"output {output}: is a URL; name a folder that the cluster's nodes have mounted"
        )
    if not PurePosixPath(output).is_absolute():
        raise UserError(
            f"output {output}: is relative; give an absolute path that every node of the cluster "
            "reaches"
        )


def _require_no_secret(data: dict[str, Any], path: Path) -> None:
    """Raise :class:`UserError` for a password: everyone who reaches the cluster can read a job."""
    for key, _, public in _changes(data, redact_values(data)):
        raise UserError(
            f"config {path}: {key}: {public} has a password or a signature, which a job would show "
            "to all users of the cluster; remove it and set the credentials on the nodes"
        )


def _require_small(text: str, data: dict[str, Any], path: Path) -> None:
    size = len(text.encode())
    if size <= _UPLOAD_BYTES:
        return
    lists = {task["name"]: len(str(task)) for task in data["tasks"]}
    largest = sorted(lists, key=lambda name: -lists[name])[:3]
    raise UserError(
        f"config {path}: with its lists written out it has {size / _MIB:.1f} MiB, and Ray accepts "
        f"{_UPLOAD_BYTES / _MIB:.0f} with a job; shorten the class names and templates of "
        + ", ".join(f"{name} ({lists[name] / _MIB:.1f} MiB)" for name in largest)
    )
