"""mergekit's YAML with the meaning that ``mergekit-pytorch CONFIG OUT`` gives it.

The file becomes coefficients per tensor; the merge is that of :mod:`raymerge.apps.peers.job`.
Written from mergekit's documentation and behaviour; none of its code is used. K models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from raymerge.apps.peers.job import Job
from raymerge.apps.peers.methods import Coefficients, Linear, Method, Tasks, finite_number
from raymerge.apps.peers.state_dicts import Inputs, dtype_named, find, open_state_dict
from raymerge.config.loading import absolute_path
from raymerge.errors import ConfigError, did_you_mean, excerpt


@dataclass(frozen=True)
class _Kind:
    """A ``merge_method``, with the defaults of its parameters."""

    title: str
    defaults: Mapping[str, Any]
    keep: Literal["all", "largest", "random"] = "all"
    elect: bool = False

    @property
    def needs_base(self) -> bool:
        return "lambda" in self.defaults


def _tasks(normalize: bool, rescale: bool) -> dict[str, Any]:
    return {
        "density": 1.0, "normalize": normalize, "rescale": rescale, "lambda": 1.0,
        "int8_mask": False,
    }  # fmt: skip


KINDS: dict[str, _Kind] = {
    "linear": _Kind("Linear", {"normalize": True}),
    "task_arithmetic": _Kind("Task arithmetic", _tasks(normalize=False, rescale=False)),
    "ties": _Kind("TIES", _tasks(normalize=True, rescale=False), "largest", elect=True),
    "dare_linear": _Kind("DARE", _tasks(normalize=False, rescale=True), "random"),
    "dare_ties": _Kind("DARE with TIES", _tasks(normalize=False, rescale=True), "random", True),
}
_KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype")
_OURS = ("output", "seed")
_NO = "cannot be expressed here: "
_TOKENIZER = (
    f"{_NO}vocabularies are not rearranged; remove it: the base's tokenizer files are copied"
)
_NOT_HERE = {
    "slices": f"{_NO}layers cannot be restacked; give models: a list of whole ones",
    "modules": f"{_NO}give models: a list of whole ones",
    "tokenizer_source": _TOKENIZER,
    "tokenizer": _TOKENIZER,
    "chat_template": f"{_NO}remove it, and put the template into the output folder",
}
_MISPLACED = {
    key: f"is a parameter; move it under parameters: {{{key}: …}}"
    for key in ("weight", *_tasks(normalize=False, rescale=False))
}
_BOOLEANS = ("normalize", "rescale", "int8_mask")
_PER_MODEL = ("weight", "density")


def read_mergekit(data: Mapping[str, Any], path: Path, text: str | None) -> Job:
    """Return the merge of a parsed config. ``text``: the file; None if overrides changed it.

    Raises :class:`~raymerge.errors.UserError` for anything that raymerge cannot express, and for
    models that do not fit each other.
    """
    config = _Config.parse(data, f"config {path}")
    inputs = config.open(path.parent)
    names = [entry.name for entry in inputs.entries]
    depth = _depths(names)
    own = {name: config.coefficients(name, depth[name]) for name in names}
    return Job(
        tool="mergekit",
        title=config.title,
        summary=_summary(config, inputs, own, path),
        inputs=inputs,
        method=config.method(own),
        config_name="mergekit_config.yml",
        text=text or yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True),
        output=config.output(path.parent.absolute()),
        tags=("mergekit", str(data["merge_method"])),
    )


@dataclass(frozen=True)
class _Config:
    """The file with its keys checked. ``own``: parameters by model; ``general``: for all."""

    source: str
    name: str
    kind: _Kind
    models: tuple[str, ...]
    base: str | None
    own: Mapping[str, Mapping[str, Any]]
    general: Mapping[str, Any]
    data: Mapping[str, Any]

    @classmethod
    def parse(cls, data: Mapping[str, Any], source: str) -> _Config:
        kind = _kind(data["merge_method"], source)
        _require_known(data, (*_KEYS, *_OURS), source, {**_NOT_HERE, **_MISPLACED})
        models = _models(data.get("models"), source)
        base = data.get("base_model")
        if base is not None and not isinstance(base, str):
            raise ConfigError(f"{source}: base_model: {excerpt(base)} is not a path; write one")
        if base is None and kind.needs_base:
            raise ConfigError(f"{source}: base_model: missing; {data['merge_method']} needs it")
        general = _parameters(data.get("parameters"), kind, f"{source}: parameters")
        own = {
            name: _parameters(settings, kind, f"{source}: models[{i}].parameters", own=True)
            for i, (name, settings) in enumerate(models)
        }
        names = tuple(name for name, _ in models)
        return cls(source, str(data["merge_method"]), kind, names, base, own, general, data)

    @property
    def merged(self) -> tuple[str, ...]:
        """The K models in order; the base is one of them only if it is weighted."""
        if self.kind.needs_base:
            return tuple(name for name in self.models if name != self.base)
        return self.models

    @property
    def weighted(self) -> tuple[str, ...]:
        """The models that have a weight; linear also counts a base that is not listed."""
        extra = self.base is not None and self.base not in self.models and not self.kind.needs_base
        return (*self.merged, *([str(self.base)] if extra else []))

    @property
    def title(self) -> str:
        count = len(self.weighted)
        return f"{count} model{'' if count == 1 else 's'} merged by {self.kind.title}"

    def output(self, root: Path) -> str | None:
        output = self.data.get("output")
        if output is not None and not isinstance(output, str):
            raise ConfigError(f"{self.source}: output: must be a path, got {excerpt(output)}")
        return None if output is None else absolute_path(output, root)

    def open(self, root: Path) -> Inputs:
        """Open the state dicts; the base has a row of its own unless it is one of the models."""
        opened = {
            name: open_state_dict(find(name, root))
            for name in dict.fromkeys([*self.models, *([self.base] if self.base else [])])
        }
        if not self.merged:
            raise ConfigError(
                f"{self.source}: models: lists only the base; nothing to merge; "
                "add a fine-tuned model"
            )
        is_model = self.base in self.models and not self.kind.needs_base
        return Inputs(
            [opened[name] for name in self.merged],
            opened[str(self.base)] if self.base is not None and not is_model else None,
            dtype=dtype_named(self.data.get("dtype"), f"{self.source}: dtype"),
            out=dtype_named(self.data.get("out_dtype"), f"{self.source}: out_dtype"),
            base_named=self.base in self.models,
        )

    def coefficients(self, tensor: str, t: float) -> Coefficients:
        """Return the coefficients of a tensor at depth ``t``. Raises :class:`ConfigError`."""

        def value(key: str, model: str | None = None) -> Any:
            scopes = [self.own.get(model, {})] if model is not None else []
            for scope in (*scopes, self.general):
                setting = _evaluate(scope.get(key), key, tensor, t)
                if setting is not None:
                    return setting
            if key in self.kind.defaults:
                return self.kind.defaults[key]
            whose = f"the base {model}, which linear counts as a model"
            whose = whose if model == self.base else str(model)
            raise ConfigError(
                f"{self.source}: parameters.{key}: missing for {whose} (tensor {tensor}); add it"
            )

        # linear has weights only; the others also densities and options of the whole merge.
        weights = tuple(float(value("weight", model)) for model in self.weighted)
        if not self.kind.needs_base:
            if value("normalize") and not sum(weights):
                raise ConfigError(
                    f"{self.source}: parameters.weight: the weights of {tensor} sum to 0, and "
                    "normalize divides by the sum; set normalize: false"
                )
            return Coefficients(weights, normalize=bool(value("normalize")))
        densities = tuple(float(value("density", model)) for model in self.weighted)
        for density in densities:
            if not 0 <= density <= 1:
                raise ConfigError(
                    f"{self.source}: parameters.density: must be in [0, 1], got {density}"
                )
        return Coefficients(
            weights, densities, bool(value("normalize")), float(value("lambda")),
            bool(value("rescale")),
        )  # fmt: skip

    def method(self, own: Mapping[str, Coefficients]) -> Method:
        if not self.kind.needs_base:
            return Linear(own)
        seed = self.data.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ConfigError(f"{self.source}: seed: must be an integer, got {excerpt(seed)}")
        return Tasks(own, self.kind.keep, self.kind.elect, self.merged, seed)


# --- keys ----------------------------------------------------------------------------------------


def _kind(name: object, source: str) -> _Kind:
    kind = KINDS.get(str(name))
    if kind is None:
        raise ConfigError(
            f"{source}: merge_method: {excerpt(name)} is not among those of mergekit that raymerge "
            f"knows{did_you_mean(name, KINDS)} (known: {', '.join(KINDS)})"
        )
    return kind


def _require_known(
    mapping: Mapping[str, Any], keys: Sequence[str], where: str, not_here: Mapping[str, str] = {}
) -> None:
    for key in mapping:
        if mapping[key] is None:
            continue
        if key in not_here:
            raise ConfigError(f"{where}: {key}: {not_here[key]}")
        if key not in keys:
            hint = did_you_mean(key, keys) or f" (known here: {', '.join(keys)})"
            raise ConfigError(f"{where}: {key}: unknown key{hint}")


def _models(entries: object, source: str) -> list[tuple[str, object]]:
    """Return each model's name and its parameters. Raises :class:`ConfigError`."""
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{source}: models: expected a list of models; got {excerpt(entries)}")
    models: list[tuple[str, object]] = []
    for i, item in enumerate(entries):
        where = f"{source}: models[{i}]"
        if not isinstance(item, Mapping):
            raise ConfigError(f"{where}: expected model and parameters; got {excerpt(item)}")
        _require_known(item, ("model", "parameters"), where, _MISPLACED)
        name = item.get("model")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{where}.model: must be a path, got {excerpt(name)}")
        if name in (other for other, _ in models):
            raise ConfigError(f"{where}.model: {name} is listed twice; add its weights instead")
        models.append((name, item.get("parameters")))
    return models


