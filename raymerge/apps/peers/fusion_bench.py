"""fusion_bench's model pools and methods, as a merge of state dicts or a raymerge config.

Written from its documented configs and formulas; none of its code is used. K models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raymerge.apps.peers.job import Job
from raymerge.apps.peers.methods import (
    Coefficients,
    Linear,
    Method,
    Tasks,
    WholeTies,
    finite_number,
    same_everywhere,
)
from raymerge.apps.peers.state_dicts import (
    AdaptedModel,
    Inputs,
    dtype_named,
    find,
    find_local,
    open_state_dict,
)
from raymerge.config import Config
from raymerge.config.loading import absolute_path, parse_config
from raymerge.config.suites import DATA_SETS
from raymerge.errors import ConfigError, did_you_mean, excerpt
from raymerge.files.atomic import exists
from raymerge.models.checkpoints.checkpoint import Checkpoint

_PRETRAINED = "_pretrained_"

_CLASSES = {
    "SimpleAverageAlgorithm": "simple_average",
    "WeightedAverageAlgorithm": "weighted_average",
    "LinearInterpolationAlgorithm": "linear_interpolation",
    "TaskArithmeticAlgorithm": "task_arithmetic",
    "TiesMergingAlgorithm": "ties_merging",
    "CLIPLayerWiseAdaMergingAlgorithm": "clip_layer_wise_adamerging",
    "CLIPTaskWiseAdaMergingAlgorithm": "clip_task_wise_adamerging",
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "simple_average": {},
    "weighted_average": {"weights": None, "normalize": True},
    "linear_interpolation": {"t": 0.5},
    "task_arithmetic": {"scaling_factor": 0.3},
    "ties_merging": {
        "scaling_factor": 0.3,
        "threshold": 20,
        "merge_func": "sum",
        "remove_keys": [],
    },
}
_ADAMERGING: dict[str, Any] = {
    "init_values": 0.3, "lr": 1e-3, "clamp_weights": False, "batch_size": 16, "max_steps": 1000,
    "optimizer": "adam", "weights": None,
}  # fmt: skip
# Options that change how fusion_bench runs, not what it computes.
_IGNORED = (
    "_target_", "_recursive_", "_version_", "name", "show_pbar", "inplace", "verbose",
    "tie_weights", "strict", "devices", "num_workers", "fast_dev_run", "save_merging_weights",
    "cache_dir",
)  # fmt: skip
_CONFIG_KEYS = tuple(Config.model_fields)
_ARCHITECTURES = {
    "clip-vit-base-patch32": "ViT-B-32-quickgelu",
    "clip-vit-base-patch16": "ViT-B-16-quickgelu",
    "clip-vit-large-patch14": "ViT-L-14-quickgelu",
    "ViT-B-32": "ViT-B-32-quickgelu",
    "ViT-B-16": "ViT-B-16-quickgelu",
    "ViT-L-14": "ViT-L-14-quickgelu",
}
_DATA_SETS = {
    "stanford-cars": "cars",
    "oxford_flowers102": "flowers102",
    "oxford-iiit-pet": "oxford_pets",
}
_PATHS = ("pretrained_model_name_or_path", "state_dict_path", "pickle_path", "path", "model_name")
_LORA_LOADER = "load_lora_vision_model_hf"


@dataclass(frozen=True)
class _Pool:
    """The references of a pool's models by name, in order; ``bases``: of those that are adapters,
    the reference of the model that each was trained on."""

    models: Mapping[str, str]
    bases: Mapping[str, str]
    pretrained: str | None
    kind: str
    architecture: str | None
    dtype: object


def read_fusion_bench(data: Mapping[str, Any], path: Path, text: str | None) -> Job | Config:
    """Return the merge of a parsed pool or program config.

    AdaMerging becomes a :class:`Config`, since it learns from images. Raises
    :class:`~raymerge.errors.UserError` for anything that raymerge cannot express.
    """
    # The models and the method, with every interpolation replaced.
    source = f"config {path}"
    try:
        data = _resolved(data, data, (), source)
    except RecursionError:
        raise ConfigError(
            f"{source}: a value refers to itself through ${{…}}; write the value itself"
        ) from None
    pool = _pool(data, source)
    name, options = _method(data.get("method"), source)
    if name.endswith("adamerging"):
        return _adamerging(data, pool, name, options, path)
    # State dicts: the tensors, the coefficients, and the merge in words.
    inputs = _open(pool, name, path.parent, source)
    method, settings = _static(name, options, pool, inputs, source)
    count = len(pool.models)
    onto = f" onto {pool.pretrained}" if inputs.base is not None else ""
    models = f"{count} model{'s' if count > 1 else ''}"
    summary = [f"fusion_bench pool {path}: {name} of {models}{onto}: {settings}"]
    summary += [f"  {model}: {reference}" for model, reference in pool.models.items()]
    summary += [f"  {name} is an adapter over {base}" for name, base in pool.bases.items()]
    if inputs.left_out:
        left_out = len(inputs.left_out)
        summary.append(f"  {left_out} of the base's tensors are in no model and left out")
    output = data.get("output")
    return Job(
        tool="fusion_bench",
        title=f"{count} models merged by {name}",
        summary=tuple(summary),
        inputs=inputs,
        method=method,
        config_name="fusion_bench_config.yaml",
        text=text or yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True),
        output=absolute_path(output, path.parent.absolute()) if isinstance(output, str) else None,
        tags=("fusion_bench", name),
    )


# --- the pool ------------------------------------------------------------------------------------


def _pool(data: Mapping[str, Any], source: str) -> _Pool:
    """Return the pool of the file. Raises :class:`ConfigError`."""
    pool, where = data, source
    if "modelpool" in data:
        pool, where = data["modelpool"], f"{source}: modelpool"
        if not isinstance(pool, Mapping):
            raise ConfigError(f"{where}: expected models; got {excerpt(pool)}")
    # The models, by name; a list has the names inside.
    entries = pool.get("models")
    if entries is None and "defaults" in pool:
        raise ConfigError(
            f"{where}: defaults: Hydra puts this file together from others; give the result "
            "(fusion_bench … --cfg job --resolve)"
        )
    if isinstance(entries, list):
        entries = {str(m.get("name")): m for m in entries if isinstance(m, Mapping)}
    if not isinstance(entries, Mapping) or not entries:
        raise ConfigError(f"{where}: models: expected names and paths; got {excerpt(entries)}")
    paths = {str(k): _reference(v, f"{where}: models.{k}") for k, v in entries.items()}
    models = {k: v for k, v in paths.items() if not (k.startswith("_") and k.endswith("_"))}
    if not models:
        raise ConfigError(
            f"{where}: models: has only {', '.join(paths)}; nothing to merge; "
            "add a fine-tuned model"
        )

    # The dtype, one for all, and the kind of pool.
    dtypes = {_dtype(v) for v in entries.values()} | {_dtype(pool.get("model_kwargs"))}
    dtypes.discard(None)
    if len(dtypes) > 1:
        raise ConfigError(f"{where}: torch_dtype: the models differ; give one for all")
    kind = str(pool.get("_target_") or pool.get("type") or "").rpartition(".")[2]
    bases = {k: str(v["base_model_name"]) for k, v in entries.items() if _is_lora(v)}
    return _Pool(
        models, bases, paths.get(_PRETRAINED), kind,
        _architecture(entries.get(_PRETRAINED)), next(iter(dtypes), None),
    )  # fmt: skip


def _reference(entry: object, where: str) -> str:
    """Return the path of a pool's entry. Raises :class:`ConfigError`."""
    if isinstance(entry, str) and entry:
        return entry
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: expected a path; got {excerpt(entry)}")
    if _is_lora(entry):
        return _adapter(entry, where)
    for key in entry:
        if "peft" in str(key) or "lora" in str(entry[key]).lower():
            raise ConfigError(
                f"{where}: {key}: of adapters, those of {_LORA_LOADER} are merged, with "
                "base_model_name, peft_name and merge_and_unload: true; merge another adapter into "
                "its model with PEFT and give that, or write a raymerge config with its folder as "
                "the task's checkpoint (docs/formats.md)"
            )
    for key in _PATHS:
        if isinstance(entry.get(key), str):
            return str(entry[key])
    raise ConfigError(f"{where}: names no file; give one of {', '.join(_PATHS)}")


