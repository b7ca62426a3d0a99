"""Stored data sets: tar shards, Parquet and .npz, read with every image and label."""

from __future__ import annotations

import io
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzzing import PREPROCESS, Ground, mutants
from hypothesis import given, settings
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


def packed(codec: str) -> bytes:
    """Return a data set whose labels unpack to far more than the file has."""
    table = pa.table({"image": [b"x"] * 4, "label": ["y" * (1 << 20), "x", "y", "x"]})
    out = io.BytesIO()
    pq.write_table(table, out, compression=codec)
    return out.getvalue()


LARGE = [packed(codec) for codec in ("zstd", "brotli", "gzip", "snappy")]
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


@given(content=mutants(LARGE))
def test_parquet_pages(ground: Ground, content: bytes) -> None:
    """Pages that unpack to far more than they take, with damaged sizes."""
    examine(ground, content, "parquet")


VALUES = st.sampled_from((0, 1, 1 << 10, 1 << 20, 30 << 20))


@given(
    size=VALUES,
    rows=st.sampled_from((1, 3, 100, 5000)),
    codec=st.sampled_from(("none", "snappy", "zstd", "brotli", "gzip")),
    encoding=st.sampled_from(
        ("dictionary", "PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY")
    ),
    column=st.sampled_from(("image", "label")),
)
@settings(max_examples=max(20, settings.default.max_examples // 25))
def test_parquet_values_that_stand_for_many(
    ground: Ground, size: int, rows: int, codec: str, encoding: str, column: str
) -> None:
    """One value for thousands of rows takes no more memory than a few of them."""
    if encoding != "dictionary" and size * rows > 100 << 20:
        rows = max(1, (100 << 20) // size)  # the writer holds all of them
    one = pa.array([bytes(size) if column == "image" else "x" * size])
    many = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), one)
    other = [b"x"] * rows if column == "label" else [0] * rows
    table = pa.table({column: many if encoding == "dictionary" else many.dictionary_decode(),
                      "label" if column == "image" else "image": other})  # fmt: skip
    how = {"dictionary_pagesize_limit": 1 << 30} if encoding == "dictionary" else {
        "use_dictionary": False, "column_encoding": {column: encoding}}  # fmt: skip
    out = io.BytesIO()
    pq.write_table(table, out, compression=codec, store_schema=False, **how)
    examine(ground, out.getvalue(), "parquet")


@given(content=mutants(NPZS))
def test_npz(ground: Ground, content: bytes) -> None:
    examine(ground, content, "npz")


@given(
    kind=st.sampled_from(b"xgXLKSV17"),
    size=st.sampled_from((0, 1, 20, 600, 70_000, 1 << 20, 1 << 33)),
    content=st.binary(max_size=30)
    | st.sampled_from((b"1", b"9" * 500, b"20 GNU.sparse.map=9,9", b"17 size=99999999", b"9 a=\n"))
    | st.builds(
        "{} {}={}\n".format,
        st.integers(-1, 10**30),
        st.sampled_from(("path", "size", "GNU.sparse.major", "GNU.sparse.map", "hdrcharset")),
        st.sampled_from(("1", "-1", "9" * 400, "../x.png", "BINARY", "1,2,3", "")),
    ).map(str.encode),
    repeat=st.sampled_from((1, 2, 4000)),
)
def test_tar_extended_headers(
    ground: Ground, kind: int, size: int, content: bytes, repeat: int
) -> None:
    """Headers of pax and GNU before a member, of any length, with numbers of many digits."""
    content *= repeat
    info = tarfile.TarInfo("x.png")
    info.type, info.size = bytes([kind]), size or len(content)
    head = info.tobuf(tarfile.GNU_FORMAT)
    examine(ground, head + content + bytes(-len(content) % 512) + TARS[0], "tar")


HEADERS = st.builds(
    "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}".format,
    st.sampled_from(("'|u1'", "'|O'", "'<i8'", "[('a', '<f8')]", "'<U999999999'", "x", "'|V9'",
                     "'<U450000000'", "'<U2000'", "'|b1'")),
    st.sampled_from(("False", "True", "None", "__import__('os')")),
    st.sampled_from(("(4, 8, 8, 3)", "(-1, 8, 8)", "(2**40, 1, 1)", "(99999999999999999999, 1, 1)",
                     "(4,)", "()", "(0, 8, 8)", "('a',)", "((((", "(4, 8, 8, 3.0)")),
)  # fmt: skip


@given(
    header=HEADERS | st.text(max_size=60),
    method=st.sampled_from((0, 8)),
    version=st.integers(0, 4),
    length=st.sampled_from((None, 0, 10_000, 65_535, 1 << 20, 2**32 - 1)),
    rest=st.sampled_from((768, 0, 1 << 20, 40 << 20)),
    fields=st.sampled_from(("images", "labels", "both")),
)
def test_npz_headers(
    ground: Ground, header: str, method: int, version: int, length: int | None, rest: int,
    fields: str,
) -> None:  # fmt: skip
    text = header.encode().ljust(118)
    width = 2 if version < 2 else 4
    size = min(len(text) if length is None else length, 256**width - 1).to_bytes(width, "little")
    member = b"\x93NUMPY" + bytes([version, 0]) + size + text
    member += bytes(rest if method or rest < 1 << 20 else 768)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        images = npy(np.zeros((4, 8, 8, 3), np.uint8))
        archive.writestr("images.npy", images if fields == "labels" else member)
        archive.writestr("labels.npy", npy(np.arange(4) % 2) if fields == "images" else member)
    examine(ground, out.getvalue(), "npz")


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()
