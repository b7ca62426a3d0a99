"""The three containers of pickled tensors: torch's zip, its older stream, and a plain pickle.

A plain pickle holds each storage as a stream of its own. In all of them the pickle runs on the
machine of ``unpickle``, with the builders at the end of this module; tensors come out as
:class:`StoredTensor`, which says where the numbers lie, and none is read. Every storage is checked
to lie in the file, and every tensor in its storage.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from raymerge.models.checkpoints.checkpoint import is_convertible, is_shape, is_size
from raymerge.models.checkpoints.unpickle import (
    Budget,
    Builder,
    ByteReader,
    DamagedError,
    Machine,
    Name,
    RefusedError,
    Region,
    hashable_key,
)

ZIP_MAGIC = b"PK\x03\x04"
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_VERSION = 1001
_LOCAL_HEADER_BYTES = 30  # before a record's name and its extra field
_MAX_PICKLE_BYTES = 1 << 28

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
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}


@dataclass(eq=False)
class Storage:
    """The numbers that tensors share; ``region`` is known once the pickle has been read."""

    dtype: torch.dtype
    nbytes: int
    region: Region | None = None


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor whose numbers have not been read; ``offset`` and ``strides`` count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def span(self) -> int:
        """The count of numbers from the first to the last one in storage."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True


class UnreadableTensor:
    """A tensor that is no plain array in the file, or one of numbers that torch cannot convert."""


Found: TypeAlias = StoredTensor | UnreadableTensor


class PickleFile:
    """One reading of a file's pickles."""

    def __init__(self, path: Path) -> None:
        self._path, self._budget = path, Budget()
        self._converted_bytes = 0

    def load(self) -> tuple[Any, str]:
        """Return the pickled object and the kind of container: "torch" or "pickle".

        Raises :class:`RefusedError`, or any exception for a damaged file.
        """
        with self._path.open("rb") as file:
            self._file, self._size = file, os.fstat(file.fileno()).st_size
            if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
                with zipfile.ZipFile(file) as archive:
                    return self._load_zip(archive), "torch"
            reader = ByteReader(file, Region(None, 0, self._size))
            value = self._run(reader, _no_storage)
            if value == _STREAM_MAGIC and isinstance(value, int):
                return self._load_stream(reader), "torch"
            return value, "pickle"

    def _run(
        self, reader: ByteReader, persistent: Callable[[Any], Any], is_nested: bool = False
    ) -> Any:
        builders = dict(_BUILDERS)
        builders["_codecs.encode"] = self._encode
        builders["builtins.set"] = builders["builtins.frozenset"] = self._set
        if not is_nested:
            builders["torch.storage._load_from_bytes"] = self._load_bytes
        return Machine(reader, self._budget, builders, persistent).run()

    def _load_zip(self, archive: zipfile.ZipFile) -> Any:
        """Load ``torch.save``'s zip: the pickle, and an uncompressed record for each storage."""
        records = _Records(archive, self._size)
        root = records.root()
        if records.read(f"{root}/byteorder", b"little") != b"little":
            raise DamagedError("it was written on a big-endian machine")
        content = records.read(f"{root}/data.pkl")
        storages: dict[str, Storage] = {}

        def persistent(pid: Any) -> Storage:
            dtype, key, count = _storage_id(pid)
            if key not in storages:
                region = records.region(f"{root}/data/{key}")
                storages[key] = Storage(dtype, region.stop - region.start, region)
            return _require_size(storages[key], dtype, count)

        reader = ByteReader(io.BytesIO(content), Region(content, 0, len(content)))
        return self._run(reader, persistent)

    def _load_stream(self, reader: ByteReader, is_nested: bool = False) -> Any:
        """Load older ``torch.save``'s stream after its magic number: the pickle, then storages."""
        if self._run(reader, _no_storage) != _STREAM_VERSION:
            raise DamagedError("an unknown version of torch's old format")
        system = self._run(reader, _no_storage)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise DamagedError("it was written on a big-endian machine")
        storages: dict[str, Storage] = {}

        def persistent(pid: Any) -> Any:
            if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
                return pid[1]  # a class, with its source code
            if isinstance(pid, tuple) and len(pid) == 6 and pid[5] is None:
                dtype, key, count = _storage_id(pid[:5])
                storage = storages.setdefault(key, Storage(dtype, count * dtype.itemsize))
                return _require_size(storage, dtype, count)
            raise RefusedError("an object by an id that is no storage's")

        value = self._run(reader, persistent, is_nested)
        # The storages follow in the order of a list of their keys.
        keys = self._run(reader, _no_storage)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise DamagedError("no list of its storages")
        for key in keys:
            storage = storages[key]
            if reader.number(8) * storage.dtype.itemsize != storage.nbytes:
                raise DamagedError("a storage of another size than its tensors")
            storage.region = reader.skip(storage.nbytes)
        if any(storage.region is None for storage in storages.values()):
            raise DamagedError("a storage is missing")
        return value

    # --- builders that are bounded by the file ---------------------------------------------------

    def _load_bytes(self, content: Any) -> Storage:
        """Build a storage within a plain pickle: a stream in the pickle's bytes."""
        if not isinstance(content, Region):
            raise DamagedError("a storage that is not bytes")
        position = self._file.tell()
        file = self._file if content.memory is None else io.BytesIO(content.memory)
        reader = ByteReader(file, content)
        if self._run(reader, _no_storage) != _STREAM_MAGIC:
            raise DamagedError("a storage that torch did not write")
        storage = self._load_stream(reader, is_nested=True)
        self._file.seek(position)
        if not isinstance(storage, Storage):
            raise DamagedError("a storage that is something else")
        return storage

    def _encode(self, text: str, encoding: str) -> Region:
        """Build bytes from the text as which protocol 2 writes them."""
        if encoding not in ("latin1", "latin-1"):
            raise DamagedError(f"bytes in the encoding {encoding!r:.20}")
        self._converted_bytes += len(text)
        if self._converted_bytes > self._size:
            raise DamagedError("more bytes than the file holds")
        content = text.encode("latin-1")
        return Region(content, 0, len(content))

    def _set(self, items: list[Any] | tuple[Any, ...] = ()) -> set[Any]:
        self._budget.spend(len(items))
        return {hashable_key(item) for item in items}


