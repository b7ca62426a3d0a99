"""Say what a file or folder is that is no checkpoint, and which command helps.

People have pointers instead of files, error pages instead of downloads, and other programs'
formats. Each is recognised by its content before a reader is tried, and refused by one line.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from raymerge.errors import CheckpointError, excerpt

HEAD_BYTES = 512
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")

_UNPACK = "unpack it, and name the checkpoint that was in it"
_EXPORT = "save the model's state_dict with torch.save or safetensors, and name that file"
_WEIGHTS = "name the weights file, or its folder"
_AGAIN = "download the file itself"
_FLAX = "load it with from_flax=True in transformers, and save_pretrained it"
_TENSORFLOW = "load it with from_tf=True in transformers, and save_pretrained it"
_DCP = (
    "run `python -m torch.distributed.checkpoint.format_utils dcp_to_torch {} OUT.pt`, and name "
    "OUT.pt"
)

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
    (b"lmgg", "a GGML file of llama.cpp", _EXPORT),
    (b"tjgg", "a GGML file of llama.cpp", _EXPORT),
    (b"\x89HDF", "an HDF5 file of Keras or TensorFlow", _EXPORT),
    (b"\x93NUMPY", "a NumPy array", _EXPORT),
    (b"ARROW1", "an Arrow table, which holds data and no weights", _WEIGHTS),
    (b"PAR1", "a Parquet table, which holds data and no weights", _WEIGHTS),
    (b"\xff\xd8\xff", "a JPEG image", _WEIGHTS),
    (b"\x89PNG", "a PNG image", _WEIGHTS),
    (b"%PDF", "a PDF document", _WEIGHTS),
    (b"\0" * HEAD_BYTES, "a file that starts with zeros, as of an unfinished download", _AGAIN),
)
_SUFFIXES = {
    ".onnx": ("an ONNX graph", _EXPORT),
    ".msgpack": ("a Flax checkpoint", _FLAX),
    ".pb": ("a TensorFlow graph", _EXPORT),
    ".h5": ("a Keras file", _EXPORT),
    ".tflite": ("a TensorFlow Lite model", _EXPORT),
    ".mlmodel": ("a Core ML model", _EXPORT),
    ".engine": ("a TensorRT engine", _EXPORT),
    ".distcp": ("one part of a distributed checkpoint", _DCP.format("FOLDER")),
    **dict.fromkeys(
        (".part", ".partial", ".crdownload", ".incomplete", ".aria2"),
        ("an unfinished download", "let it finish, or fetch it again"),
    ),
}
# Texts that stand for a file which is elsewhere.
_POINTERS: Sequence[tuple[re.Pattern[bytes], str, str]] = (
    (re.compile(rb"/annex/objects/"), "a git-annex pointer", "run `git annex get` on it"),
    (re.compile(rb"outs:\s*- (?:md5|etag|hash)"), "a DVC pointer", "run `dvc pull` on it"),
)
_TORCHSCRIPT = (
    "a TorchScript archive",
    "for OpenAI's CLIP write pretrained: openai, or save torch.jit.load(FILE).state_dict() and "
    "name that file",
)
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]+")
_TEXT_PICKLE = re.compile(rb"\(|[cip][\w.]*\n")  # protocol 0 writes text
_MAX_LISTED = 3
_MAX_ENTRIES = 1000
_MAX_FOLDERS = 100
_MAX_DEPTH = 4


def require_checkpoint(path: Path, head: bytes) -> None:
    """Raise :class:`CheckpointError` for a file that is recognised as something else.

    ``head``: its first :data:`HEAD_BYTES` bytes.
    """
    foreign = _foreign(path, head)
    if foreign is not None:
        raise CheckpointError(f"checkpoint {path}: is {foreign[0]}; {foreign[1]}")


def pointer_remedy(path: Path) -> str:
    """Return what a file is that cannot be read as JSON, and the remedy; empty if unknown."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return ""
    is_json = head.lstrip()[:1] in (b"{", b"[")
    foreign = None if is_json or not head else _foreign(path, head)
    return f"is {foreign[0]}; {foreign[1]}" if foreign else ""


def _foreign(path: Path, head: bytes) -> tuple[str, str] | None:
    """Return what a file is, and the remedy; None if it may be a checkpoint."""
    for magic, what, remedy in _MAGIC:
        if head.startswith(magic):
            return what, remedy
    if head.startswith(b"PK\x03\x04"):
        return _foreign_zip(path)
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if head[:1] == b"\x80":  # a pickle
        return None
    return _foreign_text(head) or _SUFFIXES.get(path.suffix.lower())


