"""Files of the streamed safetensors writer, read back by safetensors' own library."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
import torch
from commands import python
from safetensors.torch import load_file, save_file
from torch import Tensor

from raymerge.errors import CheckpointError
from raymerge.models.checkpoints import safetensors_file
from raymerge.models.checkpoints.checkpoint import TensorSpec, read_tensor
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.checkpoints.safetensors_file import SafetensorsWriter


def _state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "flag": torch.tensor([True, False, True]),
        "proj": torch.randn(7, 11, generator=generator),
        "half": torch.randn(5, generator=generator).half(),
        "brain": torch.randn(3, 3, generator=generator).bfloat16(),
        "double": torch.randn(2, 2, 2, generator=generator, dtype=torch.float64),
        "count": torch.tensor(7),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "bytes": torch.arange(9, dtype=torch.uint8),
        'ünïcode.and "quotes"': torch.ones(1),
    }


def _specs(state: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in state.items()}


def _write(path: Path, state: dict[str, Tensor], part: int = 10**9, seed: int = 0) -> Path:
    """Write every tensor in parts of ``part`` columns, all parts in random order."""
    parts = [
        (name, start, values_n)
        for name, tensor in state.items()
        for start, values_n in zip(
            range(0, tensor.numel(), part), tensor.flatten().split(part), strict=False
        )
    ]
    random.Random(seed).shuffle(parts)
    with SafetensorsWriter(path, _specs(state)) as writer:
        for name, start, values_n in parts:
            writer.write(name, start, values_n)
    return path


def _same(read: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    return read.keys() == state.keys() and all(
        read[name].dtype == t.dtype and read[name].shape == t.shape and torch.equal(read[name], t)
        for name, t in state.items()
    )


@pytest.mark.parametrize("part", [1, 3, 10**9])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_library_reads_what_was_written_in_parts_in_any_order(tmp_path, part, seed):
    path = _write(tmp_path / "x.safetensors", _state(), part, seed)
    assert _same(load_file(path), _state())


def test_the_own_reader_agrees(tmp_path):
    checkpoint = open_checkpoint(_write(tmp_path / "x.safetensors", _state()))
    assert _same({key: read_tensor(checkpoint, key) for key in checkpoint.specs}, _state())


def test_a_file_cut_while_it_is_open_is_an_error(tmp_path, monkeypatch):
    """The library maps what it checks, and is given a copy: a missing page ends the process."""
    path = _write(tmp_path / "x.safetensors", _state())
    mapped = []
    original = safetensors_file.safe_open

    def cut_while_mapped(name: str, framework: str) -> object:
        opened = original(name, framework=framework)
        mapped.append(Path(name))
        os.truncate(path, 0)
        return opened

    monkeypatch.setattr(safetensors_file, "safe_open", cut_while_mapped)
    checkpoint = open_checkpoint(path)
    assert path not in mapped
    assert not mapped[0].exists()
    assert checkpoint.specs.keys() == _state().keys()
    with pytest.raises(CheckpointError, match=r"proj cannot be read .*; fetch it again"):
        read_tensor(checkpoint, "proj")


def test_neither_the_order_of_the_parts_nor_of_the_names_changes_a_byte(tmp_path):
    state = _state()
    one = _write(tmp_path / "a", state, part=2, seed=1).read_bytes()
    two = _write(tmp_path / "b", dict(reversed(state.items())), part=5, seed=2).read_bytes()
    assert one == two


def test_the_file_is_the_librarys_own(tmp_path):
    """Files equal the library's byte for byte, for the dtypes of a model and names in ASCII."""
    dtypes = (torch.int64, torch.float32, torch.float16)
    state = {n: t for n, t in _state().items() if t.dtype in dtypes and n.isascii()}
    save_file(state, tmp_path / "library", metadata={"format": "pt"})
    ours = _write(tmp_path / "ours", state)
    assert ours.read_bytes() == (tmp_path / "library").read_bytes()


def test_every_tensor_is_aligned_to_its_dtype(tmp_path):
    content = _write(tmp_path / "x", _state()).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert (8 + length) % 8 == 0
    for name, tensor in _state().items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_strided_views_are_written_by_value(tmp_path):
    matrix = torch.arange(12.0).view(3, 4)
    with SafetensorsWriter(tmp_path / "x", {"t": TensorSpec((4, 3), torch.float32)}) as writer:
        writer.write("t", 0, matrix.t())
    assert torch.equal(load_file(tmp_path / "x")["t"], matrix.t())


def test_a_file_without_tensors(tmp_path):
    assert load_file(_write(tmp_path / "x", {})) == {}


def test_a_full_disk_is_detected_before_writing(tmp_path, monkeypatch):
    def full(handle: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        SafetensorsWriter(tmp_path / "x", _specs(_state()))


def test_a_real_limit_on_the_file_is_an_os_error(tmp_path):
    code = """
import resource, signal, sys
from pathlib import Path
import torch
from raymerge.models.checkpoints.opening import TensorSpec
from raymerge.models.checkpoints.safetensors_file import SafetensorsWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
SafetensorsWriter(Path(sys.argv[1]), {"small": TensorSpec((100,), torch.float32)})
try:
    SafetensorsWriter(Path(sys.argv[1]), {"large": TensorSpec((100_000,), torch.float32)})
except OSError as error:
    print(error.strerror)
"""
    ran = python(code, tmp_path / "x")
    assert (ran.returncode, ran.stdout) == (0, "File too large\n"), ran.stderr
