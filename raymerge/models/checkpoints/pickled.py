"""Torch files: state dicts, nests of them, and pickled modules.

The whole encoders and heads that task_vectors and AdaMerging released open without their code, and
without the open_clip of 2022 whose classes they name: the pickle becomes stand-ins (``unpickle``),
whose state is read here as ``nn.Module`` stores it. Opening reads the pickle alone; tensors are
read from the file on request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymerge.errors import CheckpointError, excerpt, one_line
from raymerge.models.checkpoints.checkpoint import (
    TensorSpec,
    open_file,
    read_at,
    read_converted,
)
from raymerge.models.checkpoints.pickle_containers import (
    Found,
    PickleFile,
    StoredTensor,
    UnreadableTensor,
)
from raymerge.models.checkpoints.recognise import is_training_state
from raymerge.models.checkpoints.unpickle import Budget, DamagedError, RefusedError, StandIn

_MAX_DEPTH = 100
_MAX_LISTED = 1000
_MAX_NAME_BYTES = 1024
_PLAIN = (bool, int, float, str)
_REGISTERED: Mapping[str, tuple[type, ...]] = {
    "_parameters": (StoredTensor, UnreadableTensor),
    "_buffers": (StoredTensor, UnreadableTensor),
    "_modules": (StandIn,),
}


class PickledCheckpoint:
    """A pickled module, state dict, or nest of these; its keys are the paths that lead to tensors.

    ``kind``: "pickled module", else the container, "torch" or "pickle". ``attributes``: the plain
    values among a module's attributes. ``root``: the path in the file to what is opened. Raises
    :class:`CheckpointError`, which names whatever the pickle asks for besides data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attributes: Mapping[str, bool | int | float | str] = {}
        try:
            self._file = open_file(path)
            value, self.kind = PickleFile(path).load()
            value, self.root, found = _innermost(value, dict(_tensors(value, Budget())))
            if isinstance(value, StandIn):
                self.kind, self.attributes = "pickled module", _attributes(value)
        except RefusedError as error:
            raise CheckpointError(f"checkpoint {path}: {error}") from None
        except Exception as error:  # a damaged pickle fails anywhere: KeyError, IndexError, …
            raise CheckpointError(
                f"checkpoint {path}: damaged or not a torch file ({one_line(error)}); fetch it "
                "again"
            ) from error
        self._tensors = _readable(found, value, path)
        self.specs: Mapping[str, TensorSpec] = {
            key: TensorSpec(t.shape, t.dtype) for key, t in self._tensors.items()
        }

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        stored = self._tensors[key]

        def read(values_n: Tensor) -> None:
            if stored.is_contiguous:
                self._read(stored, start, values_n)
                return
            span_n = torch.empty(stored.span, dtype=stored.dtype)
            self._read(stored, 0, span_n)
            flat_n = span_n.as_strided(stored.shape, stored.strides).reshape(-1)
            values_n.copy_(flat_n[start : start + len(values_n)])

        read_converted(out_n, stored.dtype, read, f"checkpoint {self.path}: {key}")

    def _read(self, stored: StoredTensor, start: int, out_n: Tensor) -> None:
        """Fill a contiguous tensor with the numbers from ``start`` on, as they lie in storage."""
        region = stored.storage.region
        assert region is not None  # PickleFile places every storage
        position = region.start + (stored.offset + start) * stored.dtype.itemsize
        if region.memory is None:
            read_at(self._file, position, out_n)
            return
        raw_n = out_n.view(torch.uint8)
        source = memoryview(region.memory)[position : position + len(raw_n)]
        memoryview(raw_n.numpy())[:] = source  # type: ignore[arg-type]


def _readable(found: Mapping[str, Found], value: Any, path: Path) -> Mapping[str, StoredTensor]:
    """Return the tensors if all can be read. Raises :class:`CheckpointError`."""
    if not isinstance(value, Mapping | StandIn) and not found:
        raise CheckpointError(
            f"checkpoint {path}: holds a {type(value).__name__}, not a state dict (name → tensor); "
            "save the model's state_dict()"
        )
    if not found:
        raise CheckpointError(
            f"checkpoint {path}: holds no tensor; expected a state dict, as model.state_dict() "
            "returns it"
        )
    tensors = {key: each for key, each in found.items() if isinstance(each, StoredTensor)}
    unreadable = [
        key for key in sorted(found.keys() - tensors.keys()) if not is_training_state(key)
    ]
    if unreadable:
        raise CheckpointError(
            f"checkpoint {path}: {excerpt(unreadable[0])} is sparse, quantized, nested, "
            "conjugated, packed (float4, bits), expanded or without numbers; save it dense and "
            "contiguous, in float32 or float16"
        )
    return tensors