def _parameters(settings: object, kind: _Kind, where: str, own: bool = False) -> Mapping[str, Any]:
    """Return checked parameters. ``own``: those of one model. Raises :class:`ConfigError`."""
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where}: expected names and values; got {excerpt(settings)}")
    keys = ["weight", *kind.defaults]
    _require_known(settings, keys, where)
    for key, setting in settings.items():
        if own and key not in _PER_MODEL:
            raise ConfigError(f"{where}.{key}: applies to the whole merge; move it to parameters")
        _check_setting(setting, key, f"{where}.{key}")
    return settings


def _check_setting(setting: object, key: str, where: str) -> None:
    """Raise :class:`ConfigError` unless a setting is valid.

    It is a value, a list of values over the layers, or a list of values with a filter each.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if isinstance(setting, list) and any(isinstance(item, Mapping) for item in setting):
        for i, item in enumerate(setting):
            if not isinstance(item, Mapping) or "value" not in item:
                raise ConfigError(f"{where}[{i}]: expected value and filter; got {excerpt(item)}")
            _require_known(item, ("value", "filter"), f"{where}[{i}]")
            if not isinstance(item.get("filter"), str | None):
                raise ConfigError(
                    f"{where}[{i}].filter: must be a text, got {excerpt(item['filter'])}"
                )
            _check_setting(item["value"], key, f"{where}[{i}].value")
        return
    for value in setting if isinstance(setting, list) else [setting]:
        if value is not None and _plain(value, key) is None:
            kind = "true or false" if key in _BOOLEANS else "a number"
            raise ConfigError(f"{where}: must be {kind}, got {excerpt(value)}")


# --- values --------------------------------------------------------------------------------------


def _plain(value: object, key: str) -> Any:
    """Return a number or a truth value, None if it is neither; YAML reads 1e-3 as a text."""
    if key in _BOOLEANS:
        if isinstance(value, str):
            return {"true": True, "false": False}.get(value.lower())
        return bool(value) if isinstance(value, bool | int) and value in (0, 1) else None
    return finite_number(value)


def _evaluate(setting: object, key: str, tensor: str, t: float) -> Any:
    """Return the value for a tensor at depth ``t`` in [0, 1]; None if no filter matches."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return None if setting is None else _plain(setting, key)
    if any(isinstance(item, Mapping) for item in setting):
        for item in setting:
            pattern = item.get("filter")
            if pattern in (None, "*") or pattern in tensor:
                return _evaluate(item["value"], key, tensor, t)
        return None
    return _interpolated([_plain(item, key) for item in setting], key, t) if setting else None


