"""The identity of a node: its raymerge code, its libraries, and the input files it reads.

A node with another raymerge, or another file under the same path, would give another λ without a
word. So each worker reports this when it starts, and the driver compares it with its own
(``distributed.agreement``). Files are compared by size and by blocks that are spread over them,
which costs milliseconds and which no other training leaves as they are.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from raymerge.errors import one_line

_PACKAGES = ("torch", "open_clip_torch", "ray", "numpy", "safetensors")
_BLOCKS, _BLOCK_BYTES = 64, 4096


@dataclass(frozen=True)
class Finding:
    """The digest of one input on a node; ``problem``: why it cannot be read there, or empty."""

    digest: str
    problem: str = ""


@dataclass(frozen=True)
class Identity:
    """``code``: the version of each part, by its name. ``inputs``: by the input's name."""

    code: Mapping[str, str]
    inputs: Mapping[str, Finding]


def own_identity(inputs: Mapping[str, Callable[[], str]]) -> Identity:
    """Return this process's identity; ``inputs``: a function for each input's digest."""
    return Identity(_code(), {name: _find(digest) for name, digest in inputs.items()})


def _find(digest: Callable[[], str]) -> Finding:
    try:
        return Finding(digest())
    except Exception as error:  # of whatever is missing there: a file, a package, a right
        return Finding("", one_line(error, 300))


@cache
def _code() -> dict[str, str]:
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    versions = {package: _version(package) for package in _PACKAGES}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"raymerge's code": digest.hexdigest()[:12], "python": python, **versions}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def sample_digest(file: Path) -> str:
    """Return a digest of a file's size and of blocks that are spread over it."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb", buffering=0) as stream:
        for block in range(_BLOCKS):
            stream.seek(max(0, size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]