def _foreign_text(head: bytes) -> tuple[str, str] | None:
    """Return what a text is; None if the file is binary, or a pickle in letters."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        remedy = f"it may be an error, a login page or the page about the file; {_AGAIN}"
        return "a web page", f"{remedy} (on hubs /resolve/ or /raw/ instead of /blob/)"
    if text[:1] in (b"{", b"["):
        return "a JSON file, which holds no weights", _WEIGHTS
    for pattern, what, remedy in _POINTERS:
        if pattern.search(head):
            return what, remedy
    if _TEXT.fullmatch(head) and len(text) > 1 and not _TEXT_PICKLE.match(head):
        words = excerpt(text.decode("ascii").strip(), 40)
        return f"a text ({words})", f"it may be a message instead of the file; {_AGAIN}"
    return None


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
    if "archive_format" in leaves:
        return "an archive of torch.export", _EXPORT
    if "data.pkl" in leaves:
        return None
    if "model.weights.h5" in names:
        return "a Keras archive", _EXPORT
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)", f"load it with its library (open_clip), then {_EXPORT}"
    return "a zip archive that torch did not write", _UNPACK


# --- folders -------------------------------------------------------------------------------------

# What a folder is by the files in it, and the remedy; ``{}`` becomes the folder.
_FOLDERS: Sequence[tuple[re.Pattern[str], str, str]] = (
    (
        re.compile(r"zero_to_fp32\.py|.*zero_pp_rank_.*"),
        "a DeepSpeed ZeRO checkpoint",
        "run `python zero_to_fp32.py . OUT` in {}, and name OUT",
    ),
    (re.compile(r".*\.distcp"), "a distributed checkpoint", _DCP),
    (re.compile(r"flax_model.*\.msgpack"), "a Flax model", _FLAX),
    (re.compile(r"tf_model.*\.h5|.*\.ckpt\.index"), "a TensorFlow model", _TENSORFLOW),
    (re.compile(r"saved_model\.pb"), "a TensorFlow SavedModel", _EXPORT),
    (re.compile(r"_CHECKPOINT_METADATA|_METADATA"), "an Orbax checkpoint of JAX", _EXPORT),
    (re.compile(r".*\.onnx"), "an ONNX model", _EXPORT),
    (re.compile(r".*\.gguf"), "a GGUF model", _EXPORT),
    (re.compile(r".*\.arrow"), "a data set in Arrow files, without weights", _WEIGHTS),
)
# Files that training code writes beside a model; no remedy names them.
_TRAINING_FILES = re.compile(
    r"(?:optimizer|scheduler|scaler|rng_state.*|training_args|random_.*)\."
)


def folder_remedy(folder: Path, holds_weights: Callable[[Path], bool]) -> str:
    """Return what a folder without weights of a known name is, and what to name instead.

    ``holds_weights``: says so of a folder.
    """
    files: list[Path] = []
    folders: list[Path] = []
    for below in _walk(folder):
        kind = _folder_kind(below)
        if kind:
            return f"; {'it' if below == folder else below} is {kind}"
        if below != folder and holds_weights(below):
            folders.append(below)
        files += [each for each in _entries(below) if _is_weights(each)]
    if folders:
        names = _listed([str(each.relative_to(folder)) for each in folders])
        return f"; its subfolder {names} does: name {folders[0]}"
    if files:
        names = _listed([str(each.relative_to(folder)) for each in files])
        return f"; it holds {names}: name the file, such as {files[0]}"
    return "; name a folder or file that holds weights"


def _walk(folder: Path) -> Iterator[Path]:
    """Yield a folder and those below it, the nearest first; few, and no links."""
    level = [folder]
    for _ in range(_MAX_DEPTH):
        yield from level
        below = (each for parent in level for each in _entries(parent))
        folders = (each for each in below if each.is_dir() and not each.is_symlink())
        level = list(islice(folders, _MAX_FOLDERS))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())[:_MAX_ENTRIES]
    except OSError:  # no permission
        return []


def _folder_kind(folder: Path) -> str:
    """Return what a folder is, and the remedy; empty if it is none of the known kinds."""
    names = [entry.name for entry in _entries(folder)]
    for pattern, what, remedy in _FOLDERS:
        if any(pattern.fullmatch(name) for name in names):
            return f"{what}: {remedy.format(folder)}"
    return ""


def _is_weights(path: Path) -> bool:
    is_model = path.suffix in WEIGHT_SUFFIXES and not _TRAINING_FILES.match(path.name)
    return is_model and path.is_file()


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
