"""Pickled modules: the whole encoders and heads that task_vectors and AdaMerging released.

They are opened without their code, and without that of the open_clip of 2022 that they name: see
``unpickle``. Nothing but the pickle itself is read; tensors are read from the file when they are
asked for, in all three containers: torch's zip, its older stream, and a plain ``pickle.dump``,
which holds each storage as a stream of its own.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymerge.errors import CheckpointError, one_line
from raymerge.models.checkpoints.checkpoint import (
    SAFETENSORS_DTYPES,
    TensorSpec,
    open_file,
    read_at,
    state_dict,
)
from raymerge.models.checkpoints.unpickle import (
    Budget,
    Builder,
    DamagedError,
    Machine,
    Name,
    RefusedError,
    Region,
    Source,
    Stand,
    as_key,
)

_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = 30  # bytes, before a record's name and its extra field
_LARGEST_PICKLE = 1 << 28
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_MOST_DIMENSIONS = 64
_MOST_NUMBERS = 1 << 48
_DEEPEST = 100
_PLAIN = (bool, int, float, str)

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


@dataclass(eq=False)
class Storage:
    """Where a tensor's numbers are: ``region`` is known once the pickle has been read."""

    dtype: torch.dtype
    nbytes: int
    region: Region | None = None


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor whose numbers have not been read; ``offset`` and ``strides`` count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def span(self) -> int:
        """From the first number to the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True


class PickledCheckpoint:
    """A pickled module, or a state dict that torch's own safe reader does not take.

    ``kind``: "pickled module", else the container, "torch" or "pickle". ``attributes``: the plain
    values among the module's own. Raises :class:`CheckpointError`, refusing by its name whatever
    else than data the pickle asks for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attributes: Mapping[str, bool | int | float | str] = {}
        try:
            self._file = open_file(path)
            loaded, self.kind = _File(path).load()
            if isinstance(loaded, Stand):
                self._tensors = dict(_module_tensors(loaded))
                self.kind, self.attributes = "pickled module", _attributes(loaded)
        except RefusedError as error:
            raise CheckpointError(f"checkpoint {path}: {error}") from None
        except Exception as error:  # a damaged pickle fails anywhere: KeyError, IndexError, …
            raise CheckpointError(
                f"checkpoint {path}: damaged or not a torch file ({one_line(error)}); fetch it "
                "again"
            ) from error
        if not isinstance(loaded, Stand):
            self._tensors = state_dict(loaded, path, Stored)
        self.specs: Mapping[str, TensorSpec] = {
            key: TensorSpec(t.shape, t.dtype) for key, t in self._tensors.items()
        }

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        stored = self._tensors[key]
        try:
            if stored.contiguous and out_n.dtype == stored.dtype and out_n.is_contiguous():
                self._read(stored, start, out_n)
            elif stored.contiguous:
                values_n = torch.empty(len(out_n), dtype=stored.dtype)
                self._read(stored, start, values_n)
                out_n.copy_(values_n)
            else:
                span_n = torch.empty(stored.span, dtype=stored.dtype)
                self._read(stored, 0, span_n)
                values = span_n.as_strided(stored.shape, stored.strides).reshape(-1)
                out_n.copy_(values[start : start + len(out_n)])
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {self.path}: {key} cannot be read ({one_line(error)}); fetch it again"
            ) from error

    def _read(self, stored: Stored, start: int, out_n: Tensor) -> None:
        region = stored.storage.region
        assert region is not None  # every storage has been placed
        position = region.start + (stored.offset + start) * stored.dtype.itemsize
        if region.memory is None:
            read_at(self._file, position, out_n)
            return
        raw_n = out_n.view(torch.uint8)
        held = memoryview(region.memory)[position : position + len(raw_n)]
        memoryview(raw_n.numpy())[:] = held  # type: ignore[arg-type]


# --- modules ---------------------------------------------------------------------------------


