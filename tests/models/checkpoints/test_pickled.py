"""Pickled modules open without their code and equal the original; hostile ones are refused."""

from __future__ import annotations

import os
import random
import struct
import sys
import time
import tracemalloc
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from releases import CONTAINERS, NEW, OLD, SRC, ClassificationHead, encoder_of, write_release
from torch import nn

from raymerge.config import ModelConfig
from raymerge.errors import CheckpointError
from raymerge.models.checkpoints.checkpoint import Checkpoint, read_tensor
from raymerge.models.checkpoints.inspect import inspect_checkpoint
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.checkpoints.pickled import PickledCheckpoint
from raymerge.models.checkpoints.visual_tower import open_visual
from raymerge.models.pretrained import open_pretrained
from raymerge.models.resolve import resolve_model


@pytest.fixture(scope="module")
def clip(world: Any) -> Any:
    return open_clip.create_model(f"local-dir:{world.root / 'pretrained'}").eval()


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {key: read_tensor(checkpoint, key) for key in checkpoint.specs}


# --- what is in the file is what was pickled -----------------------------------------------------


@pytest.mark.parametrize("names", [OLD, SRC, NEW], ids=["old", "src", "new"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_released_encoder_gives_the_features_of_the_original(
    clip: Any, world: Any, tmp_path: Path, container: str, names: Any
) -> None:
    encoder, path = encoder_of(clip), tmp_path / "finetuned.pt"
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    write_release(encoder, path, container, names)
    assert "src" not in sys.modules
    assert not hasattr(open_clip.model, "VisualTransformer")

    folder = f"local-dir:{world.root / 'pretrained'}"
    layout = open_pretrained(resolve_model(ModelConfig(arch=folder)))[0].layout
    opened = open_visual(str(path), layout)
    assert opened.checkpoint.kind == "pickled module"
    assert opened.prefix == "model.visual."
    state = {k: v.clone() for k, v in layout.views(opened.flat()).items()}
    ours = open_clip.create_model(folder).eval()
    ours.visual.load_state_dict(state)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours.encode_image(images), encoder(images))


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_keys_are_those_of_the_state_dict(clip: Any, tmp_path: Path, container: str) -> None:
    encoder, path = encoder_of(clip), tmp_path / "x.pt"
    write_release(encoder, path, container)
    read = read_all(open_checkpoint(path))
    expected = encoder.state_dict()
    assert read.keys() == expected.keys()  # the mask, a buffer that is not saved, is absent
    assert {"model.positional_embedding", "model.logit_scale", "model.ln_final.weight"} <= set(read)
    for key, tensor in expected.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor), key
        assert not read[key].requires_grad