def _is_lora(entry: object) -> bool:
    target = entry.get("_target_") if isinstance(entry, Mapping) else None
    return str(target).rpartition(".")[2] == _LORA_LOADER


def _adapter(entry: Mapping[str, Any], where: str) -> str:
    """Return the adapter of an entry. Raises :class:`ConfigError`."""
    for key in ("base_model_name", "peft_name"):
        if not isinstance(entry.get(key), str):
            raise ConfigError(f"{where}.{key}: expected a path; got {excerpt(entry.get(key))}")
    if entry.get("merge_and_unload") is not True:
        raise ConfigError(
            f"{where}.merge_and_unload: {excerpt(entry.get('merge_and_unload', False))} would "
            "average the adapters' factors, whose products are no average; write true"
        )
    return str(entry["peft_name"])


def _dtype(entry: object) -> object:
    if not isinstance(entry, Mapping):
        return None
    dtype = entry.get("torch_dtype") or entry.get("dtype")
    return None if dtype == "auto" else dtype


def _architecture(entry: object) -> str | None:
    """Return open_clip's name of the architecture that an entry mentions, or None."""
    text = entry if isinstance(entry, str) else ""
    if isinstance(entry, Mapping):
        text = " ".join(str(value) for value in entry.values())
    return next((arch for fragment, arch in _ARCHITECTURES.items() if fragment in text), None)