def _interpolated(values: Sequence[Any], key: str, t: float) -> Any:
    if key in _BOOLEANS:
        return values[int(t * (len(values) - 1))]
    position = t * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return (1 - (position - low)) * values[low] + (position - low) * values[high]


_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def _depths(tensors: Sequence[str]) -> dict[str, float]:
    """Return each tensor's depth between the first layer, 0, and the last, 1; 0 outside of layers.

    The layer is the first number in a name; the text before it names the stack.
    """
    matches = {name: _LAYER.search(name) for name in tensors}
    last: dict[str, int] = {}
    for name, match in matches.items():
        if match is not None:
            stack = name[: match.start(1)]
            last[stack] = max(last.get(stack, 0), int(match[1]))

    def depth(name: str, match: re.Match[str] | None) -> float:
        if match is None:
            return 0.0
        end = last[name[: match.start(1)]]
        return int(match[1]) / end if end else 1.0

    return {name: depth(name, match) for name, match in matches.items()}


# --- the merge in words --------------------------------------------------------------------------


def _summary(
    config: _Config, inputs: Inputs, own: Mapping[str, Coefficients], path: Path
) -> tuple[str, ...]:
    count = len(config.weighted)
    base = f" onto base {config.base}" if config.kind.needs_base else ""
    options = _options(config, own)
    lines = [
        f"mergekit config {path}: {config.name} of {count} model{'' if count == 1 else 's'}{base}: "
        + ", ".join(options)
    ]
    each = [_model_options(config, own, k) for k in range(count)]
    if len(set(each)) == 1:
        lines[0] += f"; each {each[0]}"
    else:
        lines += [f"  {model}: {text}" for model, text in zip(config.weighted, each, strict=True)]
    if _has_list(config.data):
        lines.append("  a list is spread over the layers (mergekit-pytorch takes its first value)")
    if config.kind.keep == "random":
        lines.append("  random numbers are raymerge's own: mergekit's masks differ")
    if inputs.left_out:
        lines.append(
            f"  {len(inputs.left_out)} of the base's tensors are in no model and are left out "
            f"({inputs.left_out[0]}{', …' if len(inputs.left_out) > 1 else ''})"
        )
    return tuple(lines)


