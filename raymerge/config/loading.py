"""Load a YAML config: overrides, suites, presets, shorthands and paths, then validation.

The steps work on plain dicts in place; schema.py validates the result once, and wording.py words
its errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import yaml
from pydantic import ValidationError

from raymerge.config.schema import Config
from raymerge.config.suites.expand import with_suites
from raymerge.config.wording import explain
from raymerge.errors import ConfigError, RemoteError, excerpt, one_line, unknown_name
from raymerge.files.atomic import exists
from raymerge.files.urls import is_remote, redact, redact_values

_MOST_VALUES = 1_000_000
_DEEPEST = 100
_ROOT_OPTION = re.compile(r"([?&]root=)([^&]+)")  # of torchvision:NAME:SPLIT?root=DIR
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # hf:…, torchvision:…, s3://… are not local paths

_PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    # The released AdaMerging code: its loop stops after the *second* batch of 16, and it clamps
    # in the forward pass only (methods that have no clamp ignore that default).
    "official": {
        "optimizer": {"batch_size": 16, "batches": 2, "lr": 1e-3, "steps": 500},
        "method": {"clamp": "forward", "init": 0.3},
    },
    # A tenth of the paper's steps: a large rate that falls to zero (benchmarks/schedule.py).
    "fast": {"optimizer": {"batch_size": 16, "lr": 2e-2, "steps": 50, "schedule": "cosine"}},
    # What did best where experts interfere, on embedded worlds (docs/experiments.md, seeds).
    "recommended": {
        "optimizer": {"batch_size": 16, "lr": 2e-2, "steps": 50, "schedule": "cosine"},
        "method": {"task_vectors": "tsv", "clamp": "none", "objective": "kl"},
    },
    # SAMerging (arXiv 2512.21288): the experts as teachers, and sharpness-aware steps.
    "samerging": {
        "optimizer": {"batch_size": 16, "lr": 1e-2, "steps": 100, "sharpness": 0.07},
        "method": {"objective": "kl", "temperature": 2.0, "init": 0.0, "clamp": "none"},
    },
}

YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
"""The errors of the safe loader, which leaves the checks of dates, numbers and keys to Python."""

_SHORT_FOR = {"model": "arch", "method": "name", "suite": "name"}
"""Section → the key that a plain word in place of the section sets."""


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML config; ``overrides`` are ``key.path=value`` strings with values in YAML.

    Raises :class:`ConfigError` naming the file, the key, the value and the remedy.
    """
    path = Path(path)
    source = f"config {path}"
    data = _apply_overrides(read_yaml(path), tuple(overrides), source)
    return parse_config(data, root=path.parent.absolute(), source=source)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raises :class:`ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"config {path}: cannot be read: {error.strerror}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"config {path}: not UTF-8 text, so not YAML; save it as UTF-8"
        ) from error
    try:
        data = _safe_yaml(text)
    except YAML_ERRORS as error:
        raise ConfigError(
            f"config {path}: not valid YAML: {one_line(error, 300)}; correct it"
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"config {path}: expected keys such as model, tasks, method; found {excerpt(data)}"
        )
    return data


def _safe_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises one of :data:`YAML_ERRORS`.

    Deep nesting is refused: the loader's time grows with the square of the depth. So are aliases
    that unfold to more than any config: each is small in the file, and large wherever it is read.
    """
    opened: list[tuple[str | None, int]] = []
    sizes: dict[str, int] = {}
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            sizes |= {anchor: count - before} if anchor else {}
        elif isinstance(event, yaml.AliasEvent):
            count += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            if isinstance(event, yaml.CollectionStartEvent):
                opened.append((event.anchor, count - 1))
        if len(opened) > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} deep")
        if count > _MOST_VALUES:
            raise ValueError(f"it unfolds to more than {_MOST_VALUES:,} values")
    return yaml.safe_load(text)


def parse_config(data: Mapping[str, Any], *, root: Path, source: str = "config") -> Config:
    """Validate a plain dict; relative paths in it are taken from ``root``."""
    data = with_suites(data, source)
    data = _with_preset(data, source)
    data = _with_shorthands(data)
    _resolve_paths(data, root, source)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(redact(f"{source}: {explain(error, Config)}")) from None
    except UnicodeEncodeError as error:
        text = f"{source}: {excerpt(error.object)} holds half of a surrogate pair; remove it"
        raise ConfigError(text) from None


def dump_config(config: Config) -> str:
    """Return YAML that ``load_config`` reads back to an equal config.

    Credentials in URLs are left out.
    """
    data = redact_values(config.model_dump(mode="json", exclude_none=True))
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


# --- before validation: overrides, presets, shorthands, paths ---------------------------------


def _apply_overrides(data: dict[str, Any], overrides: Sequence[str], source: str) -> dict[str, Any]:
    """Apply those of the suite first: the others may name the tasks that it stands for."""
    suite_overrides = [override for override in overrides if re.match(r"suite[.=]", override)]
    for override in suite_overrides:
        apply_override(data, override)
    if data.get("suite") is not None:
        data = with_suites(data, source)
    for override in overrides:
        if override not in suite_overrides:
            apply_override(data, override)
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one value, given as ``key.path=value``, in nested dicts and lists."""
    key_path, separator, value = override.partition("=")
    if not separator or not key_path:
        raise ConfigError(f"override {excerpt(override)}: write it as key.path=value")
    keys = key_path.split(".")
    try:
        parsed = _safe_yaml(value)
    except YAML_ERRORS as error:
        raise ConfigError(
            f"override {excerpt(override)}: {excerpt(value)} is not a YAML value; write it as "
            "key.path=value"
        ) from error
    # Walk to the last key; a mapping is made where there is none yet.
    node: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        where = ".".join(keys[: depth + 1])
        if isinstance(node, list):
            node = _override_list_item(node, key, where, override, parsed if last else _KEEP)
        elif isinstance(node, dict):
            if last:
                node[key] = parsed
            elif isinstance(node.get(key), str) and key in _SHORT_FOR:
                node[key] = {_SHORT_FOR[key]: node[key]}
            node = node.setdefault(key, {})
        else:
            raise ConfigError(
                f"override {excerpt(override)}: {one_line(where, 60)} is below a plain value; "
                "name a key of the config"
            )


_KEEP = object()


def _override_list_item(node: list[Any], key: str, where: str, override: str, value: Any) -> Any:
    if not re.fullmatch(r"[0-9]{1,9}", key) or int(key) >= len(node):
        raise ConfigError(
            f"override {excerpt(override)}: {one_line(where, 60)}: the list has items 0 to "
            f"{len(node) - 1}; write one of these numbers"
        )
    if value is not _KEEP:
        node[int(key)] = value
    return node[int(key)]


def _with_preset(data: dict[str, Any], source: str) -> dict[str, Any]:
    name = data.pop("preset", None)
    if name is None:
        return data
    if not isinstance(name, str) or name not in _PRESETS:
        raise ConfigError(f"{source}: preset: {unknown_name(name, _PRESETS)}")
    data = _with_shorthands(data)
    for section, defaults in _PRESETS[name].items():
        own = data.get(section) or {}
        if not isinstance(own, dict):
            continue  # validation reports it
        if section == "method" and own.get("name", "adamerging") != "adamerging":
            continue
        base = {"name": "adamerging"} if section == "method" else {}
        data[section] = {**base, **defaults, **own}
    return data


def _with_shorthands(data: dict[str, Any]) -> dict[str, Any]:
    """Expand ``model: local-dir:x`` and ``method: ties`` to mappings with one key."""
    for section, key in _SHORT_FOR.items():
        if isinstance(data.get(section), str):
            data[section] = {key: data[section]}
    return data


def _resolve_paths(data: dict[str, Any], root: Path, source: str) -> None:
    model = data.get("model")
    if isinstance(model, dict):
        _resolve_model(model, root)
    tasks = data.get("tasks")
    if isinstance(tasks, list):
        data["tasks"] = [
            _resolve_task(task, root, f"{source}: tasks[{i}]") if isinstance(task, dict) else task
            for i, task in enumerate(tasks)
        ]
    if isinstance(data.get("output"), str):
        data["output"] = absolute_path(data["output"], root)
    for section, key in (("vectors", "folder"), ("method", "checkpoint"), ("method", "start")):
        values = data.get(section)
        if isinstance(values, dict) and isinstance(values.get(key), str):
            data[section] = {**values, key: absolute_path(values[key], root)}


def _resolve_model(model: dict[str, Any], root: Path) -> None:
    arch, pretrained = model.get("arch"), model.get("pretrained")
    if isinstance(arch, str) and (arch.startswith("local-dir:") or arch.endswith(".json")):
        model["arch"] = absolute_path(arch, root)
    # A pretrained tag (openai, laion2b_s34b_b79k) has no dot and no slash; a file has one of them.
    if isinstance(pretrained, str) and (
        re.search(r"[./]", pretrained) or exists(root / pretrained)
    ):
        model["pretrained"] = absolute_path(pretrained, root)


def _resolve_task(task: dict[str, Any], root: Path, where: str) -> dict[str, Any]:
    task = dict(task)
    for key in ("checkpoint", "head", "adapt", "test", "train"):
        if isinstance(task.get(key), str):
            task[key] = absolute_path(task[key], root)
    for key in ("classnames", "templates"):
        if isinstance(task.get(key), str):
            path = _local(absolute_path(task[key], root), f"{where}.{key}")
            task[key] = _read_lines(path, f"{where}.{key}")
    return task


def absolute_path(path: str, root: Path) -> str:
    """Return a path or data reference whose local part starts from ``root``; URLs as they are."""
    if path.startswith("local-dir:"):
        return "local-dir:" + absolute_path(path.removeprefix("local-dir:"), root)
    if path.startswith("torchvision:"):
        return _ROOT_OPTION.sub(
            lambda match: match[1] + quote(absolute_path(unquote(match[2]), root), safe="/:+ ~"),
            path,
        )
    if not path or _REMOTE.match(path):  # an empty path is refused later
        return path
    return str((root / Path(path).expanduser()).absolute())


def _local(reference: str, where: str) -> Path:
    if not is_remote(reference):
        return Path(reference)
    from raymerge.files.remote import fetch

    try:
        return fetch(reference)
    except RemoteError as error:
        raise ConfigError(f"{where}: {error}") from None


def _read_lines(path: Path, where: str) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"{where}: {path}: cannot be read: {error.strerror}; check the path"
        ) from error
    except ValueError as error:  # not UTF-8, or an impossible file name
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "not a valid path"
        raise ConfigError(
            f"{where}: {path}: cannot be read: {reason}; save it as UTF-8 text"
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ConfigError(f"{where}: {path}: has no lines; write one name per line")
    return names
