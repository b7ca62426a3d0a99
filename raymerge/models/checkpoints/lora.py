"""LoRA adapters as PEFT saves them: θ_k = θ₀ + (α/r)·B·A (LoRA, arXiv:2106.09685, §4.1).

An adapter alone is only a few small factors. Over the pretrained model it becomes a view of a whole
visual tower, which computes the products when they are read and holds one tensor's at a time.

Legend: o rows and i columns of a linear layer's weight, r the rank.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from raymerge.errors import CheckpointError, excerpt
from raymerge.models.checkpoints.checkpoint import (
    Checkpoint,
    TensorSpec,
    ViewCheckpoint,
    read_tensor,
)
from raymerge.models.checkpoints.huggingface import open_clip_name
from raymerge.models.checkpoints.locate import read_json

CONFIG_FILE = "adapter_config.json"

_WRAPPER = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_TEXT = re.compile(r"(?:^|\.)text_model\.|(?:^|\.)(text_projection|token_embedding)$")
_VISUAL = re.compile(r"(?:^|\.)(?:vision_model|visual_projection|visual)\.")
_MAX_PATTERN_LENGTH = 256
_MAX_PATTERNS = 4096
_MAX_REPEATS = 3
_MAX_MATCHING = 3 * 10**10  # of :func:`_matching_work` in an adapter: about three seconds
# A repeated group, or many repeats, can take for ever to fail; no name of modules needs them.
_SLOW = re.compile(r"\)[*+?{]|\(\?|\\[1-9]|\[[^\]]*\[")
_QKV = {"q": 0, "k": 1, "v": 2}

# Options with which an adapter is more than a product of two matrices (PEFT's LoraConfig).
_REFUSED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "megatron_config",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# These initialisations change the base model as well, which is then not the pretrained one.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def is_adapter(keys: Iterable[str]) -> bool:
    """Return whether the keys are those of a model that PEFT has wrapped."""
    names = list(keys)
    return any(_LORA.fullmatch(name) for name in names) or (
        bool(names) and all(name.startswith(_WRAPPER) for name in names)
    )


def _adapter_prefix(keys: Iterable[str]) -> str:
    """Return what stands in front of the adapter's keys, as training code saves it with others."""
    wrapped = (key.partition(_WRAPPER) for key in keys)
    prefixes = Counter(prefix for prefix, wrapper, _ in wrapped if wrapper)
    return prefixes.most_common(1)[0][0] if prefixes else ""


def _changed_or_visual(specs: Mapping[str, TensorSpec]) -> Mapping[str, TensorSpec]:
    """Return the factors and the visual tensors of a whole wrapped model's state dict, which also
    holds its text tower, and the untrained copies of ``modules_to_save``."""
    return {
        key: spec
        for key, spec in specs.items()
        if _LORA.fullmatch(key) or (_VISUAL.search(key) and not key.endswith("position_ids"))
        if ".original_module." not in key
    }


@dataclass(frozen=True)
class _Change:
    """A change of rows ``part`` of ``parts`` of one of open_clip's tensors.

    ``module``: the changed module, as the adapter names it. ``keys``: of A and B, whose product is
    added; or of one tensor, which replaces the rows. ``is_transposed``: open_clip stores the
    transpose.
    """

    module: str
    keys: tuple[str, ...]
    scaling: float
    is_transposed: bool
    part: int
    parts: int


