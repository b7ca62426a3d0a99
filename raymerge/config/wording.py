"""The errors of a config's validation in one line: the key, the value, the remedy.

Key paths and proposals are read from ``schema``, the pydantic class of the config as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from raymerge.errors import did_you_mean, excerpt, one_line, shorten, unknown_name

_ALSO_READ = {"Config": ("preset", "suite"), "TaskConfig": ("dataset",)}
"""Keys that loading takes out before validation, by schema."""


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """Return the first error of a validation in one line."""
    # Errors about a key itself: unknown, missing, or a choice that does not exist.
    first = error.errors()[0]
    loc = first["loc"]
    key = _key_path(loc, schema)
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest_key(loc, schema)}"
    if first["type"] == "missing":
        return f"{key}: missing; this key is required"
    if first["type"] == "too_short" and loc == ("tasks",):
        return "tasks: the list is empty; merging needs at least one task"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        name = first["input"].get("name") if isinstance(first["input"], dict) else first["input"]
        return f"{key}.name: {unknown_name(name, map(_tag, _classes_at(loc, schema)))}"

    # Errors about a value: our own validators word theirs; a union has one for each choice.
    if first["type"] == "value_error":
        reason = shorten(str(first["ctx"]["error"]), 400)
        return f"{key}: {reason}" if key else reason
    hint = "; put it in quotes" if _is_unquoted(first) else ""
    messages = [e["msg"] for e in error.errors() if _key_path(e["loc"], schema) == key]
    return f"{key}: {_lower_first(_join(messages))}; got {excerpt(first['input'])}{hint}"


def _join(messages: Sequence[str]) -> str:
    """Return the messages of a union's choices as one: should be 'auto' or a valid integer."""
    start = "Input should be "
    others = [text.removeprefix(start) for text in messages[1:] if text.startswith(start)]
    return " or ".join([messages[0], *others])


def _is_unquoted(error: Mapping[str, Any]) -> bool:
    """Return whether quotes are missing: YAML reads 7 as a number and `no` as a boolean."""
    return error["type"] == "string_type" and isinstance(error["input"], int | float)


def _key_path(loc: Sequence[int | str], schema: type[BaseModel]) -> str:
    """Return tasks[0].adapt for ('tasks', 0, 'adapt'), without the names of a union's choices."""
    parts: list[str] = []
    for i, item in enumerate(loc):
        if isinstance(item, int):
            parts[-1] += f"[{item}]"
        elif _is_key(loc[:i], item, schema):
            parts.append(one_line(item, 60))
    return ".".join(parts)


def _is_key(before: Sequence[int | str], item: str, schema: type[BaseModel]) -> bool:
    """Return whether ``item`` is a key of the config and not the name of a union's choice."""
    if not before:
        return True
    classes = _classes_at(before, schema)
    if item in (_tag(cls) for cls in classes) and len(classes) > 1:
        return False
    return any(True for _ in classes) or isinstance(before[-1], int) or _is_mapping(before, schema)


def _is_mapping(loc: Sequence[int | str], schema: type[BaseModel]) -> bool:
    """Return whether the value at ``loc`` is a mapping with keys that the user chooses."""
    for cls in _classes_at(loc[:-1], schema):
        field = cls.model_fields.get(str(loc[-1]))
        if field is not None:
            return "Mapping" in str(field.annotation) or "dict" in str(field.annotation)
    return False


def _nearest_key(loc: Sequence[int | str], schema: type[BaseModel]) -> str:
    classes = _classes_at(loc[:-1], schema)
    read = [(*cls.model_fields, *_ALSO_READ.get(cls.__name__, ())) for cls in classes]
    fields = sorted({name for names in read for name in names})
    return did_you_mean(loc[-1], fields) or f" (known here: {', '.join(fields)})"


def _classes_at(loc: Sequence[int | str], schema: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the model classes that the value at ``loc`` can have; none for a plain value."""
    classes = [schema]
    for item in loc:
        if isinstance(item, int):
            continue
        tagged = [cls for cls in classes if _tag(cls) == item]
        if len(classes) > 1 and tagged:
            classes = tagged
            continue
        fields = [cls.model_fields[item] for cls in classes if item in cls.model_fields]
        classes = [cls for field in fields for cls in _models_in(field.annotation)]
    return classes


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _tag(cls: type[BaseModel]) -> str:
    """Return the ``name`` by which a union recognises this class."""
    field = cls.model_fields.get("name")
    values = get_args(field.annotation) if field is not None else ()
    return str(values[0]) if values else ""


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
