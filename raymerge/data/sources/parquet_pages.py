"""How much memory the pages of a Parquet column take, read from their headers before pyarrow does.

pyarrow allocates what a page's header claims, and unpacks a whole page at once: a dictionary of a
few kB may stand for gigabytes. Its own view of the headers cannot be used for files from strangers,
because it aborts the process over damaged ones. So the few numbers are read here, from Thrift's
compact encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

from raymerge.data.sources.files import FileStamp

_ANY_PAGE_BYTES = 1 << 26
_MOST_RATIO = 256
"""A larger page may not unpack to more than this times its size in the file."""
_HEADER_BYTES, _MOST_HEADER_BYTES, _MOST_FOOTER_BYTES = 1 << 10, 1 << 24, 1 << 25
_ANY_PAGES, _BYTES_PER_PAGE = 1 << 10, 1 << 10
"""Above the first number, pages must have the second number of bytes on average."""
_DEEPEST = 16
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3


class Pages(NamedTuple):
    """The sizes of a column's pages in one row group: unpacked, and together in the file."""

    largest: int
    total: int
    packed: int


class _Chunk(NamedTuple):
    """The place of the pages of one column of values."""

    column: str
    start: int
    end: int
    values: int


def column_pages(file: FileStamp, group: int, column: str) -> Pages:
    """Return the sizes of a column's pages. Raises :class:`ValueError` for damaged headers.

    ``column``: the name at the top of the schema; a struct has several columns of values.
    """
    chunks = _chunks(file)[group]
    named = [chunk for chunk in chunks if chunk.column == column] or chunks
    largest = total = 0
    packed = sum(chunk.end - chunk.start for chunk in named)
    with file.path.open("rb") as stream:
        for chunk in named:
            for size in _page_sizes(stream, chunk):
                largest, total = max(largest, size), total + size
    return Pages(largest, total, min(packed, file.size))


def _page_sizes(stream: BinaryIO, chunk: _Chunk) -> list[int]:
    sizes: list[int] = []
    place, values = chunk.start, 0
    most = max(_ANY_PAGES, (chunk.end - chunk.start) // _BYTES_PER_PAGE)
    while place < chunk.end and values < chunk.values:
        header, length = _page_header(stream, place)
        unpacked, packed = _size(header, 2), _size(header, 3)
        if unpacked > max(_ANY_PAGE_BYTES, _MOST_RATIO * packed):
            raise ValueError(
                f"a page of column {chunk.column!r:.60} would unpack from {packed:,} to "
                f"{unpacked:,} bytes"
            )
        if len(sizes) == most:
            raise ValueError(f"column {chunk.column!r:.60} has over {most:,} pages in a row group")
        sizes.append(unpacked)
        place += length + packed
        kind = _size(header, 1)
        if kind in (_DATA_PAGE, _DATA_PAGE_V2):
            values += _size(_struct(header, 5 if kind == _DATA_PAGE else 8), 1)
    return sizes


def _page_header(stream: BinaryIO, place: int) -> tuple[Mapping[int, Any], int]:
    """Return a page's header and its length; most have less than a hundred bytes."""
    size = _HEADER_BYTES
    while True:
        stream.seek(place)
        content = stream.read(size)
        try:
            reader = _Reader(content)
            return reader.struct(), reader.place
        except IndexError:
            if len(content) < size or size >= _MOST_HEADER_BYTES:
                raise ValueError("a page's header is damaged") from None
            size *= 16


@lru_cache(maxsize=64)
def _chunks(file: FileStamp) -> list[list[_Chunk]]:
    """Return the column chunks of every row group, from the footer."""
    with file.path.open("rb") as stream:
        stream.seek(max(0, file.size - 8))
        length, magic = struct.unpack("<I4s", stream.read(8))
        if magic != b"PAR1" or length > file.size - 8:
            raise ValueError("its footer is damaged or encrypted")
        if length > _MOST_FOOTER_BYTES:
            raise ValueError(f"its footer has {length:,} bytes")
        stream.seek(file.size - 8 - length)
        content = stream.read(length)
    try:
        groups = _Reader(content).struct().get(4, [])
        return [[_chunk(each) for each in _struct({0: group}, 0)[1]] for group in groups]
    except (IndexError, KeyError, TypeError, AttributeError):
        raise ValueError("its footer is damaged") from None


def _chunk(stored: Mapping[int, Any]) -> _Chunk:
    """Return where a column chunk lies: a dictionary comes before its values."""
    about = _struct(stored, 3)
    start, dictionary = _size(about, 9), about.get(11) or 0
    start = dictionary if 0 < dictionary < start else start
    return _Chunk(
        about[3][0].decode("utf-8", "replace"), start, start + _size(about, 7), _size(about, 5)
    )


def _struct(stored: Mapping[int, Any], key: int) -> Mapping[int, Any]:
    value = stored.get(key)
    if not isinstance(value, dict):
        raise ValueError("a header is damaged")
    return value


def _size(stored: Mapping[int, Any], key: int) -> int:
    value = stored.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("a header is damaged")
    return value


class _Reader:
    """Thrift's compact encoding as plain data; raises IndexError at the end of the content."""

    def __init__(self, content: bytes) -> None:
        self._content, self.place = content, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > _DEEPEST:
            raise ValueError("a header is nested too deeply")
        fields: dict[int, Any] = {}
        key = 0
        while kind := (byte := self._byte()) & 15:
            key = key + (byte >> 4) if byte >> 4 else self._signed()
            fields[key] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2, 3):
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind in (7, 13):
            return self._take(8 if kind == 7 else 16)
        if kind == 8:
            return self._take(self._unsigned())
        if kind in (9, 10):
            head = self._byte()
            size = self._counted(self._unsigned() if head >> 4 == 15 else head >> 4)
            return [self._value(head & 15, depth + 1) for _ in range(size)]
        if kind == 11:
            return self._map(depth)
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError("a header has a value of unknown type")

    def _map(self, depth: int) -> None:
        size = self._counted(self._unsigned())
        kinds = self._byte() if size else 0
        for _ in range(size):
            self._value(kinds >> 4, depth + 1)
            self._value(kinds & 15, depth + 1)

    def _counted(self, size: int) -> int:
        """Return a number of elements, each of which takes a byte at least."""
        if size > len(self._content) - self.place:
            raise IndexError
        return size

    def _byte(self) -> int:
        value = self._content[self.place]
        self.place += 1
        return value

    def _take(self, size: int) -> bytes:
        self._counted(size)
        self.place += size
        return self._content[self.place - size : self.place]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 70:
                raise ValueError("a header has too long a number")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
