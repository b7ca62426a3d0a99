"""Hugging Face data sets in Parquet: images in a column, read a row group at a time.

The image column is binary, or a struct of ``bytes`` and ``path`` as `datasets` writes it. Class
names are taken from the ``huggingface`` metadata.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raymerge.data.folder import quote_names
from raymerge.data.images import Labels, open_encoded
from raymerge.data.sources.files import FileStamp, require_small, stamps_of
from raymerge.data.sources.labels import text_labels
from raymerge.data.sources.parquet_pages import column_pages
from raymerge.data.sources.reference import DataReference
from raymerge.errors import DataError, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

_CACHE_BYTES = 1 << 27
"""Bytes of row groups that a process keeps for the next images."""
_MOST_GROUP_BYTES = 1 << 31
_MOST_LABEL_BYTES = 1 << 29
_ROWS_AT_ONCE, _LABELS_AT_ONCE = 16, 1024
_ANY_BYTES, _MOST_RATIO = 1 << 28, 256
"""A column of a row group may not unpack to more than the greater of these bytes and this ratio."""
_BATCH_BYTES = 1 << 27
"""Bytes to which a batch may unpack if each of its values is as large as its page."""
_ERRORS = (OSError, ValueError, EOFError, RuntimeError, LookupError, TypeError, ArithmeticError,
           MemoryError)  # fmt: skip
_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-(?P<number>\d{5})-of-(?P<count>\d{5})(-\w+)?")
_NUMBERED = re.compile(r"\d+|part[-_.]?\d+.*", re.IGNORECASE)
_LABEL_KINDS = ("integer", "boolean", "text")  # false is class 0, true is class 1
_IMAGES, _LABELS = ("image", "img", "jpg", "png", "webp"), ("label", "labels", "cls", "class")


# --- which files ---------------------------------------------------------------------------------


def split_files(
    files: Sequence[Path], root: Path, split: str | None, config: str | None, text: str
) -> list[Path]:
    """Return the Parquet files of one split below ``root``, in the order of their names.

    Raises :class:`DataError` if several splits are possible, or a file is missing.
    """
    # Select by split, then by configuration; either must be named if there are several.
    places = {path: _place(path.relative_to(root)) for path in sorted(files)}
    if split is not None:
        places = {path: place for path, place in places.items() if place[1] == split}
    elif len(splits := sorted({place[1] for place in places.values()})) > 1:
        raise DataError(
            f"{text}: holds the splits {quote_names(splits, 9)}; name one: ?split={splits[0]}"
        )
    if config is not None:
        places = {path: place for path, place in places.items() if place[0] == config}
    elif len(configs := sorted({place[0] for place in places.values()})) > 1:
        raise DataError(
            f"{text}: holds the configurations {quote_names(configs, 9)}; "
            f"name one: config={configs[0]}"
        )
    if not places:
        there = sorted({"/".join(_place(path.relative_to(root))) for path in files})
        target = "/".join(filter(None, (config, split)))
        choose = f"it has {quote_names(there, 9)}; choose one" if there else "name other files"
        raise DataError(f"{text}: holds no Parquet file of {target}; {choose}")
    _require_all(list(places), text)
    return list(places)


def _place(path: Path) -> tuple[str, str]:
    """Return (configuration, split) of ``config/test-00000-of-00001`` or ``config/test/0000``."""
    folders = [name for name in path.parts[:-1] if name != "data"]
    if match := _SHARD.fullmatch(path.stem):
        split = match.group("split")
    elif _NUMBERED.fullmatch(path.stem) and folders:
        split = folders.pop()
    else:
        split = path.stem
    return "/".join(folders) or "default", split


def _require_all(files: Sequence[Path], text: str) -> None:
    shards = [match for path in files if (match := _SHARD.fullmatch(path.stem))]
    counts = {int(shard.group("count")) for shard in shards}
    if len(shards) == len(files) and len(counts) == 1 and len(files) != (count := counts.pop()):
        there = {int(shard.group("number")) for shard in shards}
        missing = [f"{i:05}" for i in range(min(count, 100_000)) if i not in there]
        raise DataError(
            f"{text}: {len(files)} of {count} Parquet files are there, without "
            f"{quote_names(missing)}; fetch them too"
        )


# --- the data set --------------------------------------------------------------------------------


def open_parquet(
    reference: DataReference, paths: Sequence[Path], place: str | None = None
) -> ParquetRows:
    """Open Parquet files; ``place``: the data set's name in errors, default: the files' folder."""
    stamps = stamps_of(paths)
    for stamp in stamps:
        with _reading(stamp):
            _opened(stamp)
    schema = _schema(stamps[0])
    image = _image_column(schema, reference)
    for stamp in stamps[1:]:
        if _schema(stamp).get(image) != schema[image]:
            raise DataError(
                f"{stamp.path}: has no column {image!r} like that of {paths[0].name}; "
                "name files of one data set"
            )
    rows = ParquetRows(stamps, image, reference.options.get("label"), place)
    if not len(rows):
        raise DataError(f"{reference.text}: holds no row; name another file or split")
    return rows


def column_names(path: Path) -> tuple[str, ...]:
    """Return the columns of a file; raises :class:`DataError`."""
    (stamp,) = stamps_of([path])
    return tuple(_schema(stamp))


@dataclass(frozen=True)
class ParquetRows:
    """A :class:`~raymerge.data.images.Source`: the rows of some files in their order."""

    files: tuple[FileStamp, ...]
    column: str
    label: str | None
    place: str | None
    _starts: NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        counts = [int(_groups(file)[-1]) for file in self.files]
        object.__setattr__(self, "_starts", np.cumsum([0, *counts]))

    def __reduce__(self) -> tuple[type[ParquetRows], tuple[Any, ...]]:
        return ParquetRows, (self.files, self.column, self.label, self.place)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, row: int) -> tuple[FileStamp, int]:
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.files[file], row - int(self._starts[file])

    def key(self, row: int) -> str:
        file, place = self._find(row)
        return f"{file.path.name} row {place}"

    def name(self, row: int) -> str:
        file, place = self._find(row)
        path = file.path if self.place is None else f"{self.place} {file.path.name}"
        return f"{path} row {place}"

    def encoded(self, row: int) -> bytes:
        file, place = self._find(row)
        starts = _groups(file)
        group = int(np.searchsorted(starts, place, side="right")) - 1
        values = _CACHE.column(file, self.column, group)
        value = _value(values, place - int(starts[group]))
        if value is None:
            raise DataError(
                f"image {self.name(row)}: has no bytes in column {self.column!r}; save the data "
                "set with its images embedded"
            )
        require_small(value.size, f"image {self.name(row)}")
        return bytes(value.to_pybytes())

    def image(self, row: int) -> Image.Image:
        return open_encoded(self.encoded(row))

    def labels(self) -> Labels:
        columns = _schema(self.files[0])
        name = _label_column(columns, self.label, str(self.files[0].path))
        values = [_read_labels(file, name) for file in self.files]
        if isinstance(values[0], list):
            return text_labels([text for part in values for text in part])
        names = {json.dumps(_class_names(_features(file).get(name))) for file in self.files}
        if len(names) > 1:
            raise DataError(
                f"{self.files[0].path.parent}: its files name the classes of {name!r} differently; "
                "name files of one data set"
            )
        return Labels(np.concatenate(values), _class_names(_features(self.files[0]).get(name)))


def _value(chunks: Sequence[Any], place: int) -> Any:
    """Return the buffer of a value; None for null."""
    for chunk in chunks:
        if place < len(chunk):
            return chunk[place].as_buffer() if chunk[place].is_valid else None
        place -= len(chunk)
    raise IndexError(place)


# --- columns -------------------------------------------------------------------------------------


def _image_column(schema: Mapping[str, str], reference: DataReference) -> str:
    column = reference.options.get("image")
    candidates = [name for name, kind in schema.items() if kind in ("image", "binary")]
    if column is not None:
        if column not in candidates:
            raise DataError(_no_column(reference.text, "image", column, candidates, schema))
        return column
    return _only(candidates, _IMAGES, reference.text, "image", schema)


def _label_column(schema: Mapping[str, str], column: str | None, text: str) -> str:
    candidates = [name for name, kind in schema.items() if kind in _LABEL_KINDS]
    if column is not None:
        if column not in candidates:
            raise DataError(_no_column(text, "label", column, candidates, schema))
        return column
    # A boolean may be any remark; it is a label by its name, or where nothing else is one.
    numbers = [name for name in candidates if schema[name] == "integer"]
    classes = numbers or [name for name in candidates if schema[name] == "boolean"]
    matches = [name for name in candidates if name.lower() in _LABELS]
    return _only(matches or classes, _LABELS, text, "label", schema)


def _only(
    candidates: Sequence[str],
    usual: Sequence[str],
    text: str,
    what: str,
    schema: Mapping[str, str],
) -> str:
    match = next((name for word in usual for name in candidates if name.lower() == word), None)
    if match is not None:
        return match
    if len(candidates) != 1:
        raise DataError(_no_column(text, what, None, candidates, schema))
    return candidates[0]


def _no_column(
    text: str, what: str, column: str | None, candidates: Sequence[str], schema: Mapping[str, str]
) -> str:
    if candidates:
        which = (
            f"column {column!r} holds no {what}s" if column else f"which column holds the {what}s"
        )
        return f"{text}: {which}; name it: {what}=…, one of {quote_names(candidates, 9)}"
    types = ", ".join(f"{one_line(name, 40)}: {kind}" for name, kind in list(schema.items())[:9])
    return f"{text}: no column holds {what}s (columns: {types or 'none'})"


def _class_names(feature: Any) -> tuple[str, ...] | None:
    """Return the names of a ClassLabel feature, or None."""
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


# --- files ---------------------------------------------------------------------------------------


@contextmanager
def _reading(file: FileStamp) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DataError(f"{file.path}: Parquet needs pyarrow; pip install pyarrow") from error
    except _ERRORS as error:
        raise DataError(
            f"{file.path}: not a readable Parquet file ({one_line(error)}); fetch or write it again"
        ) from error


@lru_cache(maxsize=64)
def _opened(file: FileStamp) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file.path)


@lru_cache(maxsize=4096)
def _groups(file: FileStamp) -> NDArray[np.int64]:
    """Return the first row of each row group, and at the end the number of rows."""
    with _reading(file), _LOCK:
        metadata = _opened(file).metadata
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0:
        raise DataError(f"{file.path}: a row group has {min(counts)} rows; fetch or write it again")
    starts: NDArray[np.int64] = np.cumsum([0, *counts])
    return starts


@lru_cache(maxsize=4096)
def _schema(file: FileStamp) -> dict[str, str]:
    """Return each column's kind: image, binary, integer, text, or another type's name."""
    with _reading(file), _LOCK:
        return {field.name: _kind(field.type) for field in _opened(file).schema_arrow}


def _kind(kind: Any) -> str:
    import pyarrow.types as types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return "image" if index >= 0 and _kind(kind.field(index).type) == "binary" else "struct"
    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "binary"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    if types.is_boolean(kind):
        return "boolean"
    return "integer" if types.is_integer(kind) else str(kind)[:40]


@lru_cache(maxsize=4096)
def _features(file: FileStamp) -> dict[str, Any]:
    """Return the description of the columns that `datasets` stores."""
    with _reading(file), _LOCK:
        metadata = _opened(file).schema_arrow.metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _read_labels(file: FileStamp, column: str) -> NDArray[np.int64] | list[str]:
    kind = _schema(file).get(column)
    if kind not in _LABEL_KINDS:
        raise DataError(
            f"{file.path}: has no column {column!r} of numbers or names; name one with ?label="
        )
    with _reading(file), _LOCK:
        # A few values in the file may unpack to any size, so it is checked batch by batch.
        values: list[Any] = []
        size = 0
        metadata, where = _opened(file).metadata, f"column {column!r}"
        for group in range(metadata.num_row_groups):
            before = len(values)
            for batch in _batches(file, group, column, _LABELS_AT_ONCE, _MOST_LABEL_BYTES):
                values += batch.column(0).to_pylist()
                size += batch.nbytes
                if size > _MOST_LABEL_BYTES:
                    raise DataError(
                        f"{file.path}: {where} unpacks to over "
                        f"{_MOST_LABEL_BYTES >> 20} MiB of labels; name another one: label=…"
                    )
            _require_rows(file, len(values) - before, metadata.row_group(group).num_rows, where)
        _require_rows(file, len(values), metadata.num_rows, where)
        missing = values.count(None)
        if missing:
            raise DataError(
                f"{file.path}: {missing} of {len(values)} rows have no {column!r}; "
                "remove them, or name another column: label=…"
            )
        if kind == "text":
            return [str(value) for value in values]
        numbers: NDArray[np.int64] = np.array(values, dtype=np.int64)
        return numbers


class _RowGroups:
    """The image columns of the row groups that were used last."""

    def __init__(self) -> None:
        self._arrays: OrderedDict[tuple[FileStamp, str, int], list[Any]] = OrderedDict()

    def column(self, file: FileStamp, column: str, group: int) -> list[Any]:
        """Return the column's binary arrays in order."""
        key = (file, column, group)
        with _LOCK:
            if key not in self._arrays:
                self._arrays[key] = _read_group(file, column, group)
                while len(self._arrays) > 1 and self._bytes() > _CACHE_BYTES:
                    self._arrays.popitem(last=False)
            self._arrays.move_to_end(key)
            return self._arrays[key]

    def _bytes(self) -> int:
        return sum(array.nbytes for arrays in self._arrays.values() for array in arrays)