class LoraCheckpoint:
    """An adapter alone; completed with the pretrained model it is a whole visual tower.

    Raises :class:`CheckpointError` for a change that is not a product of two matrices in the visual
    tower.
    """

    kind = "lora"

    def __init__(self, container: Checkpoint) -> None:
        self.container, self.path = container, container.path
        self._prefix = _adapter_prefix(container.specs)
        self.specs: Mapping[str, TensorSpec] = {
            key.removeprefix(self._prefix): spec
            for key, spec in container.specs.items()
            if key.startswith(self._prefix)
        }
        if any(".base_layer." in key for key in self.specs):
            self.specs = _changed_or_visual(self.specs)
        self._config = self._read_config()
        self._matching = 0
        self.changes = self._collect()

    @property
    def layout(self) -> str:
        """Rank, α and the adapted kinds of modules, for ``raymerge inspect``."""
        products = [c for changes in self.changes.values() for c in changes if len(c.keys) == 2]
        kinds = ", ".join(sorted({change.module.rpartition(".")[2] for change in products}))
        config = self._config
        return f"PEFT, r {config['r']}, alpha {config['lora_alpha']}, {len(products)} × ({kinds})"

    def _read_config(self) -> Mapping[str, Any]:
        path = self.path.parent / CONFIG_FILE
        if not path.is_file():
            raise self._error(f"is a LoRA adapter without {CONFIG_FILE} beside it; add that file")
        config = read_json(path)
        if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
            kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
            raise self._error(f"{CONFIG_FILE} says {kind}, and only LORA adapters can be merged")
        # What the config says beyond B·A would be lost, so it is refused.
        for key in _REFUSED:
            if config.get(key):
                raise self._error(
                    f"{CONFIG_FILE} has {key}, which is more than B·A; merge it into its model "
                    "with PEFT first"
                )
        initialisation = str(config.get("init_lora_weights", "")).lower()
        if initialisation.startswith(_CHANGES_BASE):
            raise self._error(
                f"{CONFIG_FILE} has init_lora_weights {initialisation}, which changes the base "
                "model too; save it converted to plain LoRA"
            )
        # The numbers that the products are scaled by.
        for key in ("r", "lora_alpha"):
            if not _is_positive(config.get(key)):
                value = excerpt(config.get(key))
                raise self._error(f"{CONFIG_FILE} has {key} {value}, not a positive number")
        for key in ("rank_pattern", "alpha_pattern"):
            if not isinstance(config.get(key) or {}, dict):
                raise self._error(f"{CONFIG_FILE} has {key} {excerpt(config[key])}, not a mapping")
            if len(config.get(key) or {}) > _MAX_PATTERNS:
                count = len(config[key])
                raise self._error(
                    f"{CONFIG_FILE} has {count:,} patterns in {key}, more than {_MAX_PATTERNS:,}; "
                    "merge the adapter into its model with PEFT first"
                )
        return config

    def _error(self, text: str) -> CheckpointError:
        return CheckpointError(f"checkpoint {self.path}: {text}")

    # --- from keys to changes --------------------------------------------------------------------

    def _collect(self) -> Mapping[str, list[_Change]]:
        """Return the changes of each tensor, by its open_clip name in the visual tower."""
        is_open_clip = any(".visual." in key for key in self.specs)
        collected: dict[str, list[_Change]] = defaultdict(list)
        for key in sorted(self.specs):
            # A factor B is read together with its A, and must have one.
            match = _LORA.fullmatch(key)
            if match is not None and match[2] == "B":
                if f"{match[1]}.lora_A.{key.rpartition('.lora_B.')[2]}" not in self.specs:
                    raise self._error(f"{key} has no lora_A beside it")
                continue
            keys: tuple[str, ...] = (key,)
            if match is not None:
                name, keys, scaling = self._product(key, match[1])
            else:
                name, scaling = self._replacement(key), 1.0
            # open_clip packs q, k and v into one tensor and stores the projection transposed.
            module = name.rpartition(".")[0]
            tensor = self._tensor(name, module, is_open_clip=is_open_clip)
            qkv = re.search(r"\.([qkv])_proj\.", name)
            part, parts = (_QKV[qkv[1]], 3) if qkv is not None else (0, 1)
            is_fan_in = bool(self._config.get("fan_in_fan_out")) and len(keys) == 2
            is_transposed = (tensor == "proj") != is_fan_in
            change = _Change(module, keys, scaling, is_transposed, part, parts)
            collected[tensor].append(change)
        return collected

    def _product(self, a: str, wrapped: str) -> tuple[str, tuple[str, str], float]:
        """Return the weight that A and B change, the keys of both, and the scaling of B·A."""
        module = _unwrapped(wrapped)
        if wrapped.endswith(".attn") or ".attn.base_layer." in wrapped:
            # Its forward and merge_and_unload add out_proj's product twice (seen in PEFT 0.21).
            raise self._error(
                f"adapts {module.removesuffix('.out_proj')}, an nn.MultiheadAttention, whose "
                "out_proj PEFT does not merge as B·A; merge it into its model with PEFT first"
            )
        b = f"{wrapped}.lora_B{a.removeprefix(wrapped + '.lora_A')}"
        if b not in self.specs:
            raise self._error(f"{a} has no lora_B beside it")
        shapes = self.specs[a].shape, self.specs[b].shape
        if len(shapes[0]) != 2 or len(shapes[1]) != 2:
            raise self._error(f"{module} is no linear layer (a convolution?), and cannot be merged")
        # The rank is stated twice, in the config and by the shapes.
        rank = self._pattern("rank_pattern", module, self._config["r"])
        alpha = self._pattern("alpha_pattern", module, self._config["lora_alpha"])
        if shapes[0][0] != rank or shapes[1][1] != rank:
            raise self._error(
                f"{module}: {CONFIG_FILE} says rank {rank}, but lora_A is {list(shapes[0])} and "
                f"lora_B {list(shapes[1])}"
            )
        divisor = math.sqrt(rank) if self._config.get("use_rslora") else rank
        return f"{module}.weight", (a, b), alpha / divisor

    def _pattern(self, section: str, module: str, default: float) -> float:
        """Return a module's own value: of the first pattern that is its name or ends it, as in
        PEFT."""
        for pattern, value in (self._config.get(section) or {}).items():
            where = f"{CONFIG_FILE}: {section}: {excerpt(pattern)}"
            repeats = sum(pattern.count(mark) for mark in "*+?{")
            is_long = len(pattern) > _MAX_PATTERN_LENGTH or repeats > _MAX_REPEATS
            if is_long or _SLOW.search(pattern):
                raise self._error(f"{where} is no plain pattern; write the modules' names")
            self._matching += _matching_work(pattern, repeats, module)
            if self._matching > _MAX_MATCHING:
                raise self._error(f"{where} takes too long to match; write the modules' names")
            try:
                match = _compiled(pattern).match(module)
            except (re.error, OverflowError, RecursionError) as error:
                raise self._error(f"{where}: {error}") from error
            if match:
                if not _is_positive(value):
                    raise self._error(f"{where} is {excerpt(value)}, not a positive number")
                return float(value)
        return default

    def _replacement(self, key: str) -> str:
        """Return the name of a tensor that is saved whole: a trained bias, or one of
        ``modules_to_save``."""
        name = _unwrapped(key).replace(".modules_to_save.default.", ".")
        name = name.replace(".modules_to_save.", ".").replace(".original_module.", ".")
        if ".lora_" in name:
            raise self._error(f"{key} is more than lora_A and lora_B; it cannot be merged")
        return name

    def _tensor(self, name: str, module: str, *, is_open_clip: bool) -> str:
        """Return open_clip's name, in the visual tower, of a tensor of either library."""
        if _TEXT.search(module):
            raise self._error(
                f"changes the text tower ({module}), and raymerge merges visual towers; train with "
                "target_modules of the vision model only"
            )
        # Hugging Face's names, with or without vision_model in front.
        start = name.find("vision_model.")
        in_tower = open_clip_name("vision_model." + name[start + 13 if start >= 0 else 0 :])
        if in_tower is None:
            in_tower = open_clip_name(name[name.find("visual_projection.") :])
        if in_tower is not None and in_tower.startswith("visual."):
            return in_tower.removeprefix("visual.")
        # open_clip's own names, of a whole CLIP or of its tower alone.
        _, root, own = name.rpartition("visual.")
        if (root or not is_open_clip) and own.startswith("transformer.resblocks."):
            return own
        raise self._error(
            f"changes {excerpt(module)}, which is no linear layer of the visual tower (q_proj, "
            "k_proj, v_proj, out_proj, fc1, fc2, visual_projection, c_fc, c_proj); merge it into "
            "its model with PEFT (merge_and_unload) and give that model, or train without it in "
            "modules_to_save and target_modules"
        )

    # --- over the pretrained model ---------------------------------------------------------------

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        self.container.fill(self._prefix + key, start, out_n)

    def complete(self, base: Checkpoint, prefix: str) -> Checkpoint:
        """Return θ₀ + the adapter. Raises :class:`CheckpointError` if a shape does not fit."""
        for tensor, changes in self.changes.items():
            for change in changes:
                self._require_fit(change, tensor, base.specs.get(prefix + tensor))
        return _AdaptedTower(self, base, prefix)

    def _require_fit(self, change: _Change, tensor: str, spec: TensorSpec | None) -> None:
        if spec is None:
            raise self._error(
                f"changes {change.module}, but the pretrained model has no {tensor}; is it another "
                "architecture?"
            )
        expected = (spec.shape[0] // change.parts, *spec.shape[1:])
        if change.is_transposed:
            expected = expected[::-1]
        shapes = [self.specs[key].shape for key in change.keys]
        shape = (shapes[1][0], shapes[0][1]) if len(shapes) == 2 else shapes[0]
        if shape != expected:
            raise self._error(
                f"{change.module} changes a tensor of shape {list(shape)}, the pretrained model's "
                f"is {list(expected)}; is it another architecture?"
            )

    def apply(self, change: _Change, rows: Tensor) -> None:
        """Add the product to ``rows`` (float32, the changed part of a tensor), or replace them."""
        tensors = [read_tensor(self, key, torch.float32) for key in change.keys]
        if len(tensors) == 1:
            rows.copy_(tensors[0].t() if change.is_transposed else tensors[0])
            return
        a_ri, b_or = tensors
        delta = (b_or @ a_ri).mul_(change.scaling)
        rows.add_(delta.t() if change.is_transposed else delta)


class _AdaptedTower(ViewCheckpoint):
    """The pretrained visual tower with an adapter's changes, as ``visual.*``."""

    def __init__(self, adapter: LoraCheckpoint, base: Checkpoint, prefix: str) -> None:
        origins = {
            "visual." + key.removeprefix(prefix): (base, key)
            for key, spec in base.specs.items()
            if key.startswith(prefix) and spec.dtype.is_floating_point
        }
        super().__init__(adapter.path, adapter.kind, origins)
        self._adapter = adapter
        self._changes = {f"visual.{tensor}": each for tensor, each in adapter.changes.items()}
        changed = {key: TensorSpec(self.specs[key].shape, torch.float32) for key in self._changes}
        self.specs = {**self.specs, **changed}
        self._lock = Lock()
        self._cached_key, self._cached_n = "", torch.empty(0)

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        if key in self._changes:
            out_n.copy_(self._changed(key)[start : start + len(out_n)])
        else:
            super().fill(key, start, out_n)

    def _changed(self, key: str) -> Tensor:
        """Return a whole changed tensor, flat: a product in parts could differ in its last bits."""
        with self._lock:
            if self._cached_key != key:
                tensor = read_tensor(*self._origins[key], torch.float32)
                for change in self._changes[key]:
                    self._adapter.apply(change, tensor.chunk(change.parts)[change.part])
                self._cached_key, self._cached_n = key, tensor.reshape(-1)
            return self._cached_n


@lru_cache(2 * _MAX_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    """Return the expression by which PEFT compares a pattern with a module's name."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _matching_work(pattern: str, repeats: int, name: str) -> int:
    """Return an upper bound of the comparisons that a match of a pattern takes.

    Each repeat, and the one that PEFT puts in front, may end at every letter of the name; each
    alternative of a group may be combined with every one of the others.
    """
    ends = math.comb(len(name) + repeats + 1, repeats + 1)
    groups = 1 + pattern.count("(")
    choices = (1 + pattern.count("|") / groups) ** groups
    return int(ends * choices) * (len(pattern) + 1)


def _is_positive(value: object) -> bool:
    """Return whether a value is a number above 0 that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= sys.float_info.max


def _unwrapped(key: str) -> str:
    """Return a module's name in the model that PEFT wrapped."""
    return key.removeprefix(_WRAPPER).replace(".base_layer", "")