class _Records:
    """The records of a zip: each once, uncompressed, inside the file."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive, self._size = archive, size
        self._infos = {info.filename: info for info in archive.infolist()}
        if len(self._infos) != len(archive.infolist()):
            raise DamagedError("a record is in it twice")

    def root(self) -> str:
        """Return the folder that all records are in."""
        roots = [name.removesuffix("/data.pkl") for name in self._infos if name.count("/") == 1]
        roots = [root for root in roots if f"{root}/data.pkl" in self._infos]
        if len(set(roots)) != 1:
            raise DamagedError("a zip that torch did not write")
        return roots[0]

    def read(self, name: str, default: bytes | None = None) -> bytes:
        """Return a small record whole; its checksum is compared."""
        if name not in self._infos and default is not None:
            return default
        if self._info(name).file_size > _MAX_PICKLE_BYTES:
            raise DamagedError(f"{name} is too large")
        return self._archive.read(name)

    def region(self, name: str) -> Region:
        """Return where a record's bytes lie in the file."""
        info, file = self._info(name), self._archive.fp
        assert file is not None
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER_BYTES)
        if len(header) < _LOCAL_HEADER_BYTES or header[:4] != ZIP_MAGIC:
            raise DamagedError(f"{name} is not where the zip says")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = info.header_offset + _LOCAL_HEADER_BYTES + lengths
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


# --- storages ------------------------------------------------------------------------------------


def _no_storage(pid: Any) -> Any:
    raise RefusedError("an object by an id, outside of torch's formats")