class Odd(nn.Module):
    """A module with every way to store a tensor."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(24.0).reshape(4, 6)
        self.turned = nn.Parameter(base.t())
        self.part = nn.Parameter(base[1:3, 2:5])
        self.register_buffer("scalar", torch.tensor(2.5, dtype=torch.float64))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("sixteen", torch.randn(5).half())
        self.register_buffer("brain16", torch.randn(5).bfloat16())
        self.register_buffer("count", torch.tensor([3, 4]))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("one", torch.arange(12).reshape(4, 1, 3)[:, :, :1])
        self.register_buffer("gone", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)
        self.shared = nn.Linear(2, 2)
        self.again = self.shared
        self.noted = nn.Parameter(torch.ones(2))
        self.noted.note = "kept on the parameter"
        self.array, self.number = np.arange(3.0), np.float64(2.0)
        self.kinds = {torch.float32, int}
        self.where, self.options = Path("x"), Namespace(lr=0.1)


Odd.__module__, Odd.__qualname__ = "src.modeling", "Odd"


@pytest.mark.parametrize("container", CONTAINERS)
def test_strides_offsets_dtypes_and_shared_tensors(tmp_path: Path, container: str) -> None:
    odd = Odd()
    write_release(odd, tmp_path / "x.pt", container)
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    expected = odd.state_dict()
    read = read_all(checkpoint)
    assert read.keys() == expected.keys()
    for key, tensor in expected.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor), key
        flat = tensor.reshape(-1)
        for start, stop in ((0, len(flat)), (1, len(flat)), (1, 2)):
            out_n = torch.full((max(0, min(stop, len(flat)) - start),), 9.0)
            checkpoint.fill(key, start, out_n)
            assert torch.equal(out_n, flat[start : start + len(out_n)].float())


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_state_dict_beside_other_objects_opens(tmp_path: Path, container: str) -> None:
    value = {"state_dict": {"a": torch.arange(3.0)}, "args": Namespace(lr=0.1), "epoch": 3}
    CONTAINERS[container](value, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert checkpoint.kind == ("pickle" if "pickle" in container else "torch")
    assert torch.equal(read_all(checkpoint)["a"], torch.arange(3.0))


def test_a_whole_pickled_clip_opens_under_its_own_names(clip: Any, tmp_path: Path) -> None:
    torch.save(clip, tmp_path / "x.pt")
    read = read_all(open_checkpoint(tmp_path / "x.pt"))
    assert read.keys() == clip.state_dict().keys()


def test_inspect_shows_the_format(clip: Any, tmp_path: Path) -> None:
    write_release(encoder_of(clip), tmp_path / "x.pt")
    inspection = inspect_checkpoint(str(tmp_path / "x.pt"))
    assert inspection["format"] == "pickled module"
    assert inspection["visual"]["prefix"] == "model.visual."
    assert inspection["visual"]["layers"] == 2


@pytest.mark.parametrize("container", ["zip", "stream", "pickle 4"])
def test_opening_reads_headers_only(tmp_path: Path, container: str) -> None:
    """A head of 60 MB opens with little time and memory."""
    head = ClassificationHead(torch.zeros(15_000, 1000))
    write_release(head, tmp_path / "x.pt", container)
    open_checkpoint(tmp_path / "x.pt")
    began = time.perf_counter()
    tracemalloc.start()
    checkpoint = PickledCheckpoint(tmp_path / "x.pt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    assert time.perf_counter() - began < 1
    assert checkpoint.specs["weight"].shape == (15_000, 1000)


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    write_release(ClassificationHead(torch.zeros(9, 9)), tmp_path / "x.pt", "pickle 4")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    os.truncate(tmp_path / "x.pt", 100)
    with pytest.raises(CheckpointError, match=r"weight cannot be read .*; fetch it again"):
        read_tensor(checkpoint, "weight")


def test_storages_that_no_key_fills_are_never_read(tmp_path: Path) -> None:
    """torch's reader takes such numbers from memory that nobody has written."""
    torch.save({"w": torch.ones(50)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    keys = b"]q\x00X"
    head, found, tail = (tmp_path / "x.pt").read_bytes().rpartition(keys)
    assert found
    (tmp_path / "x.pt").write_bytes(head + b"]q\x00." + tail.partition(b".")[2])
    refused(tmp_path / "x.pt", "damaged or not a torch file")


def _odd_numbers() -> dict[str, torch.Tensor]:
    names = ("float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2")
    numbers = {name: torch.zeros(8, dtype=torch.uint8).view(getattr(torch, name)) for name in names}
    return {
        **numbers,
        "conjugated": torch.ones(3, dtype=torch.complex64).conj(),
        "negative": torch.ones(3, dtype=torch.complex64).conj().imag,
        "sparse": torch.ones(3).to_sparse(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "jagged": torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
    }


@pytest.mark.filterwarnings("ignore")  # some kinds are prototypes
@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_of_odd_kinds_are_refused_when_opened(tmp_path: Path, is_zip: bool) -> None:
    path = tmp_path / "x.pt"
    odd = _odd_numbers()
    quantized = (torch.qint8, torch.quint8, torch.qint32)
    odd |= {str(q): torch.quantize_per_tensor(torch.ones(3), 0.1, 0, q) for q in quantized}
    for value in odd.values():
        state = {"visual.x": value, "visual.y": torch.ones(3)}
        torch.save(state, path, _use_new_zipfile_serialization=is_zip)
        refused(path, "'visual.x' is sparse, quantized, nested", "in float32 or float16")


@pytest.mark.parametrize("dtype", ["uint16", "float8_e4m3fn", "complex64", "float8_e4m3fnuz"])
def test_numbers_that_torch_converts_are_read(tmp_path: Path, dtype: str) -> None:
    values = torch.ones(3).to(getattr(torch, dtype))
    torch.save({"x": values}, tmp_path / "x.pt")
    read = read_tensor(open_checkpoint(tmp_path / "x.pt"), "x")
    assert torch.equal(read.view(torch.uint8), values.view(torch.uint8))


# --- hostile files -------------------------------------------------------------------------------


class Reduce:
    """An object that pickles as a call."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self._made = (function, arguments) if state is None else (function, arguments, state)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._made


def refused(path: Path, *mentions: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        read_all(open_checkpoint(path))
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 600
    for mention in (path.name, *mentions):
        assert mention in message, message


class _State:
    def __setstate__(self, state: Any) -> None:
        raise AssertionError("ran")

    def __getstate__(self) -> Any:
        return {"x": 1}


CALLS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "os.system": (lambda c: Reduce(os.system, f"touch {c}"), "wants posix.system,"),
    "builtins.eval": (lambda c: Reduce(eval, f"open({str(c)!r}, 'w')"), "wants builtins.eval,"),
    "builtins.exec": (lambda c: Reduce(exec, f"open({str(c)!r}, 'w')"), "wants builtins.exec,"),
    "builtins.open": (lambda c: Reduce(open, str(c), "w"), "wants io.open,"),
    "getattr": (lambda c: Reduce(getattr, 3, "real"), "wants builtins.getattr,"),
    "partial": (lambda c: __import__("functools").partial(os.system, f"touch {c}"), "posix.system"),
    "nested": (lambda c: Reduce(dict, Reduce(os.system, f"touch {c}")), "wants posix.system,"),
    "state": (lambda c: Reduce(dict, state=Reduce(os.system, f"touch {c}")), "posix.system"),
    "subprocess": (
        lambda c: Reduce(__import__("subprocess").check_output, ["touch", str(c)]),
        "wants subprocess.check_output,",
    ),
    "import": (lambda c: Reduce(__import__, "os"), "wants builtins.__import__,"),
    "unknown class": (lambda c: _State(), f"wants {_State.__module__}._State,"),
    "torch function": (
        lambda c: Reduce(torch.hub.load_state_dict_from_url, "x"),
        "wants to call torch.hub.load_state_dict_from_url,",
    ),
    "numpy file": (lambda c: Reduce(np.fromfile, str(c)), "wants to call numpy.fromfile,"),
    "torch load": (lambda c: Reduce(torch.load, str(c)), "wants to call torch.serialization.load,"),
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("container", ["zip", "stream", "pickle 2", "pickle 4"])
@pytest.mark.parametrize("case", CALLS)
def test_code_is_refused_by_name_and_does_not_run(
    tmp_path: Path, case: str, container: str, inside: bool
) -> None:
    make, mention = CALLS[case]
    canary, path = tmp_path / "canary", tmp_path / "x.pt"
    payload = make(canary)
    if inside:
        module = ClassificationHead(torch.zeros(2, 3))
        module.extra = payload
        write_release(module, path, container)
    else:
        CONTAINERS[container](payload, path)
    refused(path, "refused: the pickle", mention, "unsafe; save its state_dict instead")
    assert not canary.exists()


def glob(dotted: str) -> bytes:
    module, _, name = dotted.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(20, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def storage(key: str = "0", count: bytes = b"K\x06", kind: str = "torch.FloatStorage") -> bytes:
    return b"(" + text("storage") + glob(kind) + text(key) + text("cpu") + count + b"tQ"


def tensor(offset: bytes, shape: list[bytes], strides: list[bytes], source: bytes = b"") -> bytes:
    return (
        glob("torch._utils._rebuild_tensor_v2") + b"(" + (source or storage()) + offset
        + b"(" + b"".join(shape) + b"t(" + b"".join(strides) + b"t"
        + b"\x89" + glob("collections.OrderedDict") + b")RtR"
    )  # fmt: skip


def archive(path: Path, program: bytes, data: bytes = bytes(24)) -> Path:
    """Write a torch zip of ``{"w": …}`` as plain instructions, with one storage of 6 floats."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}" + text("w") + program + b"s.")
        file.writestr("archive/byteorder", b"little")
        file.writestr("archive/data/0", data)
    return path


GOOD = tensor(b"K\x00", [b"K\x02", b"K\x03"], [b"K\x03", b"K\x01"])
BIG = number(1 << 80)


def test_the_hand_written_archive_opens(tmp_path: Path) -> None:
    assert PickledCheckpoint(archive(tmp_path / "x.pt", GOOD)).specs["w"].shape == (2, 3)


REACH: dict[str, bytes] = {
    "offset": tensor(b"K\x01", [b"K\x02", b"K\x03"], [b"K\x03", b"K\x01"]),
    "negative offset": tensor(number(-1), [b"K\x02"], [b"K\x01"]),
    "stride": tensor(b"K\x00", [b"K\x02", b"K\x03"], [b"K\x04", b"K\x01"]),
    "negative stride": tensor(b"K\x02", [b"K\x02"], [number(-1)]),
    "shape": tensor(b"K\x00", [b"K\x07"], [b"K\x01"]),
    "huge shape": tensor(b"K\x00", [number(1 << 40)], [b"K\x00"]),
    "huge shapes": tensor(b"K\x00", [number(1 << 40)] * 9, [b"K\x00"] * 9),
    "huge empty": tensor(b"K\x00", [b"K\x00", *[number(1 << 40)] * 3], [b"K\x00"] * 4),
    "enormous": tensor(BIG, [BIG], [BIG]),
    "expanded": tensor(b"K\x00", [b"K\x09"], [b"K\x00"]),
    "strides short": tensor(b"K\x00", [b"K\x02", b"K\x03"], [b"K\x03"]),
    "many dimensions": tensor(b"K\x00", [b"K\x01"] * 65, [b"K\x00"] * 65),
    "bool size": tensor(b"K\x00", [b"\x88"], [b"K\x01"]),
    "text size": tensor(b"K\x00", [text("2")], [b"K\x01"]),
    "float offset": tensor(b"G" + struct.pack(">d", 0.0), [b"K\x02"], [b"K\x01"]),
    "storage count": tensor(b"K\x00", [b"K\x02"], [b"K\x01"], storage(count=b"K\x07")),
    "storage huge": tensor(b"K\x00", [b"K\x02"], [b"K\x01"], storage(count=number(1 << 62))),
    "storage dtype": tensor(b"K\x00", [b"K\x02"], [b"K\x01"], storage(kind="torch.HalfStorage")),
    "storage type": tensor(b"K\x00", [b"K\x02"], [b"K\x01"], storage(kind="torch.Tensor")),
    "storage key": tensor(b"K\x00", [b"K\x02"], [b"K\x01"], storage(key="../data.pkl")),
    "no storage": tensor(b"K\x00", [b"K\x02"], [b"K\x01"], text("0")),
}


@pytest.mark.parametrize("case", REACH)
def test_tensors_beyond_their_storage_are_refused(tmp_path: Path, case: str) -> None:
    path = archive(tmp_path / "x.pt", REACH[case])
    with pytest.raises(CheckpointError, match=r"damaged or not a torch file|expanded or without"):
        PickledCheckpoint(path)


STRANGE: dict[str, tuple[bytes, str]] = {
    "pid text": (b"Pstorage\n", "damaged"),
    "pid of another kind": (text("x") + b"Q", "refused: the pickle wants an object by an id"),
    "pid module": (b"(" + text("module") + b"K\x00K\x00K\x00tQ", "refused"),
    "pid nested": (storage() + b"Q", "refused"),
    "call a tensor": (GOOD + b")R", "refused: the pickle wants to call a Stored"),
    "call a stand-in": (
        glob("src.modeling.X") + b")R)R",
        "refused: the pickle wants to call a src.modeling.X object",
    ),
    "new object of text": (text("os.system") + b")\x81", "refused: the pickle wants to call a str"),
    "arguments no tuple": (glob("src.modeling.X") + b"]R", "damaged"),
    "build a tuple": (b")}b", "damaged"),
    "build a tensor": (GOOD + b"}b", "damaged"),
    "build text": (text("x") + b"}b", "damaged"),
    "instance": (b"(ios\nsystem\n", "refused: the pickle wants os.system,"),
    "instance of old": (b"(isrc.modeling\nX\n", "damaged"),
    "object": (b"(" + glob("src.modeling.X") + b"o", "damaged"),
    "extension": (b"\x82\x01", "damaged"),
    "out of band": (b"\x97", "damaged"),
    "dotted name": (
        text("torch") + text("serialization.os.system") + b"\x93)R",
        "refused: the pickle wants torch.serialization.os.system,",
    ),
    "name with a line": (text("torch") + text("a\nb") + b"\x93", "a name that no code has"),
    "name no text": (b"K\x01K\x02\x93", "damaged"),
    "long name": (text("torch") + text("a" * 999) + b"\x93", "a name that no code has"),
    "unending name": (b"ctorch" + b"a" * 999, "damaged"),
    "near name": (glob("torchx.a"), "refused: the pickle wants torchx.a,"),
    "sub os": (glob("src"), "refused"),
    "sparse": (
        glob("torch._utils._rebuild_sparse_tensor") + b")R",
        "'w' is sparse, quantized",
    ),
    "subclass": (
        glob("torch._tensor._rebuild_from_type_v2")
        + b"("
        + glob("torch._tensor._rebuild_from_type_v2")
        + b")))tR",
        "refused: the pickle wants a tensor from torch._tensor._rebuild_from_type_v2,",
    ),
    "memo of nothing": (b"j\xff\xff\xff\xff", "damaged"),
    "pop beyond": (b"000000", "damaged"),
    "mark missing": (b"t", "damaged"),
    "odd items": (b"}(K\x01u", "damaged"),
    "list as a key": (b"}]K\x01s", "damaged"),
    "text too long": (b"X\xff\xff\xff\xff", "ends early"),
    "text far too long": (b"\x8d" + b"\xff" * 8, "ends early"),
    "bytes too long": (b"\x8e" + b"\xff" * 8, "ends early"),
    "frame too long": (b"\x95" + b"\xff" * 8 + b"\x99", "damaged"),
    "broken text": (b"X\x02\x00\x00\x00\xed\xa0", "damaged"),
    "protocol": (b"\x80\x63", "protocol 99"),
    "codec": (glob("_codecs.encode") + text("x") + text("rot13") + b"\x86R", "damaged"),
    "load bytes": (glob("torch.storage._load_from_bytes") + text("x") + b"\x85R", "damaged"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_malformed_programs_are_refused(tmp_path: Path, case: str) -> None:
    program, mention = STRANGE[case]
    path = archive(tmp_path / "x.pt", program)
    refused(path, mention)
    with pytest.raises(CheckpointError) as raised:
        PickledCheckpoint(path)
    assert mention in str(raised.value)


def module(parameters: bytes, more: bytes = b"") -> bytes:
    """Return a pickled module with these ``_parameters``."""
    return (
        b"\x80\x02" + glob("src.modeling.X") + b")\x81}(" + text("_parameters") + parameters
        + more + b"ub."
    )  # fmt: skip


ODD_STATES: dict[str, bytes] = {
    "a list": module(b"]"),
    "text": module(text("x")),
    "none": module(b"N"),
    "number keys": module(b"}K\x01K\x02s"),
    "no tensor": module(b"}" + text("w") + text("x") + b"s"),
    "a stand-in": module(b"}" + text("w") + glob("src.X") + b")Rs"),
    "a class": module(b"}" + text("w") + glob("torch.Tensor") + b"s"),
    "modules a list": module(b"}", text("_modules") + b"]"),
    "module no module": module(b"}", text("_modules") + b"}" + text("m") + b"K\x01s"),
    "state a list": b"\x80\x02" + glob("src.modeling.X") + b")\x81]b.",
    "state a number": b"\x80\x02" + glob("src.modeling.X") + b")\x81K\x01b.",
    "state a tuple": b"\x80\x02" + glob("src.modeling.X") + b")\x81N]\x86b.",
    "many states": b"\x80\x02" + glob("src.modeling.X") + b")\x81" + b"}b" * 99 + b".",
    "itself": (
        b"\x80\x02" + glob("src.modeling.X") + b")\x81q\x01}(" + text("_parameters") + b"}"
        + text("_modules") + b"}" + text("m") + b"h\x01sub."
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD_STATES)
def test_malformed_states_of_an_allowed_class(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(ODD_STATES[case])
    refused(path)


def _deep(opening: bytes, closing: bytes, depth: int = 200_000) -> bytes:
    return b"\x80\x02" + opening * depth + closing * depth + b"."


def _branching() -> bytes:
    """Return modules that each hold the previous one twice: 2^60 paths."""
    program = b"\x80\x02" + glob("src.X") + b")\x81}" + text("_parameters") + b"}sb" + b"q\x00"
    for level in range(60):
        program += (
            glob("src.X") + b")\x81}(" + text("_parameters") + b"}" + text("_modules") + b"}("
            + text("a") + b"h" + bytes([level]) + text("b") + b"h" + bytes([level]) + b"uub"
            + b"q" + bytes([level + 1])
        )  # fmt: skip
    return program + b"."


def _repeated_encoding() -> bytes:
    text_of_a_megabyte = text("x" * 1_000_000) + b"q\x00"
    call = glob("_codecs.encode") + b"h\x00" + text("latin1") + b"\x86R"
    return b"\x80\x02](" + text_of_a_megabyte + call * 2000 + b"e."


BOMBS: dict[str, Callable[[], bytes]] = {
    "deep lists": lambda: _deep(b"]", b"a")[:-2] + b".",
    "deep tuples": lambda: b"\x80\x02)" + b"\x85" * 900_000 + b".",
    "deep tuple as a key": lambda: b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
    "deep keys": lambda: b"\x80\x02}(K\x01" + b"\x85" * 3 + b"K\x01u.",
    "many steps": lambda: b"\x80\x02" + b"}0" * 1_000_000 + b".",
    "marks": lambda: b"\x80\x02" + b"(" * 2_000_000 + b".",
    "branching modules": _branching,
    "encoded": _repeated_encoding,
    "memo": lambda: b"\x80\x02Nr\xff\xff\xff\x7f.",
    "equal hashes": lambda: (
        b"\x80\x02}(" + b"".join(number(k * (2**61 - 1)) + b"N" for k in range(5000)) + b"u."
    ),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_end_within_seconds(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(BOMBS[case]())
    began = time.process_time()  # a busy machine does not count
    with pytest.raises(CheckpointError) as raised:
        PickledCheckpoint(path)
    assert "\n" not in str(raised.value)
    assert time.process_time() - began < 20


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return a small module in every container."""
    folder = tmp_path_factory.mktemp("sound")
    for container in CONTAINERS:
        head = ClassificationHead(torch.arange(6.0).reshape(2, 3))
        write_release(head, folder / container, container)
    return {container: (folder / container).read_bytes() for container in CONTAINERS}


@pytest.mark.parametrize("container", CONTAINERS)
def test_truncated_anywhere_is_a_checkpoint_error(
    tmp_path: Path, sound: dict[str, bytes], container: str
) -> None:
    content = sound[container]
    for length in {*range(1, len(content), max(1, len(content) // 150)), len(content) - 1}:
        path = tmp_path / f"{length}.pt"
        path.write_bytes(content[:length])
        refused(path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_flipped_bits_raise_only_checkpoint_errors(
    tmp_path: Path, sound: dict[str, bytes], container: str
) -> None:
    rng = random.Random(container)
    content = sound[container]
    for trial in range(300):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 4))):
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path = tmp_path / f"{trial}.pt"
        path.write_bytes(damaged)
        for opened in (open_checkpoint, PickledCheckpoint):
            assert "\n" not in _problem(opened, path)


def _problem(opened: Callable[[Path], Checkpoint], path: Path) -> str:
    """Return the error of opening a file; empty if it opens."""
    try:
        read_all(opened(path))
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("container", ["zip", "stream", "pickle 2", "pickle 4"])
def test_flipped_bits_never_let_code_run(tmp_path: Path, container: str) -> None:
    rng = random.Random(1)
    canary, path = tmp_path / "canary", tmp_path / "x.pt"
    head = ClassificationHead(torch.zeros(2, 3))
    head.extra = Reduce(os.system, f"touch {canary}")
    write_release(head, path, container)
    content = path.read_bytes()
    for trial in range(200):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        other = tmp_path / f"{trial}.pt"
        other.write_bytes(damaged)
        for opened in (open_checkpoint, PickledCheckpoint):
            _problem(opened, other)  # a flip may turn the call into plain text
    assert not canary.exists()


def test_records_of_a_zip(tmp_path: Path) -> None:
    good = archive(tmp_path / "good.pt", GOOD)
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("archive/data.pkl", "archive/byteorder", "archive/data/0"):
            file.writestr(name, zipfile.ZipFile(good).read(name))
    with pytest.raises(CheckpointError, match="is compressed"):
        PickledCheckpoint(tmp_path / "small.pt")
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
        file.writestr("archive/byteorder", b"big")
    with pytest.raises(CheckpointError, match="big-endian"):
        PickledCheckpoint(tmp_path / "big.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("readme.txt", b"hello")
    with pytest.raises(CheckpointError, match="a zip that torch did not write"):
        PickledCheckpoint(tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "twice.pt", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(CheckpointError, match="twice"):
        PickledCheckpoint(tmp_path / "twice.pt")
