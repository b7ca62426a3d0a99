"""LoRA adapters as PEFT saves them: θ_k = θ₀ + (α/r)·B·A (LoRA, arXiv:2106.09685, §4.1).

A view over the pretrained model: an adapter's own numbers are small, and one tensor's product of
them is held at a time.

Legend: o rows and i columns of a linear layer's weight, r the rank.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from raymerge.errors import CheckpointError, excerpt
from raymerge.models.checkpoints.checkpoint import Checkpoint, TensorSpec, read_tensor
from raymerge.models.checkpoints.huggingface import name_of
from raymerge.models.checkpoints.locate import read_json

CONFIG_FILE = "adapter_config.json"

_WRAPPER = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_TEXT = re.compile(r"(?:^|\.)text_model\.|(?:^|\.)(text_projection|token_embedding)$")
_LONGEST_PATTERN = 256
_MOST_REPEATS = 3
# A repeated group, or many repeats, can take for ever to fail: no name of modules needs them.
_SLOW = re.compile(r"\)[*+?{]|\(\?|\\[1-9]|\[[^\]]*\[")
_QKV = {"q": 0, "k": 1, "v": 2}

# What an adapter may say that is more than a product of two matrices (PEFT's LoraConfig).
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
    """Whether the keys are of a model that PEFT has wrapped."""
    names = list(keys)
    return any(_LORA.fullmatch(name) for name in names) or (
        bool(names) and all(name.startswith(_WRAPPER) for name in names)
    )


@dataclass(frozen=True)
class _Change:
    """What the adapter does to rows ``part`` of ``parts`` of one of open_clip's tensors.

    ``module``: its name in the adapter's keys. ``factors``: the keys of A and B; else ``whole`` is
    the key of a tensor that replaces the rows. ``transposed``: open_clip keeps the transpose.
    """

    module: str
    factors: tuple[str, str] | None = None
    whole: str | None = None
    scaling: float = 1.0
    transposed: bool = False
    part: int = 0
    parts: int = 1


class LoraCheckpoint:
    """An adapter on its own; ``over`` the pretrained model it is a whole visual tower.

    Raises :class:`CheckpointError`, by its name, for what is no product of two matrices in the
    visual tower.
    """

    kind = "lora"

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.path, self.specs = source, source.path, source.specs
        self._config = self._read_config()
        self._changes = self._collect()

    @property
    def layout(self) -> str:
        modules = [c.module for found in self._changes.values() for c in found if c.factors]
        kinds = ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
        config = self._config
        return f"PEFT, r {config['r']}, alpha {config['lora_alpha']}, {len(modules)} × ({kinds})"

    def _read_config(self) -> Mapping[str, Any]:
        path = self.path.parent / CONFIG_FILE
        if not path.is_file():
            raise self._error(f"is a LoRA adapter, and no {CONFIG_FILE} is beside it; add that")
        config = read_json(path)
        if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
            found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
            raise self._error(f"{CONFIG_FILE} says {found}, and only LORA adapters can be merged")
        for key in _REFUSED:
            if config.get(key):
                raise self._error(
                    f"{CONFIG_FILE} has {key}, which is more than B·A; merge it into its model "
                    "with PEFT first"
                )
        started = str(config.get("init_lora_weights", "")).lower()
        if started.startswith(_CHANGES_BASE):
            raise self._error(
                f"{CONFIG_FILE} has init_lora_weights {started}, which changes the base model too; "
                "save it converted to plain LoRA"
            )
        ranks = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha")}
        for key, value in ranks.items():
            if not _is_positive(value):
                raise self._error(
                    f"{CONFIG_FILE} has {key} {excerpt(value)}, not a positive number"
                )
        for key in ("rank_pattern", "alpha_pattern"):
            if not isinstance(config.get(key) or {}, dict):
                raise self._error(f"{CONFIG_FILE} has {key} {excerpt(config[key])}, not a mapping")
        return config

    def _error(self, text: str) -> CheckpointError:
        return CheckpointError(f"checkpoint {self.path}: {text}")

    # --- from keys to changes ----------------------------------------------------------------

    def _collect(self) -> Mapping[str, tuple[_Change, ...]]:
        """open_clip's names in the visual tower → what is done to them."""
        bare = any(".visual." in key for key in self.specs)
        found: dict[str, list[_Change]] = {}
        for key in sorted(self.specs):
            match = _LORA.fullmatch(key)
            if match is not None and match[2] == "B":
                if f"{match[1]}.lora_A.{key.rpartition('.lora_B.')[2]}" not in self.specs:
                    raise self._error(f"{key} has no lora_A beside it")
                continue
            name, change = self._factors(key, match[1]) if match else self._replacement(key)
            tensor = self._tensor(name, change.module, whole_clip=bare)
            part, parts, transposed = 0, 1, tensor == "proj"
            projection = re.search(r"\.([qkv])_proj\.", name)
            if projection is not None:
                part, parts = _QKV[projection[1]], 3
            found.setdefault(tensor, []).append(
                _Change(
                    change.module,
                    change.factors,
                    change.whole,
                    change.scaling,
                    transposed != self._fan_in(change),
                    part,
                    parts,
                )
            )
        return {tensor: tuple(changes) for tensor, changes in found.items()}

    def _fan_in(self, change: _Change) -> bool:
        return bool(self._config.get("fan_in_fan_out")) and change.factors is not None

    def _factors(self, key: str, wrapped: str) -> tuple[str, _Change]:
        module = _unwrapped(wrapped)
        if wrapped.endswith(".attn") or ".attn.base_layer." in wrapped:
            # Its forward and merge_and_unload add out_proj's product twice (seen in PEFT 0.21).
            raise self._error(
                f"adapts {module.removesuffix('.out_proj')}, an nn.MultiheadAttention, whose "
                "out_proj PEFT does not merge as B·A; merge it into its model with PEFT first"
            )
        a, b = key, f"{wrapped}.lora_B{key.removeprefix(wrapped + '.lora_A')}"
        if b not in self.specs:
            raise self._error(f"{key} has no lora_B beside it")
        if len(self.specs[a].shape) != 2 or len(self.specs[b].shape) != 2:
            raise self._error(f"{module} is no linear layer (a convolution?), and cannot be merged")
        rank = self._pattern("rank_pattern", module, self._config["r"])
        alpha = self._pattern("alpha_pattern", module, self._config["lora_alpha"])
        if self.specs[a].shape[0] != rank or self.specs[b].shape[1] != rank:
            raise self._error(
                f"{module}: {CONFIG_FILE} says rank {rank}, but lora_A is "
                f"{list(self.specs[a].shape)} and lora_B {list(self.specs[b].shape)}"
            )
        root = math.sqrt(rank) if self._config.get("use_rslora") else rank
        return f"{module}.weight", _Change(module, (a, b), None, alpha / root)

    def _pattern(self, section: str, module: str, default: float) -> float:
        """PEFT's rule: the first pattern that is the module's name or ends it."""
        for pattern, value in (self._config.get(section) or {}).items():
            where = f"{CONFIG_FILE}: {section}: {excerpt(pattern)}"
            repeats = sum(pattern.count(mark) for mark in "*+?{")
            if len(pattern) > _LONGEST_PATTERN or repeats > _MOST_REPEATS or _SLOW.search(pattern):
                raise self._error(f"{where}: is no plain pattern; write the modules' names")
            try:
                found = re.match(rf"(.*\.)?({pattern})$", module)
            except (re.error, OverflowError, RecursionError) as error:
                raise self._error(f"{where}: {error}") from error
            if found:
                if not _is_positive(value):
                    raise self._error(f"{where} is {excerpt(value)}, not a positive number")
                return float(value)
        return default

    def _replacement(self, key: str) -> tuple[str, _Change]:
        """A tensor saved whole: a bias that was trained, or one of ``modules_to_save``."""
        name = _unwrapped(key).replace(".modules_to_save.default.", ".")
        name = name.replace(".modules_to_save.", ".").replace(".original_module.", ".")
        if ".lora_" in name:
            raise self._error(f"{key} is more than lora_A and lora_B; it cannot be merged")
        return name, _Change(name.rpartition(".")[0], None, key)

    def _tensor(self, name: str, module: str, *, whole_clip: bool) -> str:
        if _TEXT.search(module):
            raise self._error(
                f"changes the text tower ({module}), and raymerge merges visual towers; train with "
                "target_modules of the vision model only"
            )
        start = name.find("vision_model.")
        in_tower = name_of("vision_model." + name[start + 13 if start >= 0 else 0 :])
        if in_tower is None:
            in_tower = name_of(name[name.find("visual_projection.") :])
        if in_tower is not None and in_tower.startswith("visual."):
            return in_tower.removeprefix("visual.")
        _, seen, own = name.rpartition("visual.")
        if (seen or not whole_clip) and own.startswith("transformer.resblocks."):
            return own
        raise self._error(
            f"changes {module}, which is no linear layer of the visual tower (q_proj, k_proj, "
            "v_proj, out_proj, fc1, fc2, visual_projection, c_fc, c_proj)"
        )

    # --- over the pretrained model -----------------------------------------------------------

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        self.source.fill(key, start, out_n)

    def over(self, base: Checkpoint, prefix: str) -> Checkpoint:
        """θ₀ + the adapter. Raises :class:`CheckpointError` if a size does not fit."""
        for tensor, changes in self._changes.items():
            spec = base.specs.get(prefix + tensor)
            for change in changes:
                self._require_fit(change, tensor, spec)
        return _Adapted(self, base, prefix, self._changes)

    def _require_fit(self, change: _Change, tensor: str, spec: TensorSpec | None) -> None:
        if spec is None:
            raise self._error(
                f"changes {change.module}, but the pretrained model has no {tensor}; is it another "
                "architecture?"
            )
        wanted = (spec.shape[0] // change.parts, *spec.shape[1:])
        if change.transposed:
            wanted = wanted[::-1]
        if change.factors is None:
            assert change.whole is not None
            given = self.specs[change.whole].shape
        else:
            a, b = (self.specs[key].shape for key in change.factors)
            given = (b[0], a[1])
        if given != wanted:
            raise self._error(
                f"{change.module} changes a tensor of shape {list(given)}, the pretrained model's "
                f"is {list(wanted)}; is it another architecture?"
            )

    def change(self, change: _Change, rows: Tensor) -> None:
        """Add to, or replace, ``rows`` (float32), the part of the tensor that is changed."""
        if change.factors is None:
            assert change.whole is not None
            whole = read_tensor(self.source, change.whole, torch.float32)
            rows.copy_(whole.t() if change.transposed else whole)
            return
        a_ri, b_or = (read_tensor(self.source, key, torch.float32) for key in change.factors)
        delta = (b_or @ a_ri).mul_(change.scaling)
        rows.add_(delta.t() if change.transposed else delta)


class _Adapted:
    """The pretrained visual tower with an adapter's changes."""

    kind = LoraCheckpoint.kind

    def __init__(
        self,
        adapter: LoraCheckpoint,
        base: Checkpoint,
        prefix: str,
        changes: Mapping[str, tuple[_Change, ...]],
    ) -> None:
        self.path, self._adapter, self._base = adapter.path, adapter, base
        self._changes = {f"visual.{tensor}": found for tensor, found in changes.items()}
        self._key = {
            "visual." + key.removeprefix(prefix): key
            for key, spec in base.specs.items()
            if key.startswith(prefix) and spec.dtype.is_floating_point
        }
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(base.specs[key].shape, torch.float32)
            if name in self._changes
            else base.specs[key]
            for name, key in self._key.items()
        }
        self._lock, self._held = Lock(), ("", torch.empty(0))

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        if key in self._changes:
            out_n.copy_(self._changed(key)[start : start + len(out_n)])
        else:
            self._base.fill(self._key[key], start, out_n)

    def _changed(self, key: str) -> Tensor:
        """The whole tensor, flat: a product in pieces could differ in its last bits."""
        with self._lock:
            if self._held[0] != key:
                tensor = read_tensor(self._base, self._key[key], torch.float32)
                for change in self._changes[key]:
                    self._adapter.change(change, tensor.chunk(change.parts)[change.part])
                self._held = (key, tensor.reshape(-1))
            return self._held[1]


def _is_positive(value: object) -> bool:
    """Whether it is a number that a float can be, above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= sys.float_info.max


def _unwrapped(key: str) -> str:
    """A module's name in the model that PEFT wrapped."""
    return key.removeprefix(_WRAPPER).replace(".base_layer", "")
