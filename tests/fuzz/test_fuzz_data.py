"""Stored data sets: tar shards, Parquet and .npz, read with every image and label."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fuzzing import PREPROCESS, Ground, mutants
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from stored_sets import write_npz, write_parquet, write_tar

from raymerge.data.decoding import check_image, decode
from raymerge.data.sources import labelled_images, unlabeled_images

CLASSES = ("x", "y")


def originals(write: Callable[[Path, list[tuple[Path, int]]], object], suffix: str) -> bytes:
    """Return the bytes of a data set of four tiny images."""
    with tempfile.TemporaryDirectory() as folder:
        samples = []
        for i in range(4):
            image = Image.new("RGB", (8, 8), (60 * i, 9, 9))
            image.save(Path(folder) / f"{i}.png")
            samples.append((Path(folder) / f"{i}.png", i % 2))
        path = Path(folder) / f"x.{suffix}"
        write(path, samples)
        return path.read_bytes()


TARS = [
    originals(write_tar, "tar"),
    originals(lambda p, s: write_tar(p, s, "json", ['{"label": 1}'] * 4), "tar"),
]
PARQUETS = [
    originals(write_parquet, "parquet"),
    originals(lambda p, s: write_parquet(p, s, CLASSES, row_group_size=2), "parquet"),
    originals(
        lambda p, s: write_parquet(p, s, struct=False, labels=["x", "y", "x", "y"]), "parquet"
    ),
]
NPZS = [
    originals(write_npz, "npz"),
    originals(lambda p, s: write_npz(p, s, compressed=True), "npz"),
]


def read(path: Path) -> None:
    images = unlabeled_images(str(path), "tasks[0].adapt")
    for item in images.items[:8]:
        check_image(item)
        decode(item, PREPROCESS)
    labelled_images(str(path), CLASSES, "tasks[0].test")


def examine(ground: Ground, content: bytes, suffix: str) -> None:
    path = ground.clean() / f"x.{suffix}"
    path.write_bytes(content)
    ground.examine(f".{suffix} data", lambda: read(path))


@given(content=mutants(TARS))
def test_tar(ground: Ground, content: bytes) -> None:
    examine(ground, content, "tar")


FIELDS = {
    "name": (0, 100),
    "size": (124, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "link": (157, 100),
}


@given(
    field=st.sampled_from(sorted(FIELDS)),
    value=st.binary(max_size=12) | st.sampled_from(
        (b"77777777777", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"../x", b"/etc/x.png", b"x", b"L",
         b"1", b"S")
    ),
    header=st.integers(0, 7),
)  # fmt: skip
def test_tar_headers(ground: Ground, field: str, value: bytes, header: int) -> None:
    """The checksum is correct, so that wrong fields reach the reader."""
    content = bytearray(TARS[0])
    start = 1024 * header
    offset, size = FIELDS[field]
    content[start + offset : start + offset + size] = value[:size].ljust(size, b"\0")
    if field != "checksum":
        content[start + 148 : start + 156] = b" " * 8
        total = sum(content[start : start + 512])
        content[start + 148 : start + 156] = f"{total:06o}\0 ".encode()
    examine(ground, bytes(content), "tar")


@given(content=mutants(PARQUETS))
def test_parquet(ground: Ground, content: bytes) -> None:
    examine(ground, content, "parquet")


@given(content=mutants(NPZS))
def test_npz(ground: Ground, content: bytes) -> None:
    examine(ground, content, "npz")


HEADERS = st.builds(
    "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}".format,
    st.sampled_from(("'|u1'", "'|O'", "'<i8'", "[('a', '<f8')]", "'<U999999999'", "x", "'|V9'")),
    st.sampled_from(("False", "True", "None", "__import__('os')")),
    st.sampled_from(("(4, 8, 8, 3)", "(-1, 8, 8)", "(2**40, 1, 1)", "(99999999999999999999, 1, 1)",
                     "(4,)", "()", "(0, 8, 8)", "('a',)", "((((", "(4, 8, 8, 3.0)")),
)  # fmt: skip


@given(header=HEADERS | st.text(max_size=60), method=st.sampled_from((0, 8)))
def test_npz_headers(ground: Ground, header: str, method: int) -> None:
    text = header.encode().ljust(118)
    member = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(768)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("images.npy", member)
        archive.writestr("labels.npy", member if method else npy(np.arange(4) % 2))
    examine(ground, out.getvalue(), "npz")


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()
