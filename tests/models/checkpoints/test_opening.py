"""Checkpoints open by content, lazily and safely; every failure is a CheckpointError."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raymerge.errors import CheckpointError
from raymerge.models.checkpoints.checkpoint import TensorSpec, read_tensor
from raymerge.models.checkpoints.opening import open_checkpoint


def _state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "visual.proj": torch.randn(4, 6, generator=generator),
        "visual.bias": torch.randn(5, generator=generator).half(),
        "visual.gain": torch.randn(3, 2, generator=generator).bfloat16(),
        "visual.scale": torch.tensor(2.5, dtype=torch.float64),
        "visual.count": torch.tensor([7, 8]),
    }


def _save_legacy(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "safetensors": save_file,
    "torch zip": torch.save,
    "torch legacy": _save_legacy,
    "state_dict nested": lambda s, p: torch.save({"epoch": 3, "state_dict": s}, p),
    "model_state_dict nested": lambda s, p: torch.save({"model_state_dict": s, "lr": 0.1}, p),
    "ordered dict": lambda s, p: torch.save(OrderedDict(s), p),
    "parameters": lambda s, p: torch.save(
        {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()}, p
    ),
    "other entries": lambda s, p: torch.save({**s, "epoch": 3, "name": "x"}, p),
}


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x"])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_reads_back_bit_for_bit(tmp_path, writer, name):
    state = _state()
    WRITERS[writer](state, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name)
    assert checkpoint.kind == ("safetensors" if writer == "safetensors" else "torch")
    assert dict(checkpoint.specs) == {
        key: TensorSpec(tuple(t.shape), t.dtype) for key, t in state.items()
    }
    for key, tensor in state.items():
        read = read_tensor(checkpoint, key)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        assert not read.requires_grad


def test_a_safetensors_suffix_decides_the_format(tmp_path):
    torch.save(_state(), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: damaged safetensors file"):
        open_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("out", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("writer", WRITERS)
def test_fill_writes_any_columns_of_the_flattened_tensor_in_any_float_dtype(tmp_path, writer, out):
    state = _state()
    WRITERS[writer](state, tmp_path / "x")
    checkpoint = open_checkpoint(tmp_path / "x")
    for key in ("visual.proj", "visual.bias", "visual.gain"):
        flat = state[key].flatten()
        for start, stop in ((0, len(flat)), (2, 5), (4, 5), (3, 3)):
            out_n = torch.full((stop - start,), torch.nan, dtype=out)
            checkpoint.fill(key, start, out_n)
            assert torch.equal(out_n, flat[start:stop].to(out))
            strided_n = torch.full((2, stop - start), torch.nan, dtype=out).t()[:, 0]
            checkpoint.fill(key, start, strided_n)
            assert torch.equal(strided_n, flat[start:stop].to(out))


def test_a_tensor_is_read_in_the_requested_dtype(tmp_path):
    save_file(_state(), tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    read = read_tensor(checkpoint, "visual.gain", torch.float32)
    assert torch.equal(read, _state()["visual.gain"].float())


def test_a_file_that_was_cut_after_it_was_opened_is_a_checkpoint_error(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(_state(), path)
    checkpoint = open_checkpoint(path)
    os.truncate(path, path.stat().st_size - 60)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .* cannot be read \(the file ends"):
        [read_tensor(checkpoint, key) for key in checkpoint.specs]


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("writer", "suffix"),
    [
        ("safetensors", "safetensors"),
        ("safetensors", "pt"),
        ("torch zip", "pt"),
        ("torch legacy", "pt"),
    ],
)
def test_truncated_at_any_length_is_a_checkpoint_error(tmp_path, writer, suffix):
    whole = tmp_path / "whole"
    WRITERS[writer](_state(), whole)
    content = whole.read_bytes()
    lengths = {*range(0, len(content), max(1, len(content) // 60)), *range(24), len(content) - 1}
    for length in sorted(lengths):
        path = tmp_path / f"cut.{suffix}"
        path.unlink(missing_ok=True)
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=rf"cut\.{suffix}") as raised:
            _read_everything(path)
        assert "\n" not in str(raised.value), length


@pytest.mark.parametrize("writer", ["safetensors", "torch zip", "torch legacy"])
def test_flipped_bytes_never_escape_as_another_exception(tmp_path, writer):
    whole = tmp_path / "whole"
    WRITERS[writer](_state(), whole)
    content = whole.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 80)):
        damaged = bytearray(content)
        damaged[position] ^= 0x5A
        path = tmp_path / "flipped.pt"
        path.unlink(missing_ok=True)
        path.write_bytes(bytes(damaged))
        with contextlib.suppress(CheckpointError):  # a flip inside a number cannot be detected
            _read_everything(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"hello world, this is no checkpoint",
        b"PK\x03\x04 not a zip",
        b"\x80\x02.",
        b"{}" * 9,
    ],
)
def test_files_that_are_not_checkpoints_are_refused(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt") as raised:
        open_checkpoint(path)
    assert "\n" not in str(raised.value)


def test_a_safetensors_header_longer_than_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="damaged safetensors file"):
        open_checkpoint(path)


@pytest.mark.parametrize("value", [[1, 2], 3.5, {"epoch": 3}, {}, torch.zeros(3)])
def test_a_file_without_a_state_dict(tmp_path, value):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt: holds (a|no) .*state dict"):
        open_checkpoint(tmp_path / "x.pt")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such file"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds none of open_clip_model\.safetensors, "):
        open_checkpoint(tmp_path)


def _read_everything(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for key in checkpoint.specs:
        read_tensor(checkpoint, key)


# --- safety ------------------------------------------------------------------------------------


class _Bomb:
    """An object that runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self._marker}",)