def _innermost(value: Any, found: dict[str, Found]) -> tuple[Any, str, dict[str, Found]]:
    """Return the only dict or module of a nest that holds tensors, the path to it, and the tensors
    by its names."""
    root = ""
    while isinstance(value, dict):
        nests = {f"{key}.": each for key, each in value.items() if isinstance(each, dict | StandIn)}
        start = next((nest for nest in nests if all(name.startswith(nest) for name in found)), None)
        if start is None or not found or start[:-1] not in value:
            break
        value = nests[start]
        found = {name.removeprefix(start): each for name, each in found.items()}
        root += start
    return value, root, found


def _tensors(value: Any, budget: Budget) -> Iterator[tuple[str, Found]]:
    """Yield the tensors of a pickled value by name, in a nest of dicts and modules.

    A name is the path that leads to the tensor, joined by dots, as in a state dict. Raises
    :class:`RefusedError` for another object, :class:`DamagedError` for one that no program writes.
    """
    if isinstance(value, StandIn) and not _is_module(value):
        raise RefusedError(f"{value.dotted}, which is neither a state dict nor a torch module")

    def walk(value: Any, prefix: str, above: tuple[int, ...]) -> Iterator[tuple[str, Found]]:
        if id(value) in above:  # a dict may hold itself
            return
        if len(above) > _MAX_DEPTH:
            raise DamagedError(f"dicts or modules more than {_MAX_DEPTH} deep")
        for key, entry in _entries(value, budget):
            budget.spend(1 + len(prefix) // _MAX_NAME_BYTES)
            if not isinstance(key, str | int):
                continue
            name = f"{prefix}{key}"
            if len(name) > _MAX_NAME_BYTES:
                raise DamagedError(f"a name of {len(name)} letters, {excerpt(name)}")
            if isinstance(entry, Found):
                yield name, entry
            elif _is_nest(entry):
                yield from walk(entry, f"{name}.", (*above, id(value)))

    return walk(value, "", ()) if _is_nest(value) else iter(())


def _is_nest(value: Any) -> bool:
    """Return whether a value may hold a model: a dict, a module, or a short list of these."""
    is_short = isinstance(value, list | tuple) and len(value) <= _MAX_LISTED
    return isinstance(value, dict) or is_short or _is_module(value)


def _entries(value: Any, budget: Budget) -> Iterable[tuple[Any, Any]]:
    """Return what a nest holds, by name or place."""
    if isinstance(value, StandIn):
        return _module_entries(value, budget)
    return value.items() if isinstance(value, dict) else enumerate(value)


def _is_module(value: Any) -> bool:
    return isinstance(value, StandIn) and isinstance(value.get("_parameters"), dict)


def _module_entries(module: StandIn, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Yield a module's own tensors and the modules in it, as ``nn.Module`` keeps them.

    The buffers that a state dict leaves out are left out.
    """
    transient = module.get("_non_persistent_buffers_set")
    for kind in _REGISTERED:
        for name, value in _registered(module, kind, budget):
            if kind == "_buffers" and isinstance(transient, set) and name in transient:
                continue
            is_expected = isinstance(value, _REGISTERED[kind])
            if not is_expected:
                raise DamagedError(f"{excerpt(name)} in {kind} is a {type(value).__name__}")
            yield name, value


def _registered(module: StandIn, kind: str, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Yield the names and values that are registered with a module, except None."""
    values = module.get(kind)
    if values is None:
        return
    if not isinstance(values, dict):
        raise DamagedError(f"{kind} of {module.dotted} is no dict")
    for name, value in values.items():
        budget.spend()
        if not isinstance(name, str):
            raise DamagedError(f"{kind} of {module.dotted} has a name that is no text")
        if value is not None:
            yield name, value


def _attributes(module: StandIn) -> dict[str, bool | int | float | str]:
    return {
        key: value
        for state in module.states
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, _PLAIN)
    }