def _module_tensors(module: Stand) -> Iterator[tuple[str, Stored]]:
    """The state dict of a pickled module, by what ``nn.Module`` keeps."""
    if not isinstance(module.get("_parameters"), dict):
        raise RefusedError(f"{module.dotted}, which is neither a state dict nor a torch module")
    budget = Budget()

    def walk(module: Any, prefix: str, depth: int) -> Iterator[tuple[str, Stored]]:
        if depth > _DEEPEST:
            raise DamagedError(f"modules more than {_DEEPEST} deep")
        transient = module.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            for name, value in _named(module, kind, budget):
                if kind == "_buffers" and isinstance(transient, set) and name in transient:
                    continue
                if not isinstance(value, Stored):
                    raise DamagedError(f"{prefix + name!r} is no tensor")
                yield prefix + name, value
        for name, child in _named(module, "_modules", budget):
            if not isinstance(child, Stand):
                raise DamagedError(f"{prefix + name!r} is no module")
            yield from walk(child, f"{prefix}{name}.", depth + 1)

    return walk(module, "", 0)


def _named(module: Stand, kind: str, budget: Budget) -> Iterator[tuple[str, Any]]:
    """What is registered under names, without what is registered as None."""
    held = module.get(kind)
    if held is None:
        return
    if not isinstance(held, dict):
        raise DamagedError(f"{kind} of {module.dotted} is no dict")
    for name, value in held.items():
        budget.spend()
        if not isinstance(name, str):
            raise DamagedError(f"{kind} of {module.dotted} has a name that is no text")
        if value is not None:
            yield name, value


def _attributes(module: Stand) -> dict[str, bool | int | float | str]:
    return {
        key: value
        for state in module.states
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, _PLAIN)
    }


# --- containers ------------------------------------------------------------------------------


