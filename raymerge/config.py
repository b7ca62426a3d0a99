"""The config: typed, frozen, validated once. Past this file there are no dicts.

``load_config`` reads YAML with the safe loader, applies ``-o key.path=value`` overrides and a
preset, checks every key, and makes every path absolute (paths are relative to the config's own
folder). A wrong key or value raises :class:`~raymerge.errors.ConfigError` in one line.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from raymerge.errors import ConfigError

__all__ = [
    "METHOD_NAMES",
    "AdaMerging",
    "Average",
    "ClusterConfig",
    "Config",
    "Individual",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "StateConfig",
    "TaskArithmetic",
    "TaskConfig",
    "Ties",
    "VectorDtype",
    "VectorLocation",
    "VectorsConfig",
    "ZeroShot",
    "dump_config",
    "load_config",
    "parse_config",
]

_TASK_NAME = re.compile(r"[A-Za-z0-9._-]+")
_MODEL_SCHEMES = ("local-dir:", "hf-hub:")
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # hf:…, torchvision:…, s3://… are not local paths

Reference = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
"""A path or what stands for one; no path is empty or holds a zero byte."""
Clamp = Literal["projected", "forward", "none"]
Granularity = Literal["task", "block", "tensor"]
TrimScope = Literal["visual", "full", "tensor"]
VectorDtype = Literal["float32", "bfloat16"]
VectorLocation = Literal["device", "host", "disk"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Frozen):
    """The pretrained model θ₀: which architecture, and where its weights are."""

    arch: str
    """An open_clip architecture, a config JSON, ``local-dir:DIR`` or ``hf-hub:ORG/NAME``."""
    pretrained: str | None = None
    """An open_clip pretrained tag or a checkpoint file; not with ``local-dir:`` or ``hf-hub:``."""

    @property
    def is_folder(self) -> bool:
        return self.arch.startswith(_MODEL_SCHEMES)

    @property
    def reference(self) -> str:
        """What the weights are read from: a file, a folder, a hub id or an open_clip tag."""
        return self.arch if self.pretrained is None else self.pretrained

    @model_validator(mode="after")
    def _weights_come_from_one_place(self) -> ModelConfig:
        if self.is_folder and self.pretrained is not None:
            raise ValueError(
                f"{self.arch} already holds the weights; remove model.pretrained={self.pretrained}"
            )
        if not self.is_folder and self.pretrained is None:
            raise ValueError(
                f"model.arch={self.arch} needs model.pretrained: an open_clip tag or a checkpoint"
            )
        return self


class TaskConfig(_Frozen):
    """One task: its expert, its classes, its images."""

    name: str
    checkpoint: Reference
    classnames: tuple[str, ...] = Field(min_length=2)
    """In class order; in YAML a list, or a text file with one name per line."""
    templates: tuple[str, ...] = Field(default=("a photo of a {}.",), min_length=1)
    adapt: Reference | None = None
    """Unlabeled images: a folder, flat or with one folder per class."""
    test: Reference | None = None
    """Labelled images: one folder per class, named as in ``classnames``."""

    @field_validator("name")
    @classmethod
    def _name_is_a_plain_word(cls, name: str) -> str:
        if not _TASK_NAME.fullmatch(name) or set(name) == {"."}:
            raise ValueError(f"{name!r} is not a task name: use letters, digits, '.', '_' and '-'")
        return name

    @field_validator("templates")
    @classmethod
    def _templates_have_a_place_for_the_class(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} needs exactly one {{}} for the class name")
            try:
                template.format("")
            except (ValueError, KeyError, IndexError):
                raise ValueError(
                    f"template {template!r} has braces besides {{}}; write them as {{{{ and }}}}"
                ) from None
        return templates


class ZeroShot(_Frozen):
    name: Literal["zero_shot"]


class Individual(_Frozen):
    name: Literal["individual"]


class Average(_Frozen):
    name: Literal["average"]


class TaskArithmetic(_Frozen):
    name: Literal["task_arithmetic"]
    scaling: float = 0.3


class Ties(_Frozen):
    name: Literal["ties"]
    density: float = Field(default=0.2, gt=0, le=1)
    scaling: float | None = None
    """Default: 0.3 for ``merge: sum`` (the AdaMerging paper), 1.0 for ``mean`` (the TIES paper)."""
    merge: Literal["sum", "mean"] = "sum"
    trim_scope: TrimScope = "visual"

    @property
    def effective_scaling(self) -> float:
        if self.scaling is not None:
            return self.scaling
        return 0.3 if self.merge == "sum" else 1.0


class AdaMerging(_Frozen):
    name: Literal["adamerging"]
    granularity: Granularity = "tensor"
    task_vectors: Literal["raw", "ties"] = "raw"
    """``ties`` is AdaMerging++: trimmed, sign-agreeing vectors, one coefficient row each."""
    objective: Literal["entropy"] = "entropy"
    init: float = 0.3
    clamp: Clamp = "projected"
    density: float = Field(default=0.2, gt=0, le=1)
    trim_scope: TrimScope = "visual"


MethodConfig = Annotated[
    Union[ZeroShot, Individual, Average, TaskArithmetic, Ties, AdaMerging],  # noqa: UP007
    Field(discriminator="name"),
]
METHOD_NAMES: tuple[str, ...] = tuple(
    get_args(cls.model_fields["name"].annotation)[0] for cls in get_args(get_args(MethodConfig)[0])
)


class OptimizerConfig(_Frozen):
    """Adam on λ. One step uses ``batches`` × ``batch_size`` images of every task."""

    name: Literal["adam"] = "adam"
    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    steps: int = Field(default=500, ge=1)
    batch_size: int = Field(default=16, ge=1)
    batches: int = Field(default=1, ge=1)
    schedule: Literal["constant", "cosine"] = "constant"
    """``cosine``: the rate falls from ``lr`` to 0 over ``steps``, along half a cosine."""

    @field_validator("betas")
    @classmethod
    def _betas_decay(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas {betas} must each lie in [0, 1)")
        return betas

    @property
    def images_per_step(self) -> int:
        return self.batch_size * self.batches


class ClusterConfig(_Frozen):
    """Where the work runs: ``workers: 0`` in this process, else that many Ray actors."""

    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    shards: int = Field(default=1, ge=1)
    """Workers that split one copy of the task vectors; ``workers`` must be a multiple of it."""
    address: str | None = None
    """A running Ray cluster; default: RAY_ADDRESS if set, else a private local one."""
    cpus_per_worker: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    gpus_per_worker: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    micro_batch: Literal["auto", "all"] | Annotated[int, Field(ge=1)] = "auto"
    """Most images in one forward and backward pass. ``auto``: as many as keep the activations
    within a gigabyte on a CPU, all of a worker's images on a GPU."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    load_timeout_s: float = Field(default=3600.0, gt=0)
    step_timeout_s: float = Field(default=600.0, gt=0)

    @model_validator(mode="after")
    def _workers_fill_groups(self) -> ClusterConfig:
        if self.shards > 1 and isinstance(self.workers, int) and self.workers % self.shards:
            raise ValueError(
                f"workers={self.workers} is not a multiple of shards={self.shards}: "
                f"W workers = G groups x S shards; try workers={self.shards}"
            )
        if self.shards > 1 and self.workers == 0:
            raise ValueError(
                f"workers=0 runs in this process, which cannot hold {self.shards} shards"
            )
        return self


