"""Files and folders that are no checkpoints: each is named, with the command that helps."""

from __future__ import annotations

import gzip
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from raymerge.errors import CheckpointError
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.resolve import resolve_folder

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 605247071\n"


def _script(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def _tar(path: Path) -> None:
    member = path.with_suffix(".txt")
    member.write_text("a")
    with tarfile.open(path, "w") as tar:
        tar.add(member, "a.txt")


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.pt", b"x")


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "lfs": (lambda p: p.write_bytes(POINTER), "Git LFS pointer .*`git lfs pull`"),
    "html": (lambda p: p.write_bytes(b"\n<!DOCTYPE html><html>404"), "web page.*download the file"),
    "script": (_script, "TorchScript archive; .*pretrained: openai.*state_dict"),
    "tar": (_tar, "tar archive; unpack it"),
    "zip": (_zip, "zip archive that torch did not write; unpack it"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x" * 99)), "gzip archive; unpack it"),
    "npz": (lambda p: np.savez(p.open("wb"), a=np.zeros(3)), "NumPy archive"),
    "npy": (lambda p: np.save(p.open("wb"), np.zeros(3)), "NumPy array"),
    "gguf": (lambda p: p.write_bytes(b"GGUF" + bytes(64)), "GGUF"),
    "json": (lambda p: p.write_text(json.dumps({"architectures": ["CLIPModel"]})), "JSON file"),
    "hdf5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64)), "HDF5"),
    "parquet": (lambda p: p.write_bytes(b"PAR1" + bytes(64)), "Parquet table"),
    "text": (lambda p: p.write_bytes(b"Entry not found"), r"text \('Entry not found'\)"),
    "annex": (lambda p: p.write_bytes(b"/annex/objects/SHA256E-s3--abc"), "`git annex get`"),
    "dvc": (lambda p: p.write_bytes(b"outs:\n- md5: 0aa\n  path: x.pt\n"), "`dvc pull`"),
    "zeros": (lambda p: p.write_bytes(bytes(4096)), "zeros, as of an unfinished download"),
    "image": (lambda p: p.write_bytes(b"\xff\xd8\xff\xe0" + bytes(64)), "JPEG image"),
    "arrow": (lambda p: p.write_bytes(b"ARROW1" + bytes(64)), "Arrow table"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_file_of_another_kind_is_named_with_its_remedy(
    tmp_path: Path, kind: str, name: str
) -> None:
    make, message = FILES[kind]
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"checkpoint .*{name}: is an? .*{message}"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("suffix", [".onnx", ".msgpack", ".pb", ".tflite", ".distcp"])
def test_other_formats_are_named_by_their_suffix(tmp_path: Path, suffix: str) -> None:
    path = (tmp_path / "x").with_suffix(suffix)
    path.write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(64))
    with pytest.raises(CheckpointError, match=r"is (an?|one) .*; "):
        open_checkpoint(path)


def _weights(folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, folder / "adapter_model.safetensors")


def test_a_checkpoint_one_level_down_is_named(tmp_path: Path) -> None:
    for name in ("checkpoint-500", "checkpoint-1000"):
        _weights(tmp_path / "run" / name)
    (tmp_path / "run" / "logs").mkdir()
    torch.save({}, tmp_path / "run" / "optimizer.pt")
    message = rf"its subfolder checkpoint-1000, checkpoint-500 does: name {tmp_path}/run/checkpoint"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "run")


def test_a_folder_with_a_file_of_an_unknown_name_names_it(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=rf"it holds last.ckpt: name .*{tmp_path}/last.ckpt"):
        open_checkpoint(tmp_path)


def test_a_file_several_levels_down_is_named(tmp_path: Path) -> None:
    file = tmp_path / "version_0" / "checkpoints" / "epoch=3.ckpt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    (tmp_path / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"holds version_0/checkpoints/epoch=3.ckpt: name"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("flax_model.msgpack", "is a Flax model: .*from_flax"),
        ("tf_model.h5", "is a TensorFlow model: .*from_tf"),
        ("saved_model.pb", "TensorFlow SavedModel"),
        ("_CHECKPOINT_METADATA", "Orbax"),
        ("model.onnx", "ONNX"),
        ("data-00000-of-00001.arrow", "Arrow files, without weights"),
        ("below/__0_0.distcp", "below is a distributed checkpoint: .*dcp_to_torch .*below"),
    ],
)
def test_a_folder_of_another_kind_is_named(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.pt").symlink_to("blobs/abc")
    with pytest.raises(CheckpointError, match="is a link to blobs/abc, which does not exist"):
        open_checkpoint(tmp_path / "x.pt")


def test_a_config_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"config.json: is a Git LFS pointer .*git lfs pull"):
        resolve_folder(tmp_path)


def test_what_a_folder_lacks_to_be_a_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="so no model; name the folder of a whole model"):
        resolve_folder(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"arch: ViT-B-32, pretrained: .*model.safetensors"):
        resolve_folder(tmp_path)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"subfolder checkpoint-5 does: write local-dir:"):
        resolve_folder(tmp_path)
    _weights(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="it is an adapter, which can be a task's checkpoint"):
        resolve_folder(tmp_path / "adapter")


def test_distributed_checkpoints_are_named(tmp_path: Path) -> None:
    for name, files in (("dcp", [".metadata", "__0_0.distcp"]), ("zero", ["zero_to_fp32.py"])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=rf"distributed checkpoint: .*dcp_to_torch {tmp_path}"
    ):
        open_checkpoint(tmp_path / "dcp")
    with pytest.raises(CheckpointError, match=r"ZeRO checkpoint: run `python zero_to_fp32"):
        open_checkpoint(tmp_path / "zero")


def test_a_bare_hub_id_is_told_its_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="write hf-hub:openai/clip-vit-base-patch32"):
        open_checkpoint("openai/clip-vit-base-patch32")
    # A config's paths are absolute by then.
    with pytest.raises(CheckpointError, match="write hf-hub:openai/clip-vit-base-patch32"):
        open_checkpoint(tmp_path / "openai/clip-vit-base-patch32")
    with pytest.raises(CheckpointError, match=r"no such file; check the path$"):
        open_checkpoint(tmp_path / "experts/eurosat.safetensors")
