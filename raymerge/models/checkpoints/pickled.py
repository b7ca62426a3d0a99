"""Pickled modules: the whole encoders and heads that task_vectors and AdaMerging released.

They open without their code, and without the open_clip of 2022 whose classes they name: the pickle
becomes stand-ins (``unpickle``), whose state is read here as ``nn.Module`` stores it. Opening reads
the pickle alone; tensors are read from the file on request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymerge.errors import CheckpointError, one_line
from raymerge.models.checkpoints.checkpoint import (
    TensorSpec,
    open_file,
    read_at,
    read_converted,
    state_dict,
)
from raymerge.models.checkpoints.pickle_containers import PickleFile, StoredTensor
from raymerge.models.checkpoints.unpickle import Budget, DamagedError, RefusedError, StandIn

_MAX_DEPTH = 100
_PLAIN = (bool, int, float, str)


class PickledCheckpoint:
    """A pickled module, or a state dict that torch's own safe loader does not take.

    ``kind``: "pickled module", else the container, "torch" or "pickle". ``attributes``: the plain
    values among a module's attributes. Raises :class:`CheckpointError`, which names whatever the
    pickle asks for besides data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attributes: Mapping[str, bool | int | float | str] = {}
        try:
            self._file = open_file(path)
            value, self.kind = PickleFile(path).load()
            if isinstance(value, StandIn):
                self.kind, self.attributes = "pickled module", _attributes(value)
                value = dict(_module_tensors(value))
        except RefusedError as error:
            raise CheckpointError(f"checkpoint {path}: {error}") from None
        except Exception as error:  # a damaged pickle fails anywhere: KeyError, IndexError, …
            raise CheckpointError(
                f"checkpoint {path}: damaged or not a torch file ({one_line(error)}); fetch it "
                "again"
            ) from error
        self._tensors = state_dict(value, path, StoredTensor)
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


def _module_tensors(module: StandIn) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the state dict of a pickled module, from the dicts that ``nn.Module`` keeps."""
    if not isinstance(module.get("_parameters"), dict):
        raise RefusedError(f"{module.dotted}, which is neither a state dict nor a torch module")
    budget = Budget()

    def walk(module: StandIn, prefix: str, depth: int) -> Iterator[tuple[str, StoredTensor]]:
        if depth > _MAX_DEPTH:
            raise DamagedError(f"modules more than {_MAX_DEPTH} deep")
        # Its own tensors, without the buffers that a state dict leaves out.
        transient = module.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            for name, value in _registered(module, kind, budget):
                if kind == "_buffers" and isinstance(transient, set) and name in transient:
                    continue
                if not isinstance(value, StoredTensor):
                    raise DamagedError(f"{prefix + name!r} is no tensor")
                yield prefix + name, value
        # Those of the modules in it.
        for name, child in _registered(module, "_modules", budget):
            if not isinstance(child, StandIn):
                raise DamagedError(f"{prefix + name!r} is no module")
            yield from walk(child, f"{prefix}{name}.", depth + 1)

    return walk(module, "", 0)


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
