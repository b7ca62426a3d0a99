"""Pickles: damaged ones in every container, and programs that call functions."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
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
    wrap = data.draw(st.sampled_from(("pickle", "zip", "compressed", "stream")))
    content = {
        "pickle": lambda: program,
        "zip": lambda: zipped(program),
        "compressed": lambda: zipped(program, zipfile.ZIP_DEFLATED),
        "stream": lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
        + pickle.dumps({"little_endian": True}, 2) + program,
    }[wrap]()  # fmt: skip
    path = ground.clean() / data.draw(st.sampled_from(("x.pt", "x.bin", "x.safetensors")))
    path.write_bytes(content)
    ground.examine("hostile pickles", lambda: read_checkpoint(path))


def test_the_canary_is_detected(ground: Ground) -> None:
    """The programs run in an unsafe reader."""
    command = f"touch {ground.canary}".encode()
    program = pickle.GLOBAL + b"os\nsystem\n" + pickle.SHORT_BINUNICODE + bytes([len(command)])
    pickle.loads(program + command + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP)
    assert ground.canary.exists()
    ground.canary.unlink()
