"""WebDataset tar shards: indexed once and read in place; nothing is unpacked to disk.

A sample is the members with one name up to the first dot, such as ``0017.jpg`` and ``0017.cls``.
"""

from __future__ import annotations

import json
import logging
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raymerge.data.folder import is_hidden_path
from raymerge.data.images import Labels, open_encoded
from raymerge.data.sources.files import FileStamp, printable_name, read_at, require_small, stamps_of
from raymerge.data.sources.labels import text_labels
from raymerge.data.sources.reference import DataReference
from raymerge.errors import DataError, one_line

logger = logging.getLogger(__name__)

_IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff", "gif")
_LABELS = ("cls", "json", "txt")  # the first that a sample has
_JSON_KEYS = ("label", "cls", "class")
_MOST_LABEL_BYTES = 1 << 20
_MOST_SHARDS = 100_000
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_ERRORS = (
    tarfile.TarError,
    OSError,
    ValueError,
    EOFError,
    RecursionError,
    MemoryError,  # of a header that claims to be longer than any file
    OverflowError,
)
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
             tarfile.GNUTYPE_LONGLINK)  # fmt: skip
_MOST_EXTENDED_BYTES, _MOST_GLOBAL_KEYS = 1 << 16, 1000
_LONG_NUMBER = re.compile(rb"\d{400}")
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


def expand(pattern: str) -> list[Path]:
    """Return the paths of a pattern such as ``a-{00..02}.tar``; raises :class:`DataError`."""
    match = _BRACES.search(pattern)
    if match is None:
        return [Path(pattern)]
    first, last = map(int, match.groups())
    if not first <= last < first + _MOST_SHARDS:
        raise DataError(
            f"{pattern}: {match.group()} names no shard, or over {_MOST_SHARDS}; name fewer"
        )
    width = len(match.group(1))
    texts = [f"{number:0{width}}" for number in range(first, last + 1)]
    heads = [pattern[: match.start()] + text + pattern[match.end() :] for text in texts]
    return [path for head in heads for path in expand(head)]


def open_shards(reference: DataReference, paths: Sequence[Path]) -> TarShards:
    reference.require_options()
    return TarShards(stamps_of(paths))


@dataclass(frozen=True)
class _Index:
    """The positions of a shard's N images and their labels, in the order of the images."""

    keys: tuple[str, ...]
    images_N2: NDArray[np.int64]
    """Offset and size."""
    labels_N2: NDArray[np.int64]
    """Offset and size of the label; size −1: none."""
    kinds: tuple[str, ...]
    """The label's suffix."""

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class TarShards:
    """A :class:`~raymerge.data.images.Source`: the samples of the shards in their order."""

    files: tuple[FileStamp, ...]
    _starts: NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        counts = [len(_indexed(file)) for file in self.files]
        object.__setattr__(self, "_starts", np.cumsum([0, *counts]))

    def __reduce__(self) -> tuple[type[TarShards], tuple[tuple[FileStamp, ...]]]:
        return TarShards, (self.files,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, row: int) -> tuple[FileStamp, _Index, int]:
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        file = self.files[shard]
        return file, _indexed(file), row - int(self._starts[shard])

    def key(self, row: int) -> str:
        file, index, place = self._find(row)
        return f"{file.path.name} {printable_name(index.keys[place])}"

    def name(self, row: int) -> str:
        file, index, place = self._find(row)
        return f"{file.path} member {printable_name(index.keys[place])}"

    def encoded(self, row: int) -> bytes:
        file, index, place = self._find(row)
        offset, size = map(int, index.images_N2[place])
        require_small(size, f"image {self.name(row)}")
        return read_at(file.path, offset, size)

    def image(self, row: int) -> Image.Image:
        return open_encoded(self.encoded(row))

    def labels(self) -> Labels:
        texts = [text for file in self.files for text in _label_texts(file, _indexed(file))]
        if all(re.fullmatch(r"-?\d{1,9}", text) for text in texts):
            return Labels(np.array([int(text) for text in texts], dtype=np.int64))
        return text_labels(texts)


# --- labels --------------------------------------------------------------------------------------


def _label_texts(file: FileStamp, index: _Index) -> Iterator[str]:
    with file.path.open("rb") as shard:
        for place, key in enumerate(index.keys):
            offset, size = map(int, index.labels_N2[place])
            name = f"{file.path} member {printable_name(key)}"
            if size < 0:
                raise DataError(
                    f"image {name}: has no label; add a member "
                    f"{printable_name(key)}.cls with its class"
                )
            if size > _MOST_LABEL_BYTES:
                raise DataError(
                    f"{name}.{index.kinds[place]}: {size} bytes are no label; "
                    "write a number or a class name"
                )
            shard.seek(offset)
            yield _label_text(shard.read(size), index.kinds[place], name)


def _label_text(content: bytes, kind: str, name: str) -> str:
    try:
        text = content.decode("utf-8").strip()
        if kind == "json":
            text = _from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name}.{kind}: no label can be read from it; write a number or a class name"
        ) from error
    if not text or "\n" in text:
        raise DataError(
            f"{name}.{kind}: holds no label; write a number or a class name"
            + (f", in JSON as {' or '.join(map(repr, _JSON_KEYS))}" if kind == "json" else "")
        )
    return text


