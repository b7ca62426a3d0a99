"""The images of a folder, written as the data sets that others store; for tests."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Sample = tuple[Path, int]
"""An image file and its class."""


def samples_of(folder: str | Path, classnames: Sequence[str] | None = None) -> list[Sample]:
    """In the order in which raymerge lists the folder; −1 where there are no class folders."""
    root = Path(folder)
    if classnames is None:
        return [(path, -1) for path in sorted(root.rglob("*.png"))]
    return [
        (path, label)
        for label, name in enumerate(classnames)
        for path in sorted((root / name).rglob("*.png"))
    ]


def write_parquet(
    path: Path,
    samples: Sequence[Sample],
    names: Sequence[str] | None = None,
    *,
    struct: bool = True,
    columns: tuple[str, str] = ("image", "label"),
    row_group_size: int = 5,
    labels: Sequence[Any] | None = None,
) -> Path:
    """As `datasets` writes it, with ClassLabel names if given."""
    contents = [file.read_bytes() for file, _ in samples]
    if struct:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        rows = [
            {"bytes": c, "path": file.name}
            for c, (file, _) in zip(contents, samples, strict=True)
        ]  # fmt: skip
        images = pa.array(rows, kind)
    else:
        images = pa.array(contents, pa.binary())
    values = pa.array(labels if labels is not None else [label for _, label in samples])
    table = pa.table(dict(zip(columns, (images, values), strict=True)))
    if names is not None:
        features = {
            columns[0]: {"_type": "Image"},
            columns[1]: {"names": list(names), "_type": "ClassLabel"},
        }
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def write_tar(
    path: Path, samples: Sequence[Sample], kind: str | None = "cls", texts: Sequence[str] = ()
) -> Path:
    """``texts``: the labels' files, by sample; default: the class numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for i, (file, label) in enumerate(samples):
            add(shard, f"{i:05}.png", file.read_bytes())
            if kind is not None:
                add(shard, f"{i:05}.{kind}", (texts[i] if texts else str(label)).encode())
    return path


def add(shard: tarfile.TarFile, name: str, content: bytes, **changes: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in changes.items():
        setattr(member, key, value)
    shard.addfile(member, io.BytesIO(content))


def pixels_of(samples: Sequence[Sample]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file, _ in samples])


def write_npz(path: Path, samples: Sequence[Sample], *, compressed: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: Mapping[str, np.ndarray] = {
        "images": pixels_of(samples),
        "labels": np.array([label for _, label in samples]),
    }
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path