def _open(pool: _Pool, method: str, root: Path, source: str) -> Inputs:
    needs_base = method in ("task_arithmetic", "ties_merging")
    if needs_base and pool.pretrained is None:
        raise ConfigError(f"{source}: models.{_PRETRAINED}: missing; {method} needs it")
    references = dict.fromkeys((*pool.bases.values(), *[str(pool.pretrained)] * needs_base))
    bases = {reference: open_state_dict(find(reference, root)) for reference in references}
    models: list[Checkpoint] = [
        AdaptedModel(find(reference, root), bases[pool.bases[name]])
        if name in pool.bases
        else open_state_dict(find(reference, root))
        for name, reference in pool.models.items()
    ]
    base = bases[str(pool.pretrained)] if needs_base else None
    # A CLIPVisionModelPool loads vision models only, though the files may hold whole ones.
    vision = pool.kind == "CLIPVisionModelPool" and any(
        key.startswith("vision_model.") for model in models for key in model.specs
    )
    return Inputs(
        models, base, out="base", only="vision_model." if vision else "",
        dtype=dtype_named(pool.dtype, f"{source}: torch_dtype"),
    )  # fmt: skip


# --- the method ----------------------------------------------------------------------------------


def _method(entry: object, source: str) -> tuple[str, dict[str, Any]]:
    """Return the method's name and options, with defaults. Raises :class:`ConfigError`."""
    methods = (*_OPTIONS, "clip_layer_wise_adamerging", "clip_task_wise_adamerging")
    if entry is None:
        raise ConfigError(
            f"{source}: method: missing; a pool names the models only: add "
            "-o method=simple_average (or another of " + ", ".join(methods) + ")"
        )
    options = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
    target = str(options.get("_target_") or "").rpartition(".")[2]
    name = _CLASSES.get(target, target) or str(options.get("name"))
    if name not in methods:
        raise ConfigError(
            f"{source}: method: {name!r} is not among those of fusion_bench that raymerge "
            f"knows{did_you_mean(name, methods)} (known: {', '.join(methods)})"
        )
    defaults = _ADAMERGING if name.endswith("adamerging") else _OPTIONS[name]
    for key in options:
        if key not in defaults and key not in _IGNORED:
            hint = did_you_mean(key, defaults)
            raise ConfigError(f"{source}: method.{key}: unknown option of {name}{hint}")
    own = {key: value for key, value in options.items() if key in defaults and value is not None}
    return name, {**defaults, **own}


