"""Shared parts of the fuzz tests: mutated files, and the rule for every reader.

A reader loads a file or refuses it with one line. It runs nothing, writes nothing, requests no more
memory than the file justifies, and ends in time.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2

from raymerge.data.preprocess import Preprocess
from raymerge.errors import RaymergeError
from raymerge.models.checkpoints.checkpoint import read_tensor
from raymerge.models.checkpoints.inspect import inspect_checkpoint
from raymerge.models.checkpoints.opening import open_checkpoint

COUNTS: dict[str, Counter[str]] = {}
"""The inputs that each reader loaded and refused."""
SPARE_BYTES = 3 << 30
LONGEST_S = 30

_CFG = PreprocessCfg(size=32)
PREPROCESS = Preprocess((32, 32), _CFG.mean, _CFG.std, image_transform_v2(_CFG, is_train=False))

ODD_NUMBERS = (0, -1, 1, 2**31 - 1, 2**32, 2**63 - 1, 2**64, 10**400, 1e308, -0.5,
               float("nan"), float("inf"))  # fmt: skip
ODD_TEXTS = ("", ".", "..", "../x", "/etc/passwd", "a\0b", "x" * 5000, "é\ud800", "{}",
             "{0.__class__}", "a\nb", "~", "%00", "file:///etc/passwd", "[" * 50)  # fmt: skip
DEEP = "<nested without end>"
"""Represents 100,000 brackets, which would break the report of a failure."""
ODD = (None, True, False, [], {}, [[]], {"": 0}, [None], DEEP, *ODD_NUMBERS, *ODD_TEXTS)


@dataclass(frozen=True)
class Ground:
    """The folder of a fuzz test. ``inside`` holds the reader's files; all else below ``root`` must
    stay unchanged, except ``cache``, the target of downloads."""

    root: Path

    @property
    def inside(self) -> Path:
        return self.root / "inside"

    @property
    def canary(self) -> Path:
        """The file that hostile inputs try to create."""
        return self.root / "outside" / "canary"

    def clean(self) -> Path:
        shutil.rmtree(self.inside, ignore_errors=True)
        self.inside.mkdir(parents=True)
        return self.inside

    def snapshot(self) -> dict[str, tuple[int, int]]:
        """Return size and time of every file that is not the reader's own."""
        own = (self.inside, self.root / "cache")
        places = [place for place in self.root.iterdir() if place not in own]
        files = [file for place in places for file in (place, *place.rglob("*"))]
        stats = {str(file): file.lstat() for file in files if not file.is_dir()}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    def examine(self, reader: str, read: Callable[[], object]) -> None:
        """Run ``read`` on the files inside, and assert that it follows the rule."""
        before = self.snapshot()
        own = sorted(path.name for path in self.inside.rglob("*"))
        counts = COUNTS.setdefault(reader, Counter())
        try:
            with _bounded():
                read()
            message, outcome = "-", "loaded"
        except RaymergeError as error:
            message, outcome = str(error), "refused"
        counts[outcome] += 1
        assert len(message.splitlines()) == 1, repr(message)
        assert self.snapshot() == before
        assert sorted(path.name for path in self.inside.rglob("*")) == own


class TooLongError(Exception):
    """A reader does not end in time."""


@contextmanager
def _bounded() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLongError(f"still reading after {LONGEST_S} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def little_memory() -> Iterator[None]:
    """Limit the address space to a few GiB more than is in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- readers -------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> None:
    """Inspect a checkpoint and read all its tensors."""
    inspect_checkpoint(str(path))
    checkpoint = open_checkpoint(path)
    for key in checkpoint.specs:
        read_tensor(checkpoint, key)


# --- inputs --------------------------------------------------------------------------------------


@st.composite
def mutants(draw: st.DrawFn, originals: Sequence[bytes]) -> bytes:
    """Draw a file with some bytes flipped, cut, repeated, replaced by noise or extreme numbers."""
    content = bytearray(draw(st.sampled_from(originals)))
    kinds = ("flip", "cut", "drop", "repeat", "number", "noise", "zero")
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=5)):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        size = draw(st.integers(1, 16))
        if kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[place:]
        elif kind == "drop":
            del content[place : place + size]
        elif kind == "repeat":
            content[place:place] = content[place : place + size] * draw(st.integers(1, 4))
        elif kind == "number":
            width = draw(st.sampled_from((1, 2, 4, 8)))
            value = draw(st.sampled_from((0, 1, 2**7 - 1, 2**31 - 1, 2**32, 2**62, 2**64 - 1)))
            order = draw(st.sampled_from(("little", "big")))
            content[place : place + width] = (value % 2 ** (8 * width)).to_bytes(width, order)
        elif kind == "noise":
            content[place : place + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == "zero":
            content[place : place + size] = bytes(size)
    return bytes(content)


@st.composite
def changed(draw: st.DrawFn, original: Any, odd: Sequence[Any] = ODD) -> Any:
    """Draw plain data with a few values or keys replaced, removed or renamed."""
    data = _copied(original)
    for _ in range(draw(st.integers(1, 3))):
        node = data
        while isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = draw(st.sampled_from(keys))
            below = isinstance(node[key], dict | list) and node[key]
            if below and draw(st.integers(0, 3)):
                node = node[key]
                continue
            how = draw(st.sampled_from(("replace", "replace", "replace", "delete", "rename")))
            if how == "delete":
                del node[key]
            elif how == "rename" and isinstance(node, dict):
                node[draw(st.sampled_from(ODD_TEXTS))] = node.pop(key)
            else:
                node[key] = _copied(draw(st.sampled_from(odd)))
            break
    return data


def _copied(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _copied(value) for key, value in data.items()}
    return [*map(_copied, data)] if isinstance(data, list | tuple) else data


def json_bytes(data: Any) -> bytes:
    """Return JSON, including NaN, lone surrogates and any depth."""
    if isinstance(data, dict):
        items = [json_bytes(str(key)) + b":" + json_bytes(value) for key, value in data.items()]
        return b"{" + b",".join(items) + b"}"
    if data == DEEP:
        return b"[" * 100_000
    if isinstance(data, list):
        return b"[" + b",".join(map(json_bytes, data)) + b"]"
    if isinstance(data, int) and data > 10**300:
        return b"1" + b"0" * 400
    return json.dumps(data).encode()


def json_files(original: Any, odd: Sequence[Any] = ODD) -> st.SearchStrategy[bytes]:
    """Draw well-formed JSON with odd values, or damaged bytes."""
    return changed(original, odd).map(json_bytes) | mutants([json_bytes(original)])
