"""Expand ``suite:`` and ``dataset:`` of a config into plain tasks, before validation.

suite: {name: vit-8, checkpoints: "ckpts/{task}/finetuned.pt", data: "data/{task}/{split}"}
tasks: [{name: fashion, dataset: fashion_mnist, test: elsewhere}]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from raymerge.config.methods import Frozen, Reference
from raymerge.config.suites import DATA_SETS, SUITES, DataSet, load_data_set, load_suite
from raymerge.config.wording import explain
from raymerge.errors import ConfigError, excerpt, unknown_name

_FILES = ("checkpoint", "adapt", "test", "train")
"""The keys of a task with files; a task needs at least one of them."""
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def _with_placeholders(pattern: str, needed: Sequence[str]) -> str:
    spelled = ", ".join(f"{{{name}}}" for name in needed)
    names = _PLACEHOLDER.findall(pattern)
    for name in names:
        if name not in needed:
            raise ValueError(f"{{{name}}} in {pattern!r} is unknown (known here: {spelled})")
    for name in needed:
        if name not in names:
            raise ValueError(f"{pattern!r} has no {{{name}}}; write it where the paths differ")
    return pattern


def _with_task(pattern: str) -> str:
    return _with_placeholders(pattern, ("task",))


def _with_task_and_split(pattern: str) -> str:
    return _with_placeholders(pattern, ("task", "split"))


TaskPattern = Annotated[Reference, AfterValidator(_with_task)]
"""A path with ``{task}``."""


class SuiteConfig(Frozen):
    """The ``suite`` section: its name, some of its tasks, and the patterns of their files."""

    name: str
    checkpoints: TaskPattern | None = None
    data: Annotated[Reference, AfterValidator(_with_task_and_split)] | None = None
    """A path with ``{task}`` and ``{split}``, for ``adapt`` and ``test``; without ``checkpoints``,
    for ``train`` and ``test``."""
    adapt: TaskPattern | None = None
    """The pattern of one split instead of ``data``, as the next two; null: no such images."""
    test: TaskPattern | None = None
    train: TaskPattern | None = None
    only: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Some of the suite's tasks; default: all."""

    def images(self, split: str) -> str | None:
        """Return the pattern of one split's folders, with ``{task}`` alone."""
        if split in self.model_fields_set:
            pattern: str | None = getattr(self, split)
            return pattern
        from_data = ("test", "train" if self.checkpoints is None else "adapt")
        if self.data is None or split not in from_data:
            return None
        return self.data.replace("{split}", split)


def with_suites(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return ``data`` with the suite's tasks in place of ``suite``.

    A task that ``data`` lists itself overrides keys of the suite's task of the same name.
    """
    data = dict(data)
    section = data.pop("suite", None)
    tasks = data.get("tasks")
    if isinstance(tasks, list):
        data["tasks"] = [
            _with_data_set(task, f"{source}: tasks[{i}].dataset") for i, task in enumerate(tasks)
        ]
    if section is None or not (tasks is None or isinstance(tasks, list)):
        return data  # validation reports tasks that are no list
    where = f"{source}: suite"
    suite = _parse(section, where)
    data["tasks"] = _override_tasks(_tasks_of(suite, where), data.get("tasks") or [])
    _require_files(data["tasks"], suite, where)
    return data


def _with_data_set(task: Any, where: str) -> Any:
    """Return a task with the class names and templates of its data set, unless it has its own."""
    if not isinstance(task, dict) or "dataset" not in task:
        return task
    task = dict(task)
    name = task.pop("dataset")
    if not isinstance(name, str) or name not in DATA_SETS:
        raise ConfigError(f"{where}: {unknown_name(name, DATA_SETS)}")
    return {**_prompts(load_data_set(name)), **task}


def _prompts(data_set: DataSet) -> dict[str, Any]:
    return {"classnames": list(data_set.classnames), "templates": list(data_set.templates)}


def _parse(section: Any, where: str) -> SuiteConfig:
    if isinstance(section, str):
        section = {"name": section}
    if not isinstance(section, dict):
        raise ConfigError(
            f"{where}: expected a name or a mapping with name, checkpoints, data; "
            f"got {excerpt(section)}"
        )
    try:
        suite = SuiteConfig.model_validate(section)
    except ValidationError as error:
        raise ConfigError(f"{where}.{explain(error, SuiteConfig)}") from None
    if suite.name not in SUITES:
        raise ConfigError(f"{where}.name: {unknown_name(suite.name, SUITES)}")
    return suite


def _tasks_of(suite: SuiteConfig, where: str) -> list[dict[str, Any]]:
    members = SUITES[suite.name]
    for name in suite.only or ():
        if name not in members:
            raise ConfigError(f"{where}.only: {unknown_name(name, members)}")
    names = members if suite.only is None else suite.only
    data_sets = load_suite(suite.name).data_sets
    return [_task(suite, data_set) for data_set in data_sets if data_set.name in names]


def _task(suite: SuiteConfig, data_set: DataSet) -> dict[str, Any]:
    patterns = {
        "checkpoint": suite.checkpoints,
        **{split: suite.images(split) for split in _FILES[1:]},
    }
    files = {
        key: pattern.replace("{task}", data_set.name)
        for key, pattern in patterns.items()
        if pattern is not None
    }
    return {"name": data_set.name, **_prompts(data_set), **files}


def _override_tasks(tasks: Sequence[dict[str, Any]], own: Sequence[Any]) -> list[Any]:
    """Return ``tasks`` with the keys of the ``own`` task of the same name; further ones follow."""
    by_name = {task["name"]: dict(task) for task in tasks}
    names = [task.get("name") if isinstance(task, dict) else None for task in own]
    others = []
    for i, (name, task) in enumerate(zip(names, own, strict=True)):
        if isinstance(name, str) and name in by_name and name not in names[:i]:
            by_name[name].update(task)
        else:  # also a second task of one name: validation reports it
            others.append(task)
    return [*by_name.values(), *others]


def _require_files(tasks: Sequence[Any], suite: SuiteConfig, where: str) -> None:
    """Refuse a suite's task without files: a pattern is missing in the suite."""
    for task in tasks:
        from_suite = isinstance(task, dict) and task.get("name") in SUITES[suite.name]
        if from_suite and not any(task.get(key) for key in _FILES):
            raise ConfigError(
                f"{where}.checkpoints: missing; task {task['name']!r} has neither a checkpoint nor "
                "images; give suite.checkpoints, or suite.data, with {task} for the task's name"
            )
