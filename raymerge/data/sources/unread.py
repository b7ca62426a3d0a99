"""The forms of data sets that are not read, recognised by name, with what to do about each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_UNPACK = "unpack {it}, and name the folder of images"
_CONVERT = "convert the images to PNG or JPEG"
_REWRITE = "write the images as a folder, or as Parquet with to_parquet of datasets"
_ARROW = (
    "holds Arrow files, as save_to_disk of datasets writes them",
    "write each split with split.to_parquet(FILE) and name that file",
)
_FORMS: dict[str, tuple[str, str]] = {
    ".arrow": _ARROW,
    **dict.fromkeys((".zip", ".rar", ".7z"), ("holds archives", _UNPACK)),
    **dict.fromkeys((".tgz", ".tbz2", ".txz"), ("holds compressed archives", _UNPACK)),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst"), ("holds compressed files", _UNPACK)),
    **dict.fromkeys(
        (".avif", ".heic", ".heif", ".jp2", ".jxl", ".svg", ".jfif", ".tga", ".eps", ".pdf"),
        ("holds images of another format", _CONVERT),
    ),
    **dict.fromkeys((".mat", ".h5", ".hdf5", ".npy"), ("holds arrays", "save them with np.savez")),
    **dict.fromkeys(
        (".mdb", ".lmdb", ".beton", ".tfrecord", ".tfrecords", ".rec", ".pkl", ".pickle", ".jsonl",
         ".csv", ".tsv"),
        ("holds records", _REWRITE),
    ),
}  # fmt: skip
_TORCHVISION = {"ubyte": "MNIST", "data_batch_1": "CIFAR10"}
"""The ends of names that torchvision's own data sets have, by whose files they are."""


def other_form(root: Path, files: Iterable[Path]) -> str:
    """Return what a folder without images is, and the remedy; "" if that is not known.

    ``files``: those in it and in the folders below.
    """
    snapshots = root / "snapshots"
    if snapshots.is_dir():
        newest = max(snapshots.iterdir(), key=lambda path: path.stat().st_mtime, default=snapshots)
        return f"is a folder of the hub's cache; name {newest}, or write hf:ORG/NAME:SPLIT"
    for path in files:
        if path.suffix.lower() == ".tar":
            return f"holds tar shards in {path.parent.name}; name {path.parent}"
        for end, name in _TORCHVISION.items():
            if path.name.removesuffix(".gz").endswith(end):
                return (
                    f"holds {path.name}, as {name} of torchvision has it; write "
                    f"torchvision:{name}:test?root=DIR with torchvision's root"
                )
        if path.suffix.lower() in _FORMS:
            what, remedy = _FORMS[path.suffix.lower()]
            return f"{what} ({path.name}); {remedy.format(it='them')}"
    return ""


def remedy_of(path: Path) -> str:
    """Return what to do with a single file of another form; "" if that is not known."""
    return _FORMS.get(path.suffix.lower(), ("", ""))[1].format(it="it")
