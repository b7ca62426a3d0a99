"""Fetch and check a suite's data sets (``raymerge data prepare``): one Parquet file per split.

All files have the same layout: an encoded image per row, and the index of its class in the class
names of the data set spec, whatever order the published copy uses.

Legend: C classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raymerge.config.suites.specs import DataSet, HuggingFace, Split
from raymerge.data.folder import match_names
from raymerge.data.images import Source
from raymerge.data.sources import labelled_images
from raymerge.data.sources.reference import DataReference
from raymerge.errors import DataError, RaymergeError, RunError, excerpt
from raymerge.files.atomic import stage_file

FetchSplit = Callable[[HuggingFace, str], Sequence[Path]]
"""Returns a split's files in order, Parquet or tar shards; raises :class:`DataError`."""

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
        counts = _class_counts(path, data_set)
        _require_whole(counts, data_set, split)
    except RaymergeError as error:
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
        raise DataError(f"{sum(counts)} images, not {expected}; delete them and prepare them again")
    empty = [data_set.classnames[c] for c, count in enumerate(counts) if not count]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(counts)} classes have no image, such as {empty[0]!r}; "
            "delete the folder and prepare it again"
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
    # Of two at once, each writes a file of its own, and the last one that is whole stays.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{path.parent}: cannot be made: {error.strerror or error}; "
            "free space, or choose another folder"
        ) from error
    with stage_file(path, path.parent) as (partial, commit):
        _rewrite(files, where, data_set, partial)
        commit()


def _rewrite(files: Sequence[Path], where: HuggingFace, data_set: DataSet, out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())]).with_metadata(
        {b"huggingface": json.dumps(_features(data_set)).encode()}
    )
    with pq.ParquetWriter(out, schema) as writer:
        for source in _sources(files, where):
            places = _class_places(source, data_set)
            for start in range(0, len(source), _ROWS):
                rows = range(start, min(start + _ROWS, len(source)))
                images = [{"bytes": _content(source, row), "path": None} for row in rows]
                labels = places[rows.start : rows.stop]
                writer.write_table(pa.table([images, labels], schema=schema), row_group_size=_ROWS)


def _sources(files: Sequence[Path], where: HuggingFace) -> Iterator[Source]:
    """Yield the published files as any config's files are read.

    The numbers of each Parquet file's labels may have an order of its own.
    """
    from raymerge.data.sources.parquet import column_names, open_parquet
    from raymerge.data.sources.shards import open_shards

    if files[0].suffix.lower() == ".tar":
        yield open_shards(DataReference(where.id, where.id), files)
        return
    for file in files:
        # A copy that has been published again may name its columns otherwise.
        columns = column_names(file)
        named = {"image": where.image, "label": where.label}
        options = {key: name for key, name in named.items() if name in columns}
        yield open_parquet(DataReference(file.name, file.name, options), [file])


def _content(source: Source, row: int) -> bytes:
    content = source.encoded(row)
    if content is None:
        raise DataError(f"{source.name(row)}: an image's bytes are not in the file; fetch it again")
    return content


def _class_places(source: Source, data_set: DataSet) -> list[int]:
    """Return the index of each image's class in the spec's class names."""
    stored = source.labels()
    place_of = np.array(_places(stored.names, data_set), dtype=np.int64)
    wrong = stored.numbers[(stored.numbers < 0) | (stored.numbers >= len(place_of))]
    if len(wrong):
        raise DataError(
            f"{source.name(0)}: label {wrong[0]} is not in 0 to {len(place_of) - 1}; "
            "delete the file and fetch it again"
        )
    places: list[int] = place_of[stored.numbers].tolist()
    return places


def _places(stored: Sequence[str] | None, data_set: DataSet) -> list[int]:
    """Return the index in the spec's class names for each number of the published copy.

    The copy's own names decide; without names that the spec knows, the order in the spec does.
    """
    assert data_set.huggingface is not None
    order = data_set.huggingface.order or data_set.classnames
    place_of = {name: place for place, name in enumerate(data_set.classnames)}
    if stored is None:
        return [place_of[name] for name in order]
    places = match_names(stored, data_set.classnames, "the published copy", "class")
    if all(place is None for place in places) and len(stored) == data_set.classes:
        return [place_of[name] for name in order]
    unknown = [name for name, place in zip(stored, places, strict=True) if place is None]
    indices = [place for place in places if place is not None]
    if unknown or len(set(indices)) != len(indices) or len(indices) != data_set.classes:
        what = f"such as {excerpt(unknown[0])}" if unknown else "some twice"
        raise DataError(
            f"the published copy has {len(stored)} classes for {data_set.classes} in its spec, "
            f"{len(unknown)} that it does not know, {what}; "
            "see docs/data.md to arrange the images yourself"
        )
    return indices


def _features(data_set: DataSet) -> Mapping[str, Any]:
    label = {"_type": "ClassLabel", "names": list(data_set.classnames)}
    return {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}


def _class_counts(path: Path, data_set: DataSet) -> list[int]:
    """Return the number of images of each class; raises :class:`DataError`."""
    images = labelled_images(str(path), data_set.classnames, data_set.name)
    counts: list[int] = np.bincount(images.labels, minlength=data_set.classes).tolist()
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
