"""Fetch and check a suite's data sets (``raymerge data prepare``): one Parquet file per split.

All files have the same layout: an encoded image per row, and the index of its class in the class
names of the data set spec, whatever order the published copy uses.

Legend: C classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raymerge.config.suites.specs import DataSet, HuggingFace, Split
from raymerge.data.sources.files import stamps_of
from raymerge.errors import DataError, one_line
from raymerge.files.atomic import stage_file

FetchSplit = Callable[[HuggingFace, str], Sequence[Path]]
"""Returns a split's Parquet files in order; raises :class:`DataError`."""

_ROWS = 200
"""Rows per row group, which is read as a whole."""


@dataclass(frozen=True)
class SplitResult:
    """The result for one split. ``images``: in its file; ``problem``: one line, empty if none."""

    data_set: str
    split: Split
    images: int
    expected: int | None
    classes: int
    new: bool
    problem: str = ""
    remedy: str = ""

    @property
    def ready(self) -> bool:
        return not self.problem


def prepare(
    data_sets: Sequence[DataSet],
    root: Path,
    fetch: FetchSplit,
    say: Callable[[str], None] = lambda line: None,
) -> list[SplitResult]:
    """Write ``root/<data set>/<split>.parquet`` of every data set; existing files are only checked.

    A data set that cannot be fetched does not stop the others.
    """
    done = []
    for data_set in data_sets:
        for split in ("train", "test"):
            say(f"{data_set.name}: {split}")
            done.append(_prepare(data_set, split, root, fetch))
    return done


def _prepare(data_set: DataSet, split: Split, root: Path, fetch: FetchSplit) -> SplitResult:
    path = root / data_set.name / f"{split}.parquet"
    new, expected = not path.exists(), data_set.sizes.get(split)
    counts: list[int] = []
    try:
        if new:
            _write(data_set, split, path, fetch)
        counts = _class_counts(path, data_set.classes)
        _require_whole(counts, data_set, split)
    except DataError as error:
        remedy = f"remove {path} to fetch it again"
        if not counts:
            remedy = data_set.status or "run this again to fetch what is missing"
        classes = sum(count > 0 for count in counts)
        return SplitResult(
            data_set.name, split, sum(counts), expected, classes, new, str(error), remedy
        )
    return SplitResult(data_set.name, split, sum(counts), expected, len(counts), new)


def _require_whole(counts: Sequence[int], data_set: DataSet, split: Split) -> None:
    expected = data_set.sizes.get(split)
    if expected is not None and sum(counts) != expected:
        raise DataError(f"{sum(counts)} images, not {expected}")
    empty = [data_set.classnames[c] for c, count in enumerate(counts) if not count]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(counts)} classes have no image, such as {empty[0]!r}"
        )


# --- from the published copy ---------------------------------------------------------------------


def from_hub(where: HuggingFace, split: str) -> Sequence[Path]:
    """Return the hub's files of a split, from its cache if possible."""
    from raymerge.data.sources.hub import hub_files

    return hub_files(f"hf:{where.id}:{split}", where.id, None, split, where.config)


def _write(data_set: DataSet, split: Split, path: Path, fetch: FetchSplit) -> None:
    """Write a split under a temporary name first, so that a file with its name is complete."""
    where = data_set.huggingface
    if where is None:
        raise DataError("no published copy is known")
    files = fetch(where, where.splits[split])
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Of two at once, each writes a file of its own; the last one whole stays.
        with stage_file(path, path.parent) as (partial, commit):
            _rewrite(files, where, data_set, partial)
            commit()
    except DataError:
        raise
    except Exception as error:  # pyarrow's own errors, of whatever kind
        raise DataError(f"the published copy cannot be read ({one_line(error)})") from error


def _rewrite(files: Sequence[Path], where: HuggingFace, data_set: DataSet, out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())]).with_metadata(
        {b"huggingface": json.dumps(_features(data_set)).encode()}
    )
    with pq.ParquetWriter(out, schema) as writer:
        for images, labels in _batches(files, where, data_set):
            writer.write_table(pa.table([images, labels], schema=schema), row_group_size=_ROWS)


def _batches(
    files: Sequence[Path], where: HuggingFace, data_set: DataSet
) -> Iterator[tuple[list[Mapping[str, Any]], list[int]]]:
    import pyarrow.parquet as pq

    # The numbers of each file's labels may have an order of its own.
    if files[0].suffix == ".tar":
        yield from _shard_batches(files, data_set)
        return
    for file in files:
        with pq.ParquetFile(file) as parquet:
            columns = parquet.schema_arrow.names
            missing = [name for name in (where.image, where.label) if name not in columns]
            if missing:
                raise DataError(f"{file.name}: no column {missing[0]!r}; it has {columns}")
            place_of = _places(_stored_names(parquet.schema_arrow.metadata, where.label), data_set)
            for batch in parquet.iter_batches(_ROWS, columns=[where.image, where.label]):
                labels = [int(label) for label in batch.column(where.label).to_pylist()]
                wrong = [label for label in labels if not 0 <= label < len(place_of)]
                if wrong:
                    raise DataError(
                        f"{file.name}: label {wrong[0]} is not in 0 to {len(place_of) - 1}"
                    )
                images = batch.column(where.image).to_pylist()
                yield (
                    [_image(each) for each in images],
                    [place_of[label] for label in labels],
                )


