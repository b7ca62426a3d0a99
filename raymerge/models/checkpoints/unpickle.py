"""Run a pickle without importing or calling anything that it names.

A pickle is a program for a small stack machine. :class:`Machine` follows those of its instructions
that make plain data. A class or a function is only a :class:`Name` here; what a pickle makes of a
class is a :class:`Stand` in its place, which holds the state it was given and does nothing. The few
functions that rebuild tensors and containers are written anew in ``pickled``.

Of a hostile file: work and memory are bounded by ``_MOST_STEPS``, nothing recurses, and no length
is believed before the file is seen to be that long.
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

_MOST_STEPS = 1_000_000  # a ViT-L/14 as a pickled module takes about 20,000
_MOST_STATES = 8
_LONGEST_NAME = 256
_LARGEST_KEY = 1 << 60  # beyond it, numbers can be chosen to have one hash
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*", re.ASCII)

_PACKAGES = ("torch", "torchvision", "open_clip", "clip", "src", "PIL", "numpy", "timm")
"""Of their modules any plain name may be mentioned."""
_MENTIONED = {
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
_CALLED = {
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
"""Besides classes, which are written with a capital: calling one of these makes a stand-in."""


class RefusedError(Exception):
    """The pickle wants what no checkpoint needs."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"refused: the pickle wants {what}, and running code from a checkpoint is unsafe; "
            "save its state_dict instead"
        )


class DamagedError(Exception):
    """What no writer writes."""


@dataclass(frozen=True)
class Name:
    """A class or a function, by its name alone."""

    dotted: str


@dataclass(eq=False)
class Stand:
    """What stands in an object's place: the name of its class, and its state as it was given."""

    dotted: str
    states: list[Mapping[Any, Any]] = field(default_factory=list, repr=False)

    def get(self, key: str) -> Any:
        """The attribute, None if it has none."""
        return next((state[key] for state in reversed(self.states) if key in state), None)


@dataclass(frozen=True, eq=False)
class Region:
    """Bytes that were not read: ``start:stop`` of ``memory``, or of the file if that is None."""

    memory: bytes | None = field(repr=False)
    start: int
    stop: int


class Source:
    """The bytes of a region, taken in order."""

    def __init__(self, file: BinaryIO, region: Region) -> None:
        self._file, self.memory, self._stop = file, region.memory, region.stop
        file.seek(region.start)

    def take(self, count: int) -> bytes:
        self._require(count)
        return self._file.read(count)

    def skip(self, count: int) -> Region:
        self._require(count)
        start = self._file.tell()
        self._file.seek(start + count)
        return Region(self.memory, start, start + count)

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def text(self, size: int) -> str:
        return self.take(self.number(size)).decode()

    def line(self) -> str:
        found = self._file.readline(_LONGEST_NAME)
        if not found.endswith(b"\n"):
            raise DamagedError("a name without an end")
        return found[:-1].decode()

    def _require(self, count: int) -> None:
        left = self._stop - self._file.tell()
        if count < 0 or count > left:
            raise DamagedError(f"it ends early: {count} bytes wanted, {max(0, left)} left")


@dataclass
class Budget:
    """Steps left to all pickles of a file together."""

    steps: int = _MOST_STEPS

    def spend(self, steps: int = 1) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise DamagedError(f"it takes more than {_MOST_STEPS} steps")


