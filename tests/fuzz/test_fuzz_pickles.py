"""Pickles: damaged ones in every container, and programs that call functions."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from fuzzing import Ground, mutants, read_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from releases import CONTAINERS, ClassificationHead, write_release

STATE = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.zeros(3), "epoch": 3}


def _saved(write: object) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        write(path)  # type: ignore[operator]
        return path.read_bytes()


FILES = [_saved(lambda path, save=save: save(STATE, path)) for save in CONTAINERS.values()]
FILES += [
    _saved(lambda path, kind=kind: write_release(ClassificationHead(torch.ones(3, 4)), path, kind))
    for kind in CONTAINERS
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TorchScript is deprecated, but its files remain
    _SCRIPT = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), _SCRIPT)
FILES.append(_SCRIPT.getvalue())


@given(content=mutants(FILES))
def test_damaged_pickles(ground: Ground, content: bytes) -> None:
    path = ground.clean() / "x.pt"
    path.write_bytes(content)
    ground.examine("torch files and pickles", lambda: read_checkpoint(path))


def zipped(program: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a pickle in torch's zip."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/version", "3\n")
        archive.writestr("x/data/0", b"\0" * 64)
    return out.getvalue()


WRAPS = ("pickle", "zip", "compressed", "stream")


def contained(program: bytes, wrap: str) -> bytes:
    """Return a file of one of torch's containers, whose pickle is a program."""
    if wrap == "stream":
        numbers = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
        return numbers + pickle.dumps({"little_endian": True}, 2) + program
    methods = {"zip": zipfile.ZIP_STORED, "compressed": zipfile.ZIP_DEFLATED}
    return zipped(program, methods[wrap]) if wrap in methods else program


TARGETS = (
    "os system", "posix system", "builtins eval", "builtins exec", "builtins open",
    "builtins getattr", "builtins __import__", "subprocess Popen", "subprocess check_output",
    "torch load", "torch.hub load", "torch.utils.cpp_extension load", "torch.jit.frontend eval",
    "torch._utils _rebuild_tensor_v2", "torch.serialization load", "numpy load",
    "numpy.testing._private.utils runstring", "timm.models load_checkpoint", "pathlib PosixPath",
    "functools partial", "collections OrderedDict", "shutil rmtree",
    "torch.storage _load_from_bytes", "copyreg _reconstructor", "_codecs encode",
    "open_clip create_model", "torch.distributed.rpc sync", "src.modeling ImageEncoder",
    "torch.fx.graph _exec_with_source", "builtins set",
)  # fmt: skip
CALLS = (
    pickle.TUPLE1 + pickle.REDUCE,
    pickle.TUPLE1 + pickle.NEWOBJ,
    pickle.TUPLE1 + pickle.EMPTY_DICT + pickle.NEWOBJ_EX,
)
"""Instructions that call the function on the stack with its argument."""


@st.composite
def programs(draw: st.DrawFn, canary: str) -> bytes:
    """Draw pickles of a few instructions, most of them forbidden calls."""
    texts = (f"touch {canary}", f"open({canary!r}, 'w')", canary, "w", "system", "x", "weight")
    out = bytearray(b"\x80" + bytes([draw(st.sampled_from((2, 3, 4)))]))
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(("call", "call", "text", "global", "plain", "new", "build")))
        text = draw(st.sampled_from(texts)).encode()
        module, _, name = draw(st.sampled_from(TARGETS)).partition(" ")
        mention = pickle.GLOBAL + f"{module}\n{name}\n".encode()
        short = pickle.SHORT_BINUNICODE + bytes([len(text)]) + text
        if kind == "call":
            ending = draw(st.sampled_from(CALLS))
            out += mention + short + ending
        elif kind == "text":
            out += short
        elif kind == "global":
            parts = [pickle.SHORT_BINUNICODE + bytes([len(p)]) + p.encode() for p in (module, name)]
            out += b"".join(parts) + pickle.STACK_GLOBAL + short + pickle.TUPLE1 + pickle.REDUCE
        elif kind == "new":
            out += pickle.MARK + short + pickle.INST + f"{module}\n{name}\n".encode()
        elif kind == "build":
            out += pickle.EMPTY_DICT + short + mention + pickle.SETITEM + pickle.BUILD
        else:
            out += bytes([draw(st.integers(0, 255))])
    return bytes(out) + pickle.STOP


@given(data=st.data())
def test_hostile_programs(ground: Ground, data: st.DataObject) -> None:
    program = data.draw(programs(str(ground.canary)))
    wrap = data.draw(st.sampled_from(WRAPS))
    content = contained(program, wrap)
    path = ground.clean() / data.draw(st.sampled_from(("x.pt", "x.bin", "x.safetensors")))
    path.write_bytes(content)
    ground.examine("hostile pickles", lambda: read_checkpoint(path))


# --- small programs that ask for much ------------------------------------------------------------


def _text(value: str) -> bytes:
    raw = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def _int(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(raw)]) + raw


def _repeated_call(name: str, argument: bytes, times: int, *more: bytes) -> bytes:
    """Return a list of calls, all with one argument from the memo."""
    store, load = pickle.BINPUT + b"\x00" + pickle.POP, pickle.BINGET + b"\x00"
    arguments = pickle.MARK + load + b"".join(more) + pickle.TUPLE
    call = pickle.GLOBAL + f"{name}\n".replace(" ", "\n").encode() + arguments + pickle.REDUCE
    return argument + store + pickle.EMPTY_LIST + pickle.MARK + call * times + pickle.APPENDS