_LOCK = Lock()
"""One read at a time: a row group serves all threads that wait for it."""
_CACHE = _RowGroups()


def _read_group(file: FileStamp, column: str, group: int) -> list[Any]:
    """Read a row group batch by batch, since a stored value may stand for any number of rows.

    The column's size in the header is not used: pyarrow aborts the process if it is damaged.
    """
    size, chunks = 0, []
    with _reading(file):
        parquet = _opened(file)
        for batch in _batches(file, group, column, _ROWS_AT_ONCE, _MOST_GROUP_BYTES):
            chunks.append(_binary(batch.column(0)))
            size += chunks[-1].nbytes
            if size > _MOST_GROUP_BYTES:
                raise DataError(
                    f"{file.path}: row group {group} has over {_MOST_GROUP_BYTES / 2**30:.1f} GiB "
                    "of images, and is read as a whole; write it again with row_group_size=100"
                )
        header_rows = parquet.metadata.row_group(group).num_rows
    _require_rows(file, sum(map(len, chunks)), header_rows, f"row group {group}")
    return chunks


def _batches(file: FileStamp, group: int, column: str, rows: int, limit: int) -> Iterator[Any]:
    """Yield a column of a row group in batches of at most ``rows``, fewer where pages are large.

    Its pages are charged to ``limit`` bytes before any is unpacked.
    """
    pages = column_pages(file, group, column)
    if pages.total > limit:
        raise DataError(
            f"{file.path}: column {column!r} of row group {group} unpacks to "
            f"{pages.total / 2**30:.1f} GiB, and is read as a whole; write it again with "
            "row_group_size=100"
        )
    rows = max(1, min(rows, _BATCH_BYTES // max(1, pages.largest)))
    size, most = 0, max(_ANY_BYTES, _MOST_RATIO * pages.packed)
    for batch in _opened(file).iter_batches(
        rows, row_groups=[group], columns=[column], use_threads=False
    ):
        size += batch.nbytes
        if size > most:  # a value that stands for many rows
            raise DataError(
                f"{file.path}: column {column!r} of row group {group} unpacks from "
                f"{pages.packed:,} to over {most:,} bytes; write each image once"
            )
        yield batch


def _require_rows(file: FileStamp, rows: int, header_rows: int, where: str) -> None:
    """Refuse a file whose header counts other rows than its columns hold."""
    if rows != header_rows:
        raise DataError(
            f"{file.path}: {where} has {header_rows} rows and holds {rows}; fetch or write it again"
        )


def _binary(chunk: Any) -> Any:
    import pyarrow.types as types

    if types.is_dictionary(chunk.type):
        chunk = chunk.dictionary_decode()
    if not types.is_struct(chunk.type):
        return chunk
    return chunk.flatten()[chunk.type.get_field_index("bytes")]  # null where the struct is
