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


def saved_as(mode: str, kind: str) -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(PIXELS)
    (Image.new("LAB", (24, 20)) if mode == "LAB" else image.convert(mode)).save(out, kind)
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


def deep(kind: str, dtype: type, scale: float = 255) -> bytes:
    """Return a grey image of more than 8 bits."""
    out = io.BytesIO()
    Image.fromarray((PIXELS[..., 0] * scale).astype(dtype)).save(out, kind)
    return out.getvalue()


def webp(kind: bytes, width: int, height: int, rest: bytes = b"") -> bytes:
    """Return a WebP with any size in its header: of the canvas (VP8X), or of a picture."""
    if kind == b"VP8X":
        sizes = [(side - 1 & 0xFFFFFF).to_bytes(3, "little") for side in (width, height)]
        chunk = b"\x02\0\0\0" + b"".join(sizes)
    elif kind == b"VP8L":
        chunk = b"\x2f" + (width - 1 & 0x3FFF | (height - 1 & 0x3FFF) << 14).to_bytes(4, "little")
    else:
        chunk = b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)
    chunk += rest
    body = b"WEBP" + kind + len(chunk).to_bytes(4, "little") + chunk + bytes(len(chunk) % 2)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


KINDS = (("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF"), ("P", "PNG"), ("LA", "PNG"),
         ("1", "PNG"), ("L", "GIF"))  # fmt: skip
DEEP = (("PNG", np.uint16, 255), ("TIFF", np.uint16, 255), ("TIFF", np.int32, 255),
        ("TIFF", np.int32, 1), ("TIFF", np.float32, 255), ("TIFF", np.float32, 1),
        ("TIFF", np.float32, 1 / 255))  # fmt: skip
PGM = b"P5 24 20 65535\n" + PIXELS[..., 0].astype(">u2").tobytes()
MODES = [PGM, *(saved_as(*each) for each in KINDS), *(deep(*each) for each in DEEP)]
FILES = [
    saved("PNG"), saved("JPEG"), saved("JPEG", progressive=True), saved("GIF"), saved("BMP"),
    saved("TIFF"), saved("TIFF", compression="tiff_lzw"), saved("TIFF", compression="jpeg"),
    saved("WEBP"), saved("PPM"), EPS, *MODES,
]  # fmt: skip
SIZES = st.sampled_from((0, 1, 2, 100, 12_000, 16_384, 60_000, 2**20, 2**31 - 1, 2**32 - 1))
WEBPS = st.builds(
    webp, st.sampled_from((b"VP8X", b"VP8L", b"VP8 ")), SIZES, SIZES, st.binary(max_size=40)
)


def read(path: Path) -> None:
    error = check_image(path)
    decode(path, PREPROCESS)
    if error is not None:
        raise error


@given(
    content=mutants(FILES) | st.builds(png, SIZES, SIZES) | WEBPS,
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