def _nested(opening: bytes, depth: int, closing: bytes = b"") -> bytes:
    return opening + pickle.TUPLE1 * depth + closing


def _ones(count: int) -> bytes:
    return (pickle.BININT1 + b"\x01") * count


def _colliding(count: int, value: bytes = b"") -> bytes:
    """Return numbers of one hash, each in a tuple, and with a value where it is a key."""
    return b"".join(_int(k * (2**61 - 1)) + pickle.TUPLE1 + value for k in range(1, count))


def _module(name: str, values: int) -> bytes:
    """Return a module in one with a long name, with parameters that are no tensors."""
    entries = b"".join(_text(f"p{k}") + pickle.NONE for k in range(values))
    parameters = pickle.EMPTY_DICT + pickle.MARK + entries + pickle.SETITEMS
    empty = pickle.GLOBAL + b"src.heads\nX\n" + pickle.EMPTY_TUPLE + pickle.NEWOBJ

    def module(key: str, value: bytes) -> bytes:
        own = _text("_parameters") + (value if key == "_parameters" else pickle.EMPTY_DICT)
        other = b"" if key == "_parameters" else _text(key) + value
        state = pickle.EMPTY_DICT + pickle.MARK + own + other + pickle.SETITEMS
        return empty + state + pickle.BUILD

    inner = module("_parameters", parameters)
    return module("_modules", pickle.EMPTY_DICT + _text(name) + inner + pickle.SETITEM)


TUPLE, KEY = pickle.EMPTY_TUPLE, pickle.NONE + pickle.SETITEM
DEMANDS: dict[str, Callable[[int], bytes]] = {
    "bytearray": lambda n: _repeated_call("builtins bytearray", _int(n * 10**6), 1),
    "bytes": lambda n: _repeated_call("builtins bytes", _int(n * 10**6), 1),
    "range": lambda n: _repeated_call("builtins list", _int(n * 10**6), 1),
    "sizes": lambda n: _repeated_call(
        "torch Size", pickle.MARK + _ones(20 * n) + pickle.TUPLE, n),
    "utf-32": lambda n: _repeated_call("_codecs encode", _text("x" * 99 * n), n, _text("utf-32")),
    "punycode": lambda n: _repeated_call("_codecs encode", _text("é" * n), n, _text("punycode")),
    "latin1": lambda n: _repeated_call("_codecs encode", _text("x" * 99 * n), n, _text("latin1")),
    "counter": lambda n: _repeated_call("collections Counter", _text("x" * 99 * n), n),
    "set of a list": lambda n: _repeated_call(
        "builtins set", pickle.MARK + _ones(n) + pickle.LIST, n),
    "frozenset": lambda n: pickle.MARK + _colliding(n) + pickle.FROZENSET,
    "set": lambda n: pickle.EMPTY_SET + pickle.MARK + _colliding(n) + pickle.ADDITEMS,
    "dict": lambda n: pickle.MARK + _colliding(n, pickle.NONE) + pickle.DICT,
    "deep key": lambda n: pickle.EMPTY_DICT + _nested(TUPLE, 40 * n, KEY),
    "deep item": lambda n: pickle.EMPTY_SET + pickle.MARK + _nested(TUPLE, 40 * n, pickle.ADDITEMS),
    "deep tuple": lambda n: _nested(TUPLE, 40 * n),
    "deep list": lambda n: pickle.EMPTY_LIST * 40 * n + pickle.APPEND * (40 * n - 1),
    "deep argument": lambda n: _repeated_call("torch Size", _nested(TUPLE, 40 * n), 1),
    "deep id": lambda n: _nested(TUPLE, 40 * n, pickle.BINPERSID),
    "long name": lambda n: _module("x" * 400 * n, n),
    "long names": lambda n: (
        pickle.EMPTY_DICT + (_text("x" * n) + pickle.EMPTY_DICT) * n + pickle.SETITEM * n
    ),
}  # fmt: skip
"""Values that grow with a number, up to 5,000, faster than the programs that ask for them."""


@given(
    kind=st.sampled_from(sorted(DEMANDS)),
    size=st.sampled_from((1, 10, 100, 1000, 5000)),
    wrap=st.sampled_from(WRAPS),
)
def test_demanding_programs(ground: Ground, kind: str, size: int, wrap: str) -> None:
    value = DEMANDS[kind](size)
    program = b"\x80\x04" + pickle.EMPTY_DICT + _text("w") + value + pickle.SETITEM + pickle.STOP
    path = ground.clean() / "x.pt"
    path.write_bytes(contained(program, wrap))
    ground.examine("demanding pickles", lambda: read_checkpoint(path))


def test_the_canary_is_detected(ground: Ground) -> None:
    """The programs run in an unsafe reader."""
    command = f"touch {ground.canary}".encode()
    program = pickle.GLOBAL + b"os\nsystem\n" + pickle.SHORT_BINUNICODE + bytes([len(command)])
    pickle.loads(program + command + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP)
    assert ground.canary.exists()
    ground.canary.unlink()