def _static(
    name: str, options: Mapping[str, Any], pool: _Pool, inputs: Inputs, source: str
) -> tuple[Method, str]:
    """Return the method of a merge of state dicts, and its settings in words."""
    names, count = [entry.name for entry in inputs.entries], len(pool.models)

    def number(key: str) -> float:
        return _number(options[key], f"{source}: method.{key}")

    # Weighted sums of the models.
    if name == "simple_average":
        mean = Coefficients((1.0,) * count, normalize=True)
        return Linear(same_everywhere(names, mean)), f"weight 1/{count} each"
    if name == "linear_interpolation":
        if count != 2:
            raise ConfigError(
                f"{source}: method: {name} merges 2 models; the pool has {count}; "
                "leave the others out"
            )
        t = number("t")
        return Linear(same_everywhere(names, Coefficients((1 - t, t)))), f"t {t:g}"
    if name == "weighted_average":
        weights = _weights(options["weights"], count, source)
        normalize = bool(options["normalize"])
        if normalize and not sum(weights):
            raise ConfigError(f"{source}: method.weights: sum to 0; set normalize: false")
        text = f"weights {', '.join(f'{w:g}' for w in weights)}, normalize {str(normalize).lower()}"
        return Linear(same_everywhere(names, Coefficients(weights, normalize=normalize))), text
    # Sums of task vectors.
    scaling = number("scaling_factor")
    if name == "task_arithmetic":
        own = Coefficients((1.0,) * count, scaling=scaling)
        return Tasks(same_everywhere(names, own)), f"scaling_factor {scaling:g}"
    threshold, merge = number("threshold"), options["merge_func"]
    density = threshold / 100 if threshold > 1 else threshold
    if not 0 < density <= 1:
        raise ConfigError(
            f"{source}: method.threshold: must be above 0 and at most 100, got {threshold:g}"
        )
    if merge not in ("sum", "mean", "max"):
        raise ConfigError(
            f"{source}: method.merge_func: must be sum, mean or max, got {excerpt(merge)}"
        )
    if options["remove_keys"]:
        raise ConfigError(f"{source}: method.remove_keys: cannot be expressed here; remove it")
    text = f"scaling_factor {scaling:g}, threshold {threshold:g}, merge_func {merge}"
    return WholeTies(density, scaling, merge), text


def _number(value: object, where: str) -> float:
    number = finite_number(value)
    if number is None:
        raise ConfigError(f"{where}: {excerpt(value)} is not a number; write a finite one")
    return number


def _weights(values: object, count: int, source: str) -> tuple[float, ...]:
    where = f"{source}: method.weights"
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        raise ConfigError(f"{where}: expected {count} numbers; got {excerpt(values)}")
    return tuple(_number(value, where) for value in values)


# --- AdaMerging as a raymerge config -------------------------------------------------------------


def _adamerging(
    data: Mapping[str, Any], pool: _Pool, name: str, options: Mapping[str, Any], path: Path
) -> Config:
    """Return the config of AdaMerging; the file gives the tasks' images in raymerge's keys."""
    source, root = f"config {path}", path.parent
    if options["weights"] is not None or options["optimizer"] != "adam":
        key = "weights" if options["weights"] is not None else "optimizer"
        raise ConfigError(
            f"{source}: method.{key}: {excerpt(options[key])} cannot be expressed here; remove it"
        )
    # raymerge's own keys, completed from the pool and the method's options.
    own = {key: value for key, value in data.items() if key in _CONFIG_KEYS and key != "method"}
    own["tasks"] = _tasks(own.get("tasks"), pool, root, source)
    own["model"] = _model(own.get("model"), pool, root, source)
    own["method"] = {
        "name": "adamerging",
        "granularity": "tensor" if "layer_wise" in name else "task",
        "init": options["init_values"],
        "clamp": "forward" if options["clamp_weights"] else "none",
    }
    own["optimizer"] = {
        "lr": _number(options["lr"], f"{source}: method.lr"),
        "steps": options["max_steps"],
        "batch_size": options["batch_size"],
        **(own.get("optimizer") or {}),
    }
    own = {key: value for key, value in own.items() if value is not None}
    return parse_config(own, root=root.absolute(), source=source)