def _shard_batches(
    files: Sequence[Path], data_set: DataSet
) -> Iterator[tuple[list[Mapping[str, Any]], list[int]]]:
    """Yield the samples of tar shards, whose labels are numbers in the spec's order."""
    from raymerge.data.sources.shards import TarShards

    shards, place_of = TarShards(stamps_of(files)), _places(None, data_set)
    stored = shards.labels()
    labels = stored.numbers.tolist()
    wrong = [label for label in labels if not 0 <= label < len(place_of)]
    if stored.are_texts or wrong:
        raise DataError(f"{files[0].name}: its labels are not the numbers 0 to {len(place_of) - 1}")
    for start in range(0, len(shards), _ROWS):
        rows = range(start, min(start + _ROWS, len(shards)))
        yield (
            [{"bytes": shards.encoded(row), "path": None} for row in rows],
            [place_of[labels[row]] for row in rows],
        )


def _image(stored: Any) -> Mapping[str, Any]:
    content = stored["bytes"] if isinstance(stored, dict) else stored
    if not isinstance(content, bytes):
        raise DataError("an image's bytes are not in the file")
    return {"bytes": content, "path": None}


def _stored_names(metadata: Mapping[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    """Return the class names in the metadata of the published copy, or None."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _places(stored: Sequence[str] | None, data_set: DataSet) -> list[int]:
    """Return the index in the spec's class names for each number of the published copy.

    The copy's own names decide; without names that the spec knows, the order in the spec does.
    """
    assert data_set.huggingface is not None
    order = data_set.huggingface.order or data_set.classnames
    place_of = {name: place for place, name in enumerate(data_set.classnames)}
    if stored is None:
        return [place_of[name] for name in order]
    index_of = {_plain(name): place for name, place in place_of.items()}
    index_of |= {_plain(name): place for place, name in enumerate(data_set.labels or ())}
    places = [index_of.get(_plain(name)) for name in stored]
    if all(place is None for place in places) and len(stored) == data_set.classes:
        return [place_of[name] for name in order]
    unknown = [name for name, place in zip(stored, places, strict=True) if place is None]
    indices = [place for place in places if place is not None]
    if unknown or len(set(indices)) != len(indices) or len(indices) != data_set.classes:
        what = f"such as {unknown[0]!r}" if unknown else "some twice"
        raise DataError(
            f"the published copy has {len(stored)} classes for {data_set.classes} in its spec, "
            f"{len(unknown)} that it does not know, {what}"
        )
    return indices


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _features(data_set: DataSet) -> Mapping[str, Any]:
    label = {"_type": "ClassLabel", "names": list(data_set.classnames)}
    return {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}


def _class_counts(path: Path, classes: int) -> list[int]:
    """Return the number of images of each class; raises :class:`DataError`."""
    import pyarrow.parquet as pq

    try:
        labels = pq.read_table(path, columns=["label"]).column("label").to_numpy()
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({one_line(error)})") from error
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(f"{path}: a label is not in 0 to {classes - 1}")
    counts: list[int] = np.bincount(labels, minlength=classes).tolist()
    return counts


# --- in words ------------------------------------------------------------------------------------


def results_text(done: Sequence[SplitResult], suite: str, root: Path) -> str:
    """Return a table of all splits, and the lines for a config."""
    # The table: one row per split, with its problem and the remedy.
    rows = [("data set", "split", "images", "classes", "")]
    for each in done:
        state = "fetched" if each.new else "there"
        note = state if each.ready else "; ".join(filter(None, (each.problem, each.remedy)))
        total = "" if each.expected in (None, each.images) else f" of {each.expected}"
        counts = (f"{each.images}{total}", str(each.classes))
        rows.append((each.data_set, each.split, *counts, note))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in rows
    ]
    ready = sum(each.ready for each in done)
    lines += ["", f"{ready} of {len(done)} splits are ready."]
    if not ready:
        return "\n".join(lines)

    # The section that a config needs to read these files.
    lines += [
        "In a config:",
        "",
        "suite:",
        f"  name: {suite}",
        '  checkpoints: "ckpts/{task}/finetuned.pt"',
        f'  adapt: "{root}/{{task}}/train.parquet"',
        f'  test: "{root}/{{task}}/test.parquet"',
    ]
    return "\n".join(lines)