class VectorsConfig(_Frozen):
    """How a worker keeps its task vectors: K times the model's size, read twice a step."""

    dtype: VectorDtype | Literal["auto"] = "auto"
    """``auto``: float32 where it fits into memory, else bfloat16 (half the bytes)."""
    location: VectorLocation | Literal["auto"] = "auto"
    """``device``: where the model computes. ``host``: this machine's memory, copied to the GPU
    block by block. ``disk``: a memory-mapped file. ``auto``: the first of these that fits."""
    folder: Reference | None = None
    """Where ``disk`` puts its file, which vanishes with the worker; default: the temporary one."""


class StateConfig(_Frozen):
    """How often λ and the optimiser's moments are saved for ``--resume``."""

    every_steps: int = Field(default=10, ge=1)
    keep: int = Field(default=3, ge=1)


class Config(_Frozen):
    """Everything one merge needs. See ``docs/config.md`` for the same in prose."""

    model: ModelConfig
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    method: MethodConfig = AdaMerging(name="adamerging")
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["float32", "bfloat16"] = "float32"
    vectors: VectorsConfig = VectorsConfig()
    seed: int = Field(default=0, ge=0)
    cluster: ClusterConfig = ClusterConfig()
    state: StateConfig = StateConfig()
    output: Reference | None = None

    @model_validator(mode="after")
    def _tasks_are_distinct(self) -> Config:
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"task {name!r} is listed {names.count(name)} times; names are unique"
                )
        return self

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)


_PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    # The released AdaMerging code: its loop stops after the *second* batch of 16, and it clamps
    # in the forward pass only (methods that have no clamp ignore that default).
    "official": {
        "optimizer": {"batch_size": 16, "batches": 2, "lr": 1e-3, "steps": 500},
        "method": {"clamp": "forward", "init": 0.3},
    },
    # A tenth of the paper's steps: a large rate that falls to zero (benchmarks/schedule.py).
    "fast": {"optimizer": {"batch_size": 16, "lr": 2e-2, "steps": 50, "schedule": "cosine"}},
}


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML config; ``overrides`` are ``key.path=value`` strings, values in YAML.

    Raises :class:`ConfigError` naming the file, the key, the value and the remedy.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path}: not UTF-8 text, so not YAML") from error
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"config {path}: not valid YAML: {_one_line(str(error))}") from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"config {path}: expected keys such as model, tasks, method; found {_short(data)}"
        )
    for override in overrides:
        _apply_override(data, override)
    return parse_config(data, root=path.parent.absolute(), source=f"config {path}")