class _File:
    """One reading of the file's pickles."""

    def __init__(self, path: Path) -> None:
        self._path, self._budget = path, Budget()
        self._converted = 0

    def load(self) -> tuple[Any, str]:
        """What is in the file, and the kind of container."""
        with self._path.open("rb") as file:
            self._file, self._size = file, os.fstat(file.fileno()).st_size
            zipped = file.read(4) == _ZIP_MAGIC
            if zipped:
                with zipfile.ZipFile(file) as archive:
                    return self._load_zip(archive), "torch"
            source = Source(file, Region(None, 0, self._size))
            first = self._run(source, _no_storage)
            if first == _STREAM_MAGIC and isinstance(first, int):
                return self._load_stream(source), "torch"
            return first, "pickle"

    def _run(self, source: Source, persistent: Callable[[Any], Any], nested: bool = False) -> Any:
        builders = dict(_BUILDERS)
        builders["_codecs.encode"] = self._encode
        builders["builtins.set"] = builders["builtins.frozenset"] = self._set
        if not nested:
            builders["torch.storage._load_from_bytes"] = self._load_bytes
        return Machine(source, self._budget, builders, persistent).run()

    def _load_zip(self, archive: zipfile.ZipFile) -> Any:
        """As ``torch.save`` writes it: the pickle, and one uncompressed record for each storage."""
        records = _Records(archive, self._size)
        root = records.root()
        if records.read(f"{root}/byteorder", b"little") != b"little":
            raise DamagedError("it was written on a big-endian machine")
        content = records.read(f"{root}/data.pkl")
        storages: dict[str, Storage] = {}

        def persistent(given: Any) -> Storage:
            dtype, key, count = _storage_id(given)
            if key not in storages:
                region = records.region(f"{root}/data/{key}")
                storages[key] = Storage(dtype, region.stop - region.start, region)
            return _agreed(storages[key], dtype, count)

        source = Source(io.BytesIO(content), Region(content, 0, len(content)))
        return self._run(source, persistent)

    def _load_stream(self, source: Source, nested: bool = False) -> Any:
        """As older ``torch.save`` wrote it, after the magic number: the pickle, then storages."""
        if self._run(source, _no_storage) != 1001:
            raise DamagedError("an unknown version of torch's old format")
        system = self._run(source, _no_storage)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise DamagedError("it was written on a big-endian machine")
        storages: dict[str, Storage] = {}

        def persistent(given: Any) -> Any:
            if isinstance(given, tuple) and len(given) == 4 and given[0] == "module":
                return given[1]  # a class, with its source code
            if isinstance(given, tuple) and len(given) == 6 and given[5] is None:
                dtype, key, count = _storage_id(given[:5])
                storage = storages.setdefault(key, Storage(dtype, count * dtype.itemsize))
                return _agreed(storage, dtype, count)
            raise RefusedError("an object by an id that is no storage's")

        loaded = self._run(source, persistent, nested)
        keys = self._run(source, _no_storage)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise DamagedError("no list of its storages")
        for key in keys:
            storage = storages[key]
            if source.number(8) * storage.dtype.itemsize != storage.nbytes:
                raise DamagedError("a storage of another size than its tensors")
            storage.region = source.skip(storage.nbytes)
        if any(storage.region is None for storage in storages.values()):
            raise DamagedError("a storage is missing")
        return loaded

    # --- builders that are bounded by the file ---------------------------------------------------

    def _load_bytes(self, content: Any) -> Storage:
        """A storage within a plain pickle."""
        if not isinstance(content, Region):
            raise DamagedError("a storage that is not bytes")
        after = self._file.tell()
        file = self._file if content.memory is None else io.BytesIO(content.memory)
        source = Source(file, content)
        if self._run(source, _no_storage) != _STREAM_MAGIC:
            raise DamagedError("a storage that torch did not write")
        storage = self._load_stream(source, nested=True)
        self._file.seek(after)
        if not isinstance(storage, Storage):
            raise DamagedError("a storage that is something else")
        return storage

    def _encode(self, text: str, encoding: str) -> Region:
        """How protocol 2 writes bytes."""
        if encoding not in ("latin1", "latin-1"):
            raise DamagedError(f"bytes in the encoding {encoding!r:.20}")
        self._converted += len(text)
        if self._converted > self._size:
            raise DamagedError("more bytes than the file holds")
        content = text.encode("latin-1")
        return Region(content, 0, len(content))

    def _set(self, items: list[Any] | tuple[Any, ...] = ()) -> set[Any]:
        self._budget.spend(len(items))
        return {as_key(item) for item in items}