BOMBS: dict[str, Callable[[Any, Path], None]] = {
    "torch zip": torch.save,
    "torch legacy": _save_legacy,
    "plain pickle": lambda value, path: path.write_bytes(
        pickle.dumps({"x": value["x"]}, protocol=2)
    ),
}


@pytest.mark.parametrize("writer", BOMBS)
def test_a_pickle_that_would_run_code_is_refused_by_name_and_does_not_run(tmp_path, writer):
    marker, path = tmp_path / "ran", tmp_path / "bomb.pt"
    BOMBS[writer]({"visual.proj": torch.zeros(2), "x": _Bomb(marker)}, path)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path)
    assert not marker.exists()
    message = str(raised.value)
    assert "bomb.pt: refused: the pickle wants" in message
    assert f"{os.system.__module__}.system" in message  # posix.system
    assert "\n" not in message
    # An unsafe reader runs the command.
    if writer == "plain pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_pickle_of_a_protocol_that_torch_never_writes_is_refused_and_does_not_run(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "bomb.pt"
    path.write_bytes(pickle.dumps({"x": _Bomb(marker)}, protocol=5))
    with pytest.raises(CheckpointError, match=r"bomb\.pt: refused"):
        open_checkpoint(path)
    assert not marker.exists()


class _Encoder(torch.nn.Linear):
    """A module of a package that no release uses."""


def test_a_pickled_module_of_an_unknown_package_is_refused_by_name(tmp_path):
    torch.save(_Encoder(2, 2), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"refused: the pickle wants .*_Encoder.*state_dict"):
        open_checkpoint(tmp_path / "x.pt")


# --- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["{}", "local-dir:{}", "{}/open_clip_model.safetensors"])
def test_an_open_clip_folder_stands_for_its_weights(tmp_path, reference):
    save_file(_state(), tmp_path / "open_clip_model.safetensors")
    checkpoint = open_checkpoint(reference.format(tmp_path))
    assert checkpoint.path == tmp_path / "open_clip_model.safetensors"


def test_safetensors_are_preferred_to_the_pickle_beside_them(tmp_path):
    torch.save({"old": torch.zeros(1)}, tmp_path / "open_clip_pytorch_model.bin")
    assert set(open_checkpoint(tmp_path).specs) == {"old"}
    save_file({"new": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    assert set(open_checkpoint(tmp_path).specs) == {"new"}


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(2**40), "expanded or without numbers; save it dense"),
        (
            torch.zeros(1).as_strided((2**20, 2**20), (0, 0)),
            "expanded or without numbers; save it dense",
        ),
        (torch.eye(3).to_sparse(), "sparse, quantized"),
        (torch.zeros(3, device="meta"), "sparse, quantized"),
    ],
)
def test_a_tensor_larger_than_its_file_is_refused(tmp_path, tensor, message):
    """torch repeats a number as often as the strides say; a copy would fill the memory."""
    torch.save({"a": tensor}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("header", [b'{"a":', b'{"a":' + b"[" * 50_000, b'{"a":{"dtype":3}}'])
def test_malformed_safetensors_headers_are_refused(tmp_path, header):
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="damaged safetensors file"):
        open_checkpoint(tmp_path / "x.safetensors")
