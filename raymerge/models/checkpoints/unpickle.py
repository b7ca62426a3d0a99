"""Read a pickle without importing or calling anything that it names.

A pickle is a program for a small stack machine. :class:`Machine` follows those of its instructions
that make plain data. A class or function is only a :class:`Name` here, and an object becomes a
:class:`StandIn`, which holds the object's state and does nothing. The few functions that rebuild
tensors and containers are given to the machine by ``pickle_containers``.

A hostile pickle is bounded: work and memory by ``_MAX_STEPS``, nothing recurses, and no length is
believed before the file is seen to be that long.
"""

from __future__ import annotations

import pickle
import re
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

Builder = Callable[..., Any]

_MAX_STEPS = 1_000_000  # a ViT-L/14 as a pickled module takes about 20,000
_MAX_STATES = 8
_MAX_NAME_LENGTH = 256
_MAX_KEY_PARTS = 64
_LARGEST_KEY = 1 << 60  # beyond it, numbers can be chosen to have one hash
_LARGEST_PART = 1 << 20  # in a tuple: with larger ones, tuples of one hash can be computed
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*", re.ASCII)

_ALLOWED_PACKAGES = ("torch", "torchvision", "open_clip", "clip", "src", "PIL", "numpy", "timm")
"""A pickle may name anything directly in a module of these packages."""
_ALLOWED_NAMES = {
    "argparse": {"Namespace"},
    "builtins": {
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list",
        "object", "range", "set", "slice", "str", "tuple",
    },
    "_codecs": {"encode"},
    "collections": {"Counter", "OrderedDict", "defaultdict", "deque"},
    "copyreg": {"_reconstructor"},
    "functools": {"partial"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
}  # fmt: skip
_ALLOWED_CALLS = {
    "collections.deque",
    "functools.partial",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.device",
    "torch.serialization._get_layout",
}
"""Besides classes (names in capitals): a call of one of these makes a stand-in."""


class RefusedError(Exception):
    """The pickle asks for something that no checkpoint needs."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"refused: the pickle wants {what}, and running code from a checkpoint is unsafe; "
            "save its state_dict instead"
        )


class DamagedError(Exception):
    """The pickle contains something that no program writes."""


@dataclass(frozen=True)
class Name:
    """A class or function by its dotted name; it is never imported."""

    dotted: str


@dataclass(eq=False)
class StandIn:
    """An object's replacement: the name of its class, and the state that the pickle sets."""

    dotted: str
    states: list[Mapping[Any, Any]] = field(default_factory=list, repr=False)

    def get(self, key: str) -> Any:
        """Return an attribute, or None if the object has none of that name."""
        return next((state[key] for state in reversed(self.states) if key in state), None)


@dataclass(frozen=True, eq=False)
class Region:
    """Bytes ``start:stop`` of ``memory``, or of the file if that is None; they are not read yet."""

    memory: bytes | None = field(repr=False)
    start: int
    stop: int


class ByteReader:
    """Reads the bytes of a region in order, and never beyond its end."""

    def __init__(self, file: BinaryIO, region: Region) -> None:
        self._file, self.memory, self._stop = file, region.memory, region.stop
        file.seek(region.start)

    def take(self, count: int) -> bytes:
        self._require(count)
        return self._file.read(count)

    def skip(self, count: int) -> Region:
        """Return the next bytes as a region, without reading them."""
        self._require(count)
        start = self._file.tell()
        self._file.seek(start + count)
        return Region(self.memory, start, start + count)

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def text(self, size: int) -> str:
        """Return a text whose length stands in the ``size`` bytes before it."""
        return self.take(self.number(size)).decode()

    def line(self) -> str:
        line = self._file.readline(_MAX_NAME_LENGTH)
        if not line.endswith(b"\n"):
            raise DamagedError("a name without an end")
        return line[:-1].decode()

    def _require(self, count: int) -> None:
        remaining = self._stop - self._file.tell()
        if count < 0 or count > remaining:
            raise DamagedError(f"it ends early: {count} bytes needed, {max(0, remaining)} left")


@dataclass
class Budget:
    """The steps that all pickles of a file may still take together."""

    steps: int = _MAX_STEPS

    def spend(self, steps: int = 1) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise DamagedError(f"it takes more than {_MAX_STEPS} steps")


class Machine:
    """The stack machine for one pickle.

    ``builders``: functions that are called in place of these names. ``persistent``: returns the
    object of a persistent id. Both may raise as :meth:`run` does.
    """

    def __init__(
        self,
        reader: ByteReader,
        budget: Budget,
        builders: Mapping[str, Builder],
        persistent: Callable[[Any], Any],
    ) -> None:
        self._reader, self._budget = reader, budget
        self._builders, self._persistent = builders, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Return the pickled object. Raises :class:`RefusedError`, or any exception for a damaged
        pickle."""
        while (code := self._reader.take(1)) != pickle.STOP:
            self._budget.spend()
            if code in _CONSTANTS:
                self._stack.append(_CONSTANTS[code])
            elif code in _ARGUMENTS:
                self._stack.append(_ARGUMENTS[code](self._reader))
            elif code in _INSTRUCTIONS:
                _INSTRUCTIONS[code](self)
            else:
                raise DamagedError(f"instruction {code!r} is in no checkpoint")
        return self._stack.pop()

    # --- the stack and the memo ------------------------------------------------------------------

    def _proto(self) -> None:
        version = self._reader.number(1)
        if version > pickle.HIGHEST_PROTOCOL:
            raise DamagedError(f"pickle protocol {version} is unknown")

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _push(self, item: Any) -> None:
        self._stack.append(item)

    def _pop(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _take(self, count: int) -> list[Any]:
        """Remove and return the topmost items."""
        if count > len(self._stack):
            raise DamagedError("it takes more from the stack than there is")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _take_marked(self) -> list[Any]:
        """Remove and return the items above the last mark."""
        mark = self._marks.pop()
        if mark > len(self._stack):
            raise DamagedError("a mark above the stack")
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _get(self, size: int) -> None:
        self._push(self._memo[self._reader.number(size)])

    def _put(self, size: int) -> None:
        self._memo[self._reader.number(size)] = self._stack[-1]

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    # --- containers ------------------------------------------------------------------------------

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, StandIn):
            raise DamagedError(f"appends to a {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            _filled(target, items)
        elif not isinstance(target, StandIn):
            raise DamagedError(f"sets items of a {type(target).__name__}")

    def _add_items(self) -> None:
        items = self._take_marked()
        target = self._stack[-1]
        if not isinstance(target, set):
            raise DamagedError(f"adds items to a {type(target).__name__}")
        target.update(hashable_key(item) for item in items)

    # --- names, and what is made of them ---------------------------------------------------------

    def _global(self) -> None:
        self._push(_resolve_name(self._reader.line(), self._reader.line()))

    def _stack_global(self) -> None:
        module, name = self._take(2)
        if not isinstance(name, str) or not isinstance(module, str):
            raise DamagedError("a name that is no text")
        self._push(_resolve_name(module, name))

    def _instance(self) -> None:
        _resolve_name(self._reader.line(), self._reader.line())
        raise DamagedError("an instance as Python 2 wrote it")

    def _persistent_id(self) -> None:
        self._push(self._persistent(self._stack.pop()))

    def _reduce(self) -> None:
        self._push(self._call(*self._take(2)))

    def _reduce_with_names(self) -> None:
        function, arguments, keywords = self._take(3)
        if keywords and isinstance(function, Name) and function.dotted in self._builders:
            raise DamagedError(f"{function.dotted} takes no named arguments")
        self._push(self._call(function, arguments))

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Name):
            is_object = isinstance(function, StandIn)
            what = f"{function.dotted} object" if is_object else type(function).__name__
            raise RefusedError(f"to call a {what}")
        if not isinstance(arguments, tuple):
            raise DamagedError(f"{function.dotted} is called without a tuple")
        dotted = function.dotted
        if dotted in self._builders:
            return self._builders[dotted](*arguments)
        if dotted == "copyreg._reconstructor":
            if not arguments or not isinstance(arguments[0], Name):
                raise DamagedError("an object without a class")
            dotted = arguments[0].dotted
        # Only classes make objects; by convention their names start with a capital.
        is_class = dotted.rpartition(".")[2].lstrip("_")[:1].isupper()
        if not is_class and dotted not in _ALLOWED_CALLS and not dotted.startswith("builtins."):
            raise RefusedError(f"to call {dotted}")
        return StandIn(dotted)

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, StandIn):
            parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
            target.states += [part for part in parts if isinstance(part, dict)]
            if len(target.states) > _MAX_STATES:
                raise DamagedError(f"gives {target.dotted} more than {_MAX_STATES} states")
        elif not isinstance(target, dict):  # a state dict's own attribute, _metadata, is dropped
            raise DamagedError(f"gives a state to a {type(target).__name__}")


def _resolve_name(module: str, name: str) -> Name | torch.dtype:
    """Return a name that a pickle may use. Raises :class:`RefusedError` for any other one."""
    module, name = NAME_MAPPING.get((module, name), (module, name))  # protocol 2: Python 2's names
    module = IMPORT_MAPPING.get(module, module)
    dotted = f"{module}.{name}"
    if len(dotted) > _MAX_NAME_LENGTH or not _NAME.fullmatch(module) or not _NAME.fullmatch(name):
        raise RefusedError("a name that no code has")
    in_package = module.partition(".")[0] in _ALLOWED_PACKAGES and "." not in name
    if not in_package and name not in _ALLOWED_NAMES.get(module, ()):
        raise RefusedError(dotted)
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    return Name(dotted)


def _filled(target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    """Return a dict after entering keys and values that stand in turn."""
    if len(items) % 2:
        raise DamagedError("a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[hashable_key(key)] = value
    return target


def hashable_key(key: Any) -> Hashable:
    """Return a key of a dict or an item of a set, once it is seen to be cheap to hash.

    A nested tuple is not: hashing a deep one overflows the stack.
    """
    parts = key if isinstance(key, tuple) and len(key) < _MAX_KEY_PARTS else (key,)
    for part in parts:
        if isinstance(part, int) and abs(part) >= (_LARGEST_KEY if part is key else _LARGEST_PART):
            raise DamagedError("an enormous number as a key")
        if not isinstance(part, str | int | Name | StandIn | torch.dtype | None):
            raise DamagedError(f"a {type(part).__name__} as a key")
    return key  # type: ignore[no-any-return]


_DTYPES = {
    name: value for name in dir(torch) if isinstance(value := getattr(torch, name), torch.dtype)
}

_CONSTANTS = {
    pickle.NONE: None,
    pickle.NEWTRUE: True,
    pickle.NEWFALSE: False,
    pickle.EMPTY_TUPLE: (),
}

_ARGUMENTS: Mapping[bytes, Callable[[ByteReader], Any]] = {
    pickle.BININT: lambda r: r.number(4, signed=True),
    pickle.BININT1: lambda r: r.number(1),
    pickle.BININT2: lambda r: r.number(2),
    pickle.LONG1: lambda r: r.number(r.number(1), signed=True),
    pickle.BINFLOAT: lambda r: struct.unpack(">d", r.take(8))[0],
    pickle.SHORT_BINUNICODE: lambda r: r.text(1),
    pickle.BINUNICODE: lambda r: r.text(4),
    pickle.BINUNICODE8: lambda r: r.text(8),
    pickle.SHORT_BINBYTES: lambda r: r.skip(r.number(1)),
    pickle.BINBYTES: lambda r: r.skip(r.number(4)),
    pickle.BINBYTES8: lambda r: r.skip(r.number(8)),
    pickle.BYTEARRAY8: lambda r: r.skip(r.number(8)),
}

_INSTRUCTIONS: Mapping[bytes, Callable[[Machine], object]] = {
    pickle.PROTO: Machine._proto,
    pickle.FRAME: lambda m: m._reader.number(8),
    pickle.MARK: Machine._mark,
    pickle.POP: Machine._pop,
    pickle.POP_MARK: Machine._take_marked,
    pickle.DUP: lambda m: m._push(m._stack[-1]),
    pickle.BINGET: lambda m: m._get(1),
    pickle.LONG_BINGET: lambda m: m._get(4),
    pickle.BINPUT: lambda m: m._put(1),
    pickle.LONG_BINPUT: lambda m: m._put(4),
    pickle.MEMOIZE: Machine._memoize,
    pickle.EMPTY_LIST: lambda m: m._push([]),
    pickle.EMPTY_DICT: lambda m: m._push({}),
    pickle.EMPTY_SET: lambda m: m._push(set()),
    pickle.TUPLE1: lambda m: m._push(tuple(m._take(1))),
    pickle.TUPLE2: lambda m: m._push(tuple(m._take(2))),
    pickle.TUPLE3: lambda m: m._push(tuple(m._take(3))),
    pickle.TUPLE: lambda m: m._push(tuple(m._take_marked())),
    pickle.LIST: lambda m: m._push(m._take_marked()),
    pickle.DICT: lambda m: m._push(_filled({}, m._take_marked())),
    pickle.FROZENSET: lambda m: m._push({hashable_key(item) for item in m._take_marked()}),
    pickle.APPEND: lambda m: m._append(m._take(1)),
    pickle.APPENDS: lambda m: m._append(m._take_marked()),
    pickle.SETITEM: lambda m: m._set_items(m._take(2)),
    pickle.SETITEMS: lambda m: m._set_items(m._take_marked()),
    pickle.ADDITEMS: Machine._add_items,
    pickle.GLOBAL: Machine._global,
    pickle.STACK_GLOBAL: Machine._stack_global,
    pickle.INST: Machine._instance,
    pickle.BINPERSID: Machine._persistent_id,
    pickle.REDUCE: Machine._reduce,
    pickle.NEWOBJ: Machine._reduce,
    pickle.NEWOBJ_EX: Machine._reduce_with_names,
    pickle.BUILD: Machine._build,
}