def _options(config: _Config, own: Mapping[str, Coefficients]) -> list[str]:
    options = [f"normalize {_range(c.normalize for c in own.values())}"]
    if config.kind.needs_base:
        options.append(f"lambda {_range(c.scaling for c in own.values())}")
    if config.kind.keep != "all" and any(c.rescale for c in own.values()):
        options.append(f"rescale {_range(c.rescale for c in own.values())}")
    for key in ("dtype", "out_dtype"):
        if config.data.get(key) is not None:
            options.append(f"{key} {config.data[key]}")
    return options


def _model_options(config: _Config, own: Mapping[str, Coefficients], k: int) -> str:
    text = f"weight {_range(c.weights[k] for c in own.values())}"
    if config.kind.keep != "all":
        text += f", density {_range(c.densities[k] for c in own.values())}"
    return text


def _range(values: Any) -> str:
    """Return the one value of all tensors, or the range of their values."""
    distinct = sorted(set(values))
    texts = [str(v).lower() if isinstance(v, bool) else f"{v:g}" for v in distinct]
    return texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]} by tensor"


def _has_list(node: Any) -> bool:
    """Return True if a parameter is a list of values over the layers."""
    parameters = [node.get("parameters")] + [model.get("parameters") for model in node["models"]]

    def is_list(setting: Any) -> bool:
        if isinstance(setting, Mapping):
            return is_list(setting.get("value"))
        if not isinstance(setting, list):
            return False
        if any(isinstance(item, Mapping) for item in setting):
            return any(is_list(item) for item in setting)
        return len(setting) > 1

    return any(is_list(s) for settings in parameters if settings for s in settings.values())