def _from_json(value: object) -> str:
    if isinstance(value, dict):
        value = next((value[key] for key in _JSON_KEYS if key in value), None)
    if isinstance(value, bool):
        value = int(value)  # as in Parquet: false is class 0
    return str(value).strip() if isinstance(value, str | int) else ""


# --- the index -----------------------------------------------------------------------------------


@dataclass
class _Sample:
    image: tuple[int, int] | None = None
    labels: dict[str, tuple[int, int]] = field(default_factory=dict)


@lru_cache(maxsize=4096)
def _indexed(file: FileStamp) -> _Index:
    """Return the samples of a shard that have an image; raises :class:`DataError`."""
    # Members of one key are a sample; images whose names have more dots are kept for the message.
    samples: dict[str, _Sample] = {}
    dotted: list[tuple[str, str]] = []
    for member in _members(file):
        key, suffix = _split(member.name)
        if suffix not in _IMAGES and suffix.rpartition(".")[2] in _IMAGES:
            dotted.append((key, member.name))
        if suffix in _IMAGES or suffix in _LABELS:
            _add(samples.setdefault(key, _Sample()), member, suffix, file)
    samples = {key: sample for key, sample in samples.items() if sample.image is not None}
    lost = [name for key, name in dotted if key not in samples]  # others are a sample's masks
    if lost:
        message = (
            f"{file.path}: member {printable_name(lost[0])}: a name ends at its first dot in a "
            "WebDataset, so this is no image; write no dots before the suffix"
        )
        if not samples:
            raise DataError(message)
        logger.warning("%s; %d members are left out", message, len(lost))
    if not samples:
        raise DataError(
            f"{file.path}: holds no image ({', '.join(_IMAGES)}); expected members such as "
            "0001.jpg with 0001.cls"
        )
    kinds = [next((k for k in _LABELS if k in s.labels), "") for s in samples.values()]
    labels = [s.labels.get(k, (0, -1)) for s, k in zip(samples.values(), kinds, strict=True)]
    return _Index(
        tuple(samples),
        np.array([sample.image for sample in samples.values()], dtype=np.int64),
        np.array(labels, dtype=np.int64),
        tuple(kinds),
    )


def _add(sample: _Sample, member: tarfile.TarInfo, suffix: str, file: FileStamp) -> None:
    name = f"{file.path} member {printable_name(member.name)}"
    if member.type not in _PLAIN or member.issparse():
        raise DataError(f"{name}: is a link or no plain file; store the file itself")
    end = member.offset_data + member.size
    if member.size < 0 or end > file.size:
        raise DataError(
            f"{name}: ends at byte {end}, but the shard has {file.size}; it is cut off: fetch or "
            "write it again"
        )
    place = (member.offset_data, member.size)
    if suffix in _LABELS:
        if suffix in sample.labels:
            raise DataError(f"{name}: is there twice; a sample has one label of a kind; rename one")
        sample.labels[suffix] = place
    elif sample.image is not None:
        raise DataError(
            f"{name}: the sample has another image; a sample has one; rename one of them"
        )
    else:
        sample.image = place


def _split(name: str) -> tuple[str, str]:
    """Return a member's key and suffix; the suffix of hidden files is empty."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", "" if is_hidden_path(name) else suffix.lower()


class _BoundedInfo(tarfile.TarInfo):
    """A member's header; refuses the extended ones that tarfile reads whole, or without end.

    It searches them with a regular expression that takes the square of a row of digits.
    """

    def _proc_member(self, shard: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED:
            if not 0 <= self.size <= _MOST_EXTENDED_BYTES:
                raise tarfile.ReadError(f"an extended header of {self.size:,} bytes")
            place = shard.fileobj.tell()
            if _LONG_NUMBER.search(shard.fileobj.read(self.size)):
                raise tarfile.ReadError("an extended header with a number of hundreds of digits")
            shard.fileobj.seek(place)
            # Every later member copies them all.
            if len(shard.pax_headers) > _MOST_GLOBAL_KEYS:
                raise tarfile.ReadError(f"over {_MOST_GLOBAL_KEYS} keys in global headers")
        member: tarfile.TarInfo = super()._proc_member(shard)  # type: ignore[misc]
        return member


def _members(file: FileStamp) -> Iterator[tarfile.TarInfo]:
    """Yield all members but folders in order, without keeping them in memory."""
    try:
        with tarfile.open(file.path, "r:", tarinfo=_BoundedInfo) as shard:
            before = -1
            while (member := shard.next()) is not None:
                shard.members = []  # type: ignore[attr-defined]  # which would grow with the shard
                if shard.offset <= before:
                    raise tarfile.ReadError("a member ends before it starts")
                before = shard.offset
                if not member.isdir():
                    yield member
    except _ERRORS as error:
        raise DataError(
            f"{file.path}: not a readable tar file ({one_line(error)}); fetch or write it "
            "again, without compression"
        ) from error
