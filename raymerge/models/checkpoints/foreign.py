"""Say what a file or folder is that is no checkpoint, and which command helps.

People have pointers instead of files, error pages instead of downloads, and other programs'
formats. Each is recognised by its content before a reader is tried, and refused by one line.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from raymerge.errors import CheckpointError

HEAD_BYTES = 512

_UNPACK = "unpack it, and name the checkpoint that was in it"
_EXPORT = "save the model's state_dict with torch.save or safetensors, and name that file"

# What a file is by its first bytes, and the remedy.
_MAGIC: Sequence[tuple[bytes, str, str]] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer instead of the file",
        "run `git lfs pull` in its repository",
    ),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"GGUF", "a GGUF file of llama.cpp", _EXPORT),
    (b"\x89HDF", "an HDF5 file of Keras or TensorFlow", _EXPORT),
    (b"\x93NUMPY", "a NumPy array", _EXPORT),
    (b"ARROW1", "an Arrow table, which holds data and no weights", "name the weights"),
    (b"PAR1", "a Parquet table, which holds data and no weights", "name the weights"),
)
_SUFFIXES = {
    ".onnx": ("an ONNX graph", _EXPORT),
    ".msgpack": (
        "a Flax checkpoint",
        "load it with from_flax=True in transformers, and save_pretrained it",
    ),
    ".pb": ("a TensorFlow graph", _EXPORT),
    ".h5": ("a Keras file", _EXPORT),
    ".tflite": ("a TensorFlow Lite model", _EXPORT),
    ".distcp": (
        "one part of a distributed checkpoint",
        "run `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER OUT.pt`, and "
        "name OUT.pt",
    ),
}
_TORCHSCRIPT = (
    "a TorchScript archive",
    "for OpenAI's CLIP write pretrained: openai, or save torch.jit.load(FILE).state_dict() and "
    "name that file",
)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_LISTED = 3
_MAX_ENTRIES = 1000


def require_checkpoint(path: Path, head: bytes) -> None:
    """Raise :class:`CheckpointError` for a file that is recognised as something else.

    ``head``: its first :data:`HEAD_BYTES` bytes.
    """
    what = _foreign(path, head)
    if what is not None:
        raise CheckpointError(f"checkpoint {path}: is {what[0]}; {what[1]}")


def _foreign(path: Path, head: bytes) -> tuple[str, str] | None:
    """Return what a file is, and the remedy; None if it may be a checkpoint."""
    for magic, what, remedy in _MAGIC:
        if head.startswith(magic):
            return what, remedy
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page", "it may be an error or a login page; download the file itself"
    if text[:1] in (b"{", b"["):
        return "a JSON file, which holds no weights", "name the weights file, or its folder"
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if head.startswith(b"PK\x03\x04"):
        return _foreign_zip(path)
    return _SUFFIXES.get(path.suffix.lower())


def _foreign_zip(path: Path) -> tuple[str, str] | None:
    """Return what a zip is, unless it is torch's."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return None  # damaged, as the reader will say
    leaves = {name.partition("/")[2] for name in names}
    if "constants.pkl" in leaves or any(leaf.startswith("code/") for leaf in leaves):
        return _TORCHSCRIPT
    if "data.pkl" in leaves:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)", _EXPORT
    return "a zip archive that torch did not write", _UNPACK


# --- folders -------------------------------------------------------------------------------------


def folder_remedy(folder: Path, holds_weights: Callable[[Path], bool]) -> str:
    """Return what a folder without weights of a known name is, and what to name instead.

    ``holds_weights``: says so of a folder. Empty if nothing helps.
    """
    entries = sorted(folder.iterdir())[:_MAX_ENTRIES]
    names = {entry.name for entry in entries}
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return _with(folder, "a distributed checkpoint", _SUFFIXES[".distcp"][1])
    if "zero_to_fp32.py" in names or any(name.startswith("zero_pp_rank") for name in names):
        remedy = "run `python zero_to_fp32.py . OUT` in it, and name OUT"
        return _with(folder, "a DeepSpeed ZeRO checkpoint", remedy)
    below = [entry.name for entry in entries if entry.is_dir() and holds_weights(entry)]
    if below:
        return f"; its subfolder {_listed(below)} does: name {folder / below[0]}"
    files = [entry.name for entry in entries if entry.suffix in _WEIGHT_SUFFIXES]
    if files:
        return f"; it holds {_listed(files)}: name the file, such as {folder / files[0]}"
    return "; name a folder or file that holds weights"


def _with(folder: Path, what: str, remedy: str) -> str:
    return f"; it is {what}: {remedy.replace('FOLDER', str(folder))}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
