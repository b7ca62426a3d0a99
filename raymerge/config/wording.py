"""What is wrong with a config, in one line: the key, the value, the remedy."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from raymerge.config.methods import METHOD_NAMES, MethodConfig
from raymerge.config.schema import (
    ClusterConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    StateConfig,
    TaskConfig,
    VectorsConfig,
)


def explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = _key_path(first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_did_you_mean(first['loc'])}"
    if first["type"] == "missing":
        return f"{key}: missing; this key is required"
    if first["type"] == "too_short" and first["loc"] == ("tasks",):
        return "tasks: the list is empty; merging needs at least one task"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = first["input"].get("name") if isinstance(first["input"], dict) else first["input"]
        guess = difflib.get_close_matches(str(given), METHOD_NAMES, 1)
        hint = f"; did you mean {guess[0]}?" if guess else ""
        return f"method.name: {short(given)} is unknown{hint} (known: {', '.join(METHOD_NAMES)})"
    if first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        return f"{key}: {reason}" if key else reason
    hint = "; put it in quotes" if _is_unquoted(first) else ""
    return f"{key}: {_lower_first(first['msg'])}; got {short(first['input'])}{hint}"


def _is_unquoted(error: Mapping[str, Any]) -> bool:
    """YAML reads a class named 7 as a number, and one named `no` as a boolean."""
    return error["type"] == "string_type" and isinstance(error["input"], int | float)


def _key_path(loc: Sequence[int | str]) -> str:
    """('tasks', 0, 'adapt') → tasks[0].adapt; union tags (a method's name) are left out."""
    parts: list[str] = []
    for i, item in enumerate(loc):
        if isinstance(item, int):
            parts[-1] += f"[{item}]"
        elif not _is_union_tag(loc, i):
            parts.append(item)
    return ".".join(parts)


_UNION_KEYS = {
    "workers", "cpus_per_worker", "gpus_per_worker", "micro_batch", "dtype", "location"
}  # fmt: skip


def _is_union_tag(loc: Sequence[int | str], i: int) -> bool:
    parent = loc[i - 1] if i else None
    if parent == "method":
        return i == 1 and loc[i] in METHOD_NAMES
    return parent in _UNION_KEYS


def _did_you_mean(loc: Sequence[int | str]) -> str:
    fields = sorted(_sibling_fields(loc))
    guess = difflib.get_close_matches(str(loc[-1]), fields, 1)
    return f"; did you mean {guess[0]}?" if guess else f" (known here: {', '.join(fields)})"


def _sibling_fields(loc: Sequence[int | str]) -> Iterable[str]:
    if len(loc) == 1:
        return [*Config.model_fields, "preset"]
    if loc[0] == "method":
        return _method_class(str(loc[1])).model_fields
    sections: dict[str, type[BaseModel]] = {
        "model": ModelConfig,
        "tasks": TaskConfig,
        "optimizer": OptimizerConfig,
        "cluster": ClusterConfig,
        "state": StateConfig,
        "vectors": VectorsConfig,
    }
    return sections[str(loc[0])].model_fields


def _method_class(name: str) -> type[BaseModel]:
    classes: tuple[type[BaseModel], ...] = get_args(get_args(MethodConfig)[0])
    return classes[METHOD_NAMES.index(name)]


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def short(value: object, limit: int = 60) -> str:
    text = reprlib.repr(value)  # bounded: YAML aliases can make a value of any size
    return text if len(text) <= limit else text[: limit - 1] + "…"
