"""Image files: damaged files of every supported format, and Pillow's other formats."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from fuzzing import PREPROCESS, Ground, mutants
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from raymerge.data.decoding import check_image, decode
from raymerge.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(outside/canary) (w) file closefile\n%%EOF\n"
)


def saved(kind: str, **how: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, kind, **how)
    return out.getvalue()


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """Return a PNG with any size in its header."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checked

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(rows)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


FILES = [
    saved("PNG"), saved("JPEG"), saved("JPEG", progressive=True), saved("GIF"), saved("BMP"),
    saved("TIFF"), saved("TIFF", compression="tiff_lzw"), saved("TIFF", compression="jpeg"),
    saved("WEBP"), saved("PPM"), EPS,
]  # fmt: skip
SIZES = st.sampled_from((0, 1, 2, 100, 60_000, 2**20, 2**31 - 1, 2**32 - 1))


def read(path: Path) -> None:
    error = check_image(path)
    decode(path, PREPROCESS)
    if error is not None:
        raise error


@given(
    content=mutants(FILES) | st.builds(png, SIZES, SIZES),
    name=st.sampled_from(("x.png", "x.jpg", "x.gif", "x.webp", "x.tif", "x.bmp", "x.ppm")),
)
@pytest.mark.filterwarnings("ignore")
def test_images(ground: Ground, content: bytes, name: str) -> None:
    path = ground.clean() / name
    path.write_bytes(content)
    ground.examine("images", lambda: read(path))


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "DDS"])
def test_unsupported_formats_are_refused(ground: Ground, kind: str) -> None:
    path = ground.clean() / "x.jpg"
    path.write_bytes(saved(kind))
    with pytest.raises(DataError, match="does not decode"):
        decode(path, PREPROCESS)