class Machine:
    """One pickle. ``builders``: what is done for a call of these names; ``persistent``: what a
    persistent id stands for. Both may raise as ``run`` does."""

    def __init__(
        self,
        source: Source,
        budget: Budget,
        builders: Mapping[str, Builder],
        persistent: Callable[[Any], Any],
    ) -> None:
        self._source, self._budget = source, budget
        self._builders, self._persistent = builders, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Raises :class:`RefusedError`, or any exception for a damaged pickle."""
        while (code := self._source.take(1)) != pickle.STOP:
            self._budget.spend()
            if code in _CONSTANTS:
                self._stack.append(_CONSTANTS[code])
            elif code in _ARGUMENTS:
                self._stack.append(_ARGUMENTS[code](self._source))
            elif code in _INSTRUCTIONS:
                _INSTRUCTIONS[code](self)
            else:
                raise DamagedError(f"instruction {code!r} is in no checkpoint")
        return self._stack.pop()

    # --- the stack and the memo ------------------------------------------------------------------

    def _proto(self) -> None:
        version = self._source.number(1)
        if version > pickle.HIGHEST_PROTOCOL:
            raise DamagedError(f"pickle protocol {version} is unknown")

    def _frame(self) -> None:
        self._source.number(8)

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _pop(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        mark = self._marks.pop()
        if mark > len(self._stack):
            raise DamagedError("a mark above the stack")
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _dup(self) -> None:
        self._stack.append(self._stack[-1])

    def _get(self, size: int) -> None:
        self._stack.append(self._memo[self._source.number(size)])

    def _put(self, size: int) -> None:
        self._memo[self._source.number(size)] = self._stack[-1]

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    # --- containers ------------------------------------------------------------------------------

    def _new(self, kind: Callable[[], Any]) -> None:
        self._stack.append(kind())

    def _tuple(self, count: int) -> None:
        if count > len(self._stack):
            raise DamagedError("a tuple of more than there is")
        items = tuple(self._stack[-count:])
        self._stack[-count:] = [items]

    def _marked_tuple(self) -> None:
        items = self._pop_mark()
        self._stack.append(tuple(items))

    def _marked_list(self) -> None:
        items = self._pop_mark()
        self._stack.append(items)

    def _marked_dict(self) -> None:
        items = self._pop_mark()
        self._stack.append(_filled({}, items))

    def _frozenset(self) -> None:
        items = self._pop_mark()
        self._stack.append({as_key(item) for item in items})

    def _append(self) -> None:
        item = self._stack.pop()
        self._extend([item])

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Stand):
            raise DamagedError(f"appends to a {type(target).__name__}")

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            _filled(target, items)
        elif not isinstance(target, Stand):
            raise DamagedError(f"sets items of a {type(target).__name__}")

    def _add_items(self) -> None:
        items = self._pop_mark()
        target = self._stack[-1]
        if not isinstance(target, set):
            raise DamagedError(f"adds items to a {type(target).__name__}")
        target.update(as_key(item) for item in items)

    # --- names, and what is made of them ---------------------------------------------------------

    def _global(self) -> None:
        self._stack.append(_mention(self._source.line(), self._source.line()))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise DamagedError("a name that is no text")
        self._stack.append(_mention(module, name))

    def _instance(self) -> None:
        _mention(self._source.line(), self._source.line())
        raise DamagedError("an instance as Python 2 wrote it")

    def _persistent_id(self) -> None:
        self._stack.append(self._persistent(self._stack.pop()))

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    def _reduce_named(self) -> None:
        named, arguments, function = self._stack.pop(), self._stack.pop(), self._stack.pop()
        if named and isinstance(function, Name) and function.dotted in self._builders:
            raise DamagedError(f"{function.dotted} takes no named arguments")
        self._stack.append(self._call(function, arguments))

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Name):
            raise RefusedError(f"to call a {_called(function)}")
        if not isinstance(arguments, tuple):
            raise DamagedError(f"{function.dotted} is called without a tuple")
        dotted = function.dotted
        if dotted in self._builders:
            return self._builders[dotted](*arguments)
        if dotted == "copyreg._reconstructor":
            dotted = _class_name(arguments)
        return Stand(_made(dotted))

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Stand):
            parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
            target.states += [part for part in parts if isinstance(part, dict)]
            if len(target.states) > _MOST_STATES:
                raise DamagedError(f"gives {target.dotted} more than {_MOST_STATES} states")
        elif not isinstance(target, dict):  # a state dict's own attribute, _metadata, is dropped
            raise DamagedError(f"gives a state to a {type(target).__name__}")


def _mention(module: str, name: str) -> Name | torch.dtype:
    """What a pickle may name; everything else is refused by its dotted name."""
    module, name = NAME_MAPPING.get((module, name), (module, name))  # protocol 2: of Python 2
    module = IMPORT_MAPPING.get(module, module)
    dotted = f"{module}.{name}"
    if len(dotted) > _LONGEST_NAME or not _NAME.fullmatch(module) or not _NAME.fullmatch(name):
        raise RefusedError("a name that no code has")
    allowed = name in _MENTIONED.get(module, ())
    if module.partition(".")[0] in _PACKAGES and "." not in name:
        allowed = True
    if not allowed:
        raise RefusedError(dotted)
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    return Name(dotted)


def _made(dotted: str) -> str:
    """Of a class, whose instances are stand-ins; a function is refused."""
    leaf = dotted.rpartition(".")[2].lstrip("_")
    if not leaf[:1].isupper() and dotted not in _CALLED and not dotted.startswith("builtins."):
        raise RefusedError(f"to call {dotted}")
    return dotted


def _class_name(arguments: tuple[Any, ...]) -> str:
    if not arguments or not isinstance(arguments[0], Name):
        raise DamagedError("an object without a class")
    return arguments[0].dotted


def _called(function: Any) -> str:
    return f"{function.dotted} object" if isinstance(function, Stand) else type(function).__name__


def _filled(target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise DamagedError("a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[as_key(key)] = value
    return target


def as_key(key: Any) -> Hashable:
    """Of a dict or a set. Not a nested tuple: hashing a deep one overflows the stack."""
    parts = key if isinstance(key, tuple) and len(key) < 64 else (key,)
    for part in parts:
        if isinstance(part, int) and abs(part) >= _LARGEST_KEY:
            raise DamagedError("an enormous number as a key")
        if not isinstance(part, str | int | Name | torch.dtype | None):
            raise DamagedError(f"a {type(part).__name__} as a key")
    found: Hashable = key
    return found


_DTYPES = {
    name: value for name in dir(torch) if isinstance(value := getattr(torch, name), torch.dtype)
}

_CONSTANTS = {
    pickle.NONE: None,
    pickle.NEWTRUE: True,
    pickle.NEWFALSE: False,
    pickle.EMPTY_TUPLE: (),
}

_ARGUMENTS: Mapping[bytes, Callable[[Source], Any]] = {
    pickle.BININT: lambda s: s.number(4, signed=True),
    pickle.BININT1: lambda s: s.number(1),
    pickle.BININT2: lambda s: s.number(2),
    pickle.LONG1: lambda s: s.number(s.number(1), signed=True),
    pickle.BINFLOAT: lambda s: struct.unpack(">d", s.take(8))[0],
    pickle.SHORT_BINUNICODE: lambda s: s.text(1),
    pickle.BINUNICODE: lambda s: s.text(4),
    pickle.BINUNICODE8: lambda s: s.text(8),
    pickle.SHORT_BINBYTES: lambda s: s.skip(s.number(1)),
    pickle.BINBYTES: lambda s: s.skip(s.number(4)),
    pickle.BINBYTES8: lambda s: s.skip(s.number(8)),
    pickle.BYTEARRAY8: lambda s: s.skip(s.number(8)),
}

_INSTRUCTIONS: Mapping[bytes, Callable[[Machine], None]] = {
    pickle.PROTO: Machine._proto,
    pickle.FRAME: Machine._frame,
    pickle.MARK: Machine._mark,
    pickle.POP: Machine._pop,
    pickle.POP_MARK: lambda m: m._pop_mark().clear(),
    pickle.DUP: Machine._dup,
    pickle.BINGET: lambda m: m._get(1),
    pickle.LONG_BINGET: lambda m: m._get(4),
    pickle.BINPUT: lambda m: m._put(1),
    pickle.LONG_BINPUT: lambda m: m._put(4),
    pickle.MEMOIZE: Machine._memoize,
    pickle.EMPTY_LIST: lambda m: m._new(list),
    pickle.EMPTY_DICT: lambda m: m._new(dict),
    pickle.EMPTY_SET: lambda m: m._new(set),
    pickle.TUPLE1: lambda m: m._tuple(1),
    pickle.TUPLE2: lambda m: m._tuple(2),
    pickle.TUPLE3: lambda m: m._tuple(3),
    pickle.TUPLE: Machine._marked_tuple,
    pickle.LIST: Machine._marked_list,
    pickle.DICT: Machine._marked_dict,
    pickle.FROZENSET: Machine._frozenset,
    pickle.APPEND: Machine._append,
    pickle.APPENDS: lambda m: m._extend(m._pop_mark()),
    pickle.SETITEM: Machine._set_item,
    pickle.SETITEMS: lambda m: m._set_items(m._pop_mark()),
    pickle.ADDITEMS: Machine._add_items,
    pickle.GLOBAL: Machine._global,
    pickle.STACK_GLOBAL: Machine._stack_global,
    pickle.INST: Machine._instance,
    pickle.BINPERSID: Machine._persistent_id,
    pickle.REDUCE: Machine._reduce,
    pickle.NEWOBJ: Machine._reduce,
    pickle.NEWOBJ_EX: Machine._reduce_named,
    pickle.BUILD: Machine._build,
}