def _storage_id(pid: Any) -> tuple[torch.dtype, str, int]:
    """Return dtype, key and count of ``("storage", type, key, location, count)``."""
    if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
        raise RefusedError("an object by an id that is no storage's")
    _, kind, key, _, count = pid
    module, _, name = kind.dotted.rpartition(".") if isinstance(kind, Name) else ("", "", "")
    if module not in ("torch", "torch.storage", "torch.cuda") or name not in _STORAGE_DTYPES:
        raise DamagedError("a storage of no known type")
    if not isinstance(key, str) or not is_size(count):
        raise DamagedError("a storage without a name or a size")
    return _STORAGE_DTYPES[name], key, count


def _require_size(storage: Storage, dtype: torch.dtype, count: int) -> Storage:
    """Return a storage that holds ``count`` numbers. Raises :class:`DamagedError`."""
    if storage.dtype != dtype or storage.nbytes != count * dtype.itemsize:
        raise DamagedError(
            f"a storage of {storage.nbytes} bytes is said to have {count} numbers of "
            f"{dtype.itemsize} bytes"
        )
    return storage


# --- builders: called in place of the functions that rebuild tensors and containers --------------


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None) -> Found:
    """Build a tensor. Raises :class:`DamagedError` if it reaches out of its storage."""
    if not isinstance(storage, Storage) or not isinstance(shape, tuple):
        raise DamagedError("a tensor without a storage or a shape")
    if not isinstance(strides, tuple) or len(strides) != len(shape):
        raise DamagedError("a tensor whose strides do not fit its shape")
    if not is_shape(shape) or not all(map(is_size, (offset, *strides))):
        raise DamagedError("a tensor whose shape, strides or offset are no sizes")
    stored = StoredTensor(storage, offset, shape, strides, dtype or storage.dtype)
    if not is_convertible(stored.dtype):
        return UnreadableTensor()
    numbers = math.prod(max(1, size) for size in shape)
    capacity = storage.nbytes // stored.dtype.itemsize
    if offset + stored.span > capacity:
        raise DamagedError(
            f"a tensor of {numbers} numbers reaches out of its storage of {capacity}"
        )
    is_repeated = 0 not in shape and numbers > capacity
    return UnreadableTensor() if is_repeated else stored


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, *extra: Any
) -> Found:
    tensor = _tensor(storage, offset, shape, strides)
    return UnreadableTensor() if any(extra) else tensor  # conjugated, or negative without a copy


def _tensor_v3(*arguments: Any) -> Found:
    storage, offset, shape, strides, _, _, dtype, *extra = arguments
    if not isinstance(dtype, torch.dtype):
        raise DamagedError("a tensor of no dtype")
    tensor = _tensor(storage, offset, shape, strides, dtype)
    return UnreadableTensor() if any(extra) else tensor


def _unreadable(*arguments: Any) -> UnreadableTensor:
    return UnreadableTensor()


def _parameter(data: Any, _grad: Any, _hooks: Any, _state: Any = None) -> Found:
    if not isinstance(data, Found):
        raise DamagedError("a parameter that is no tensor")
    return data


def _subclass(function: Any, _kind: Any, arguments: Any, _state: Any) -> Found:
    if not isinstance(function, Name) or function.dotted not in _TENSOR_BUILDERS:
        raise RefusedError(f"a tensor from {getattr(function, 'dotted', 'no function')}")
    tensor: Found = _TENSOR_BUILDERS[function.dotted](*arguments)
    return tensor


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    if not is_shape(sizes):
        raise DamagedError("a torch.Size of no sizes")
    return tuple(sizes)


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    if items != ():
        raise DamagedError("an OrderedDict as Python 2 wrote it")
    return {}


_UNREADABLE = (
    "sparse_tensor",
    "sparse_csr_tensor",
    "qtensor",
    "nested_tensor",
    "meta_tensor_no_storage",
    "device_tensor_from_numpy",
    "device_tensor_from_cpu_tensor",
    "wrapper_subclass",
)
_TENSOR_BUILDERS: Mapping[str, Builder] = {
    **{f"torch._utils._rebuild_{kind}": _unreadable for kind in _UNREADABLE},
    "torch.nested._internal.nested_tensor._rebuild_njt": _unreadable,
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
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda factory=None: {},
}