def parse_config(data: Mapping[str, Any], *, root: Path, source: str = "config") -> Config:
    """Validate a plain dict; relative paths in it are taken from ``root``."""
    data = _with_preset(dict(data), source)
    data = _with_shorthands(data)
    _resolve_paths(data, root, source)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML that ``load_config`` reads back to an equal config."""
    data = config.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


# --- before validation: overrides, presets, shorthands, paths ---------------------------------


def _apply_override(data: dict[str, Any], override: str) -> None:
    key_path, separator, value = override.partition("=")
    if not separator or not key_path:
        raise ConfigError(f"override {override!r}: write it as key.path=value")
    keys = key_path.split(".")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {value!r} is not a YAML value") from error
    node: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        where = ".".join(keys[: depth + 1])
        if isinstance(node, list):
            node = _override_list_item(node, key, where, override, parsed if last else _KEEP)
        elif isinstance(node, dict):
            if last:
                node[key] = parsed
            elif isinstance(node.get(key), str) and key in ("method", "model"):
                node[key] = {"name" if key == "method" else "arch": node[key]}
            node = node.setdefault(key, {})
        else:
            raise ConfigError(f"override {override!r}: {where} is below a plain value")


_KEEP = object()


def _override_list_item(node: list[Any], key: str, where: str, override: str, value: Any) -> Any:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(
            f"override {override!r}: {where}: the list has items 0 to {len(node) - 1}"
        )
    if value is not _KEEP:
        node[int(key)] = value
    return node[int(key)]


def _with_preset(data: dict[str, Any], source: str) -> dict[str, Any]:
    name = data.pop("preset", None)
    if name is None:
        return data
    if not isinstance(name, str) or name not in _PRESETS:
        raise ConfigError(f"{source}: preset: {name!r} is unknown; known: {', '.join(_PRESETS)}")
    data = _with_shorthands(data)
    for section, defaults in _PRESETS[name].items():
        given = data.get(section) or {}
        if not isinstance(given, dict):
            continue  # validation will say so
        if section == "method" and given.get("name", "adamerging") != "adamerging":
            continue
        base = {"name": "adamerging"} if section == "method" else {}
        data[section] = {**base, **defaults, **given}
    return data


def _with_shorthands(data: dict[str, Any]) -> dict[str, Any]:
    """``model: local-dir:x`` and ``method: ties`` are short for the mapping with one key."""
    for section, key in (("model", "arch"), ("method", "name")):
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
            _resolved_task(task, root, f"{source}: tasks[{i}]") if isinstance(task, dict) else task
            for i, task in enumerate(tasks)
        ]
    if isinstance(data.get("output"), str):
        data["output"] = _absolute(data["output"], root)
    vectors = data.get("vectors")
    if isinstance(vectors, dict) and isinstance(vectors.get("folder"), str):
        data["vectors"] = {**vectors, "folder": _absolute(vectors["folder"], root)}


def _resolve_model(model: dict[str, Any], root: Path) -> None:
    arch, pretrained = model.get("arch"), model.get("pretrained")
    if isinstance(arch, str) and (arch.startswith("local-dir:") or arch.endswith(".json")):
        model["arch"] = _absolute(arch, root)
    # A pretrained tag (openai, laion2b_s34b_b79k) has no dot and no slash; a file has one of them.
    if isinstance(pretrained, str) and (
        re.search(r"[./]", pretrained) or (root / pretrained).exists()
    ):
        model["pretrained"] = _absolute(pretrained, root)


def _resolved_task(task: dict[str, Any], root: Path, where: str) -> dict[str, Any]:
    task = dict(task)
    for key in ("checkpoint", "adapt", "test"):
        if isinstance(task.get(key), str):
            task[key] = _absolute(task[key], root)
    for key in ("classnames", "templates"):
        if isinstance(task.get(key), str):
            task[key] = _read_lines(Path(_absolute(task[key], root)), f"{where}.{key}")
    return task


def _absolute(path: str, root: Path) -> str:
    if path.startswith("local-dir:"):
        return "local-dir:" + _absolute(path.removeprefix("local-dir:"), root)
    if not path or _REMOTE.match(path):  # an empty one is refused below, and is not the root
        return path
    return str((root / Path(path).expanduser()).absolute())


def _read_lines(path: Path, where: str) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{where}: {path}: cannot be read: {reason}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ConfigError(f"{where}: {path}: holds no line; write one name per line")
    return names


# --- after validation: errors in one line -----------------------------------------------------


def _explain(error: ValidationError) -> str:
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
        return f"method.name: {_short(given)} is unknown{hint} (known: {', '.join(METHOD_NAMES)})"
    if first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        return f"{key}: {reason}" if key else reason
    hint = "; put it in quotes" if _is_unquoted(first) else ""
    return f"{key}: {_lower_first(first['msg'])}; got {_short(first['input'])}{hint}"


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


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _short(value: object, limit: int = 60) -> str:
    text = reprlib.repr(value)  # bounded: YAML aliases can make a value of any size
    return text if len(text) <= limit else text[: limit - 1] + "…"