def _tasks(entries: object, pool: _Pool, root: Path, source: str) -> list[dict[str, Any]]:
    """Return a task for every model of the pool. Raises :class:`ConfigError`."""
    items = entries if isinstance(entries, list) else []
    tasks = {str(t.get("name")): dict(t) for t in items if isinstance(t, Mapping)}
    for name in pool.models:  # the class names of a data set that raymerge knows
        data_set = _DATA_SETS.get(name, name.replace("-", "_"))
        if data_set in DATA_SETS and "classnames" not in tasks.setdefault(name, {"name": name}):
            tasks[name].setdefault("dataset", data_set)
    no_images = [name for name in pool.models if not tasks.get(name, {}).get("adapt")]
    if no_images:
        raise ConfigError(
            f"{source}: adamerging learns from images, and a pool names none that raymerge can "
            "read: add tasks: [{name, adapt}, …] (test, to score; classnames, where raymerge does "
            "not know them) for " + ", ".join(no_images)
        )
    for name, reference in pool.models.items():
        if pool.bases.get(name, pool.pretrained) != pool.pretrained:
            raise ConfigError(
                f"{source}: models.{name}.base_model_name: {excerpt(pool.bases[name])} is not the "
                f"{_PRETRAINED} model {excerpt(pool.pretrained)}; "
                "an adapter is merged onto its own; write the same in both"
            )
        tasks[name].setdefault("checkpoint", _checkpoint(reference, root))
    return list(tasks.values())


def _model(entry: object, pool: _Pool, root: Path, source: str) -> object:
    """Return the pretrained model of the config. Raises :class:`ConfigError`."""
    if isinstance(entry, str) and ":" in entry:
        return entry
    model = dict(entry) if isinstance(entry, Mapping) else {"arch": entry or pool.architecture}
    if not model.get("arch"):
        raise ConfigError(
            f"{source}: model: missing; add the architecture, e.g. ViT-B-32-quickgelu"
        )
    if "pretrained" not in model and ":" not in str(model["arch"]):
        if pool.pretrained is None:
            raise ConfigError(f"{source}: models.{_PRETRAINED}: missing; adamerging needs it")
        hub = pool.pretrained.startswith("openai/clip-") and not exists(root / pool.pretrained)
        model["pretrained"] = "openai" if hub else _checkpoint(pool.pretrained, root)
    return model


def _checkpoint(reference: str, root: Path) -> str:
    """Return a reference as raymerge's configs write it: a path, or a model of the hub."""
    hub = f"hf-hub:{reference}" if re.fullmatch(r"[\w-]+/[\w.-]+", reference) else reference
    return find_local(reference, root) or hub


# --- ${…} ----------------------------------------------------------------------------------------

_INTERPOLATION = re.compile(r"\$\{([^${}]+)\}")


def _resolved(node: Any, root: Mapping[str, Any], at: tuple[str, ...], source: str) -> Any:
    """Return ``node`` with every ``${key}`` and ``${..key}`` of OmegaConf replaced.

    Raises :class:`ConfigError` if a model or the method needs a value that the file lacks.
    """
    if isinstance(node, Mapping):
        return {k: _resolved(v, root, (*at, str(k)), source) for k, v in node.items()}
    if isinstance(node, list):
        return [_resolved(v, root, (*at, str(i)), source) for i, v in enumerate(node)]
    if not isinstance(node, str) or "${" not in node:
        return node
    needed = at[0] in ("models", "method") or at[:2] == ("modelpool", "models")

    def value(match: re.Match[str]) -> str:
        target = _lookup(match[1], root, at)
        if target is None or isinstance(target, Mapping | list):
            if not needed or at[-1] in _IGNORED:
                return ""
            raise ConfigError(
                f"{source}: {'.'.join(at)}: {match[0]} is not in this file; write its value"
            )
        return str(_resolved(target, root, at, source))

    return _INTERPOLATION.sub(value, node)


def _lookup(key: str, root: Mapping[str, Any], at: tuple[str, ...]) -> Any:
    """Return the value of a key, or None.

    A leading dot starts at the mapping around the value ``at``, each further dot one level up.
    """
    name = key.lstrip(".")
    dots = len(key) - len(name)
    path = [*(at[: len(at) - dots] if dots else ()), *name.split(".")]
    node: Any = root
    for part in path:
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