class _Records:
    """The records of a zip: each once, uncompressed, inside the file."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive, self._size = archive, size
        self._infos = {info.filename: info for info in archive.infolist()}
        if len(self._infos) != len(archive.infolist()):
            raise DamagedError("a record is in it twice")

    def root(self) -> str:
        """The folder that all records are in."""
        roots = [name.removesuffix("/data.pkl") for name in self._infos if name.count("/") == 1]
        roots = [root for root in roots if f"{root}/data.pkl" in self._infos]
        if len(set(roots)) != 1:
            raise DamagedError("a zip that torch did not write")
        return roots[0]

    def read(self, name: str, default: bytes | None = None) -> bytes:
        """A small record, its checksum compared."""
        if name not in self._infos and default is not None:
            return default
        if self._info(name).file_size > _LARGEST_PICKLE:
            raise DamagedError(f"{name} is too large")
        return self._archive.read(name)

    def region(self, name: str) -> Region:
        info, file = self._info(name), self._archive.fp
        assert file is not None
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != _ZIP_MAGIC:
            raise DamagedError(f"{name} is not where it should be")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = info.header_offset + _LOCAL_HEADER + lengths
        if start + info.file_size > self._size:
            raise DamagedError(f"{name} ends beyond the file")
        return Region(None, start, start + info.file_size)

    def _info(self, name: str) -> zipfile.ZipInfo:
        info = self._infos[name]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise DamagedError(f"{name} is compressed")
        if info.flag_bits & 1:
            raise DamagedError(f"{name} is encrypted")
        return info


def _no_storage(given: Any) -> Any:
    raise RefusedError("an object by an id, outside of torch's formats")


def _storage_id(given: Any) -> tuple[torch.dtype, str, int]:
    """Dtype, key and count of ``("storage", type, key, location, count)``."""
    if not isinstance(given, tuple) or len(given) != 5 or given[0] != "storage":
        raise RefusedError("an object by an id that is no storage's")
    _, kind, key, _, count = given
    module, _, name = kind.dotted.rpartition(".") if isinstance(kind, Name) else ("", "", "")
    if module not in ("torch", "torch.storage", "torch.cuda") or name not in _STORAGE_DTYPES:
        raise DamagedError("a storage of no known type")
    if not isinstance(key, str) or not _is_count(count):
        raise DamagedError("a storage without a name or a size")
    return _STORAGE_DTYPES[name], key, count


def _agreed(storage: Storage, dtype: torch.dtype, count: int) -> Storage:
    if storage.dtype != dtype or storage.nbytes != count * dtype.itemsize:
        raise DamagedError(
            f"a storage of {storage.nbytes} bytes is said to have {count} numbers of "
            f"{dtype.itemsize} bytes"
        )
    return storage


# --- what stands for the functions that rebuild tensors -----------------------------------------


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_NUMBERS


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None) -> Stored:
    """Raises :class:`DamagedError` for a tensor that reaches out of its storage."""
    if not isinstance(storage, Storage) or not isinstance(shape, tuple):
        raise DamagedError("a tensor without a storage or a shape")
    if not isinstance(strides, tuple) or len(strides) != len(shape):
        raise DamagedError("a tensor whose strides do not fit its shape")
    if len(shape) > _MOST_DIMENSIONS or not all(map(_is_count, (offset, *shape, *strides))):
        raise DamagedError("a tensor whose shape, strides or offset are no sizes")
    stored = Stored(storage, offset, shape, strides, dtype or storage.dtype)
    numbers = math.prod(max(1, size) for size in shape)
    held = storage.nbytes // stored.dtype.itemsize
    if offset + stored.span > held or (0 not in shape and numbers > held):
        raise DamagedError(f"a tensor of {numbers} numbers reaches out of its storage of {held}")
    if numbers >= _MOST_NUMBERS:
        raise DamagedError(f"an empty tensor of {numbers} numbers")
    return stored


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, extra: Any = None
) -> Stored:
    if extra:
        raise DamagedError("a tensor of an uncommon kind")
    return _tensor(storage, offset, shape, strides)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    extra: Any = None,
) -> Stored:
    if extra or dtype not in SAFETENSORS_DTYPES.values():
        raise DamagedError("a tensor of an uncommon kind")
    return _tensor(storage, offset, shape, strides, dtype)


def _parameter(data: Any, _grad: Any, _hooks: Any, _state: Any = None) -> Stored:
    if not isinstance(data, Stored):
        raise DamagedError("a parameter that is no tensor")
    return data


def _subclass(function: Any, _kind: Any, arguments: Any, _state: Any) -> Stored:
    if not isinstance(function, Name) or function.dotted not in _TENSOR_BUILDERS:
        raise RefusedError(f"a tensor from {getattr(function, 'dotted', 'no function')}")
    found: Stored = _TENSOR_BUILDERS[function.dotted](*arguments)
    return found


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    if not isinstance(sizes, tuple | list) or len(sizes) > _MOST_DIMENSIONS:
        raise DamagedError("a torch.Size of no sizes")
    return tuple(sizes)


def _ordered(items: Any = ()) -> dict[Any, Any]:
    if items != ():
        raise DamagedError("an OrderedDict as Python 2 wrote it")
    return {}


_TENSOR_BUILDERS: Mapping[str, Builder] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_BUILDERS: Mapping[str, Builder] = {
    **_TENSOR_BUILDERS,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda factory=None: {},
}
