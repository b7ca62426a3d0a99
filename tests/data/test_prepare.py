"""data prepare: whatever a published copy counts in, our files count in the card's class order."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from stored_sets import add

from raymerge.cli import main
from raymerge.config.suites import DataSet, HuggingFace, load_data_set
from raymerge.data.prepare import from_hub, prepare, results_text
from raymerge.data.sources import labelled_images
from raymerge.data.sources.hub import hub_files
from raymerge.errors import DataError

EUROSAT = load_data_set("eurosat")
COUNTS = {"train": 20, "test": 30}
SMALL = replace(EUROSAT, sizes=COUNTS)


def png(shade: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(content, "PNG")
    return content.getvalue()


def published(
    path: Path, labels: Sequence[int], names: Sequence[str] | None, columns=("image", "label")
) -> Path:
    """As the hub has it; an image's shade is the place of its class in the stored order."""
    images = [{"bytes": png(label), "path": None} for label in labels]
    metadata = {}
    if names is not None:
        feature = {columns[1]: {"names": list(names)}}
        metadata = {b"huggingface": json.dumps({"info": {"features": feature}}).encode()}
    if columns[0] == columns[1]:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [image["bytes"] for image in images]}), path)
        return path
    schema = pa.schema(
        [(columns[0], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
         (columns[1], pa.int64())], metadata=metadata,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table([images, list(labels)], schema=schema), path)
    return path


def hub(tmp_path: Path, names: Sequence[str] | None):
    def fetch(where: HuggingFace, split: str) -> list[Path]:
        labels = [i % 10 for i in range(COUNTS[split])]
        half = len(labels) // 2
        return [
            published(tmp_path / "hub" / f"{split}-{i}.parquet", part, names)
            for i, part in enumerate((labels[:half], labels[half:]))
        ]

    return fetch


@pytest.mark.parametrize("given", ["own", "prompts", "none", "strange"])
def test_classes_are_those_of_the_card_whatever_the_copy_counts_in(
    tmp_path: Path, given: str
) -> None:
    """The hub's EuroSAT counts in another order than the class names; the shade tells which."""
    assert EUROSAT.huggingface is not None
    assert EUROSAT.huggingface.order is not None
    assert EUROSAT.labels is not None
    order = EUROSAT.huggingface.order
    stored = {
        "own": sorted(EUROSAT.labels),
        "prompts": list(order),
        "none": None,
        "strange": [f"c{i}" for i in range(10)],
    }[given]
    done = prepare([SMALL], tmp_path / "data", hub(tmp_path, stored))
    assert [(each.images, each.classes, each.ready, each.new) for each in done] == [
        (20, 10, True, True),
        (30, 10, True, True),
    ]
    names = SMALL.classnames
    meant = [names[SMALL.labels.index(n)] for n in stored] if given == "own" else order
    reference = str(tmp_path / "data" / "eurosat" / "test.parquet")
    images = labelled_images(reference, names, "test")
    for item, label in zip(images.items, images.labels, strict=True):
        shade = item.open().getpixel((0, 0))[0]
        assert names[label] == meant[shade]


def test_what_is_there_is_checked_and_not_fetched(tmp_path: Path) -> None:
    prepare([SMALL], tmp_path, hub(tmp_path, None))

    def fetch(where: HuggingFace, split: str) -> list[Path]:
        raise AssertionError("fetched again")

    done = prepare([SMALL], tmp_path, fetch)
    assert [(each.ready, each.new) for each in done] == [(True, False)] * 2


def test_one_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    good = hub(tmp_path, None)

    def fetch(where: HuggingFace, split: str) -> Sequence[Path]:
        if where.id != SMALL.huggingface.id:
            raise DataError("hf: cannot be fetched")
        return good(where, split)

    cars = load_data_set("cars")
    done = prepare([cars, SMALL], tmp_path, fetch)
    assert [each.ready for each in done] == [False, False, True, True]
    assert not list((tmp_path / "cars").glob("*")) if (tmp_path / "cars").exists() else True
    text = results_text(done, "vit-8", Path("data"))
    assert "2 of 4 splits are ready" in text
    assert str(cars.status) in text
    assert 'test: "data/{task}/test.parquet"' in text


@pytest.mark.parametrize(
    ("card", "names", "columns", "message"),
    [
        (replace(EUROSAT, sizes={"train": 21}), None, ("image", "label"), "20 images, not 21"),
        (SMALL, ["a", *sorted(EUROSAT.labels or ())[1:]], ("image", "label"), "such as 'a'"),
        (SMALL, None, ("image", "image"), "no column holds labels"),
    ],
)
def test_a_copy_that_is_not_the_card_s_is_told(
    tmp_path: Path, card: DataSet, names, columns, message: str
) -> None:
    def fetch(where: HuggingFace, split: str) -> list[Path]:
        labels = [i % 10 for i in range(COUNTS[split])]
        return [published(tmp_path / f"{split}.parquet", labels, names, columns)]

    train, _ = prepare([card], tmp_path / "data", fetch)
    assert not train.ready
    assert message in train.problem
    split = tmp_path / "data" / card.name / "train.parquet"
    assert split.exists() == ("images, not" in message)


def test_classes_without_images_are_told(tmp_path: Path) -> None:
    def fetch(where: HuggingFace, split: str) -> list[Path]:
        return [published(tmp_path / f"{split}.parquet", [3] * COUNTS[split], None)]

    train, _ = prepare([SMALL], tmp_path / "data", fetch)
    assert "9 of 10 classes have no image" in train.problem


def test_the_command_says_what_is_missing_and_returns_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a network nothing can be fetched, and each data set says so in a line."""
    root = str(tmp_path / "data")
    assert main(["data", "prepare", "--suite", "8", "--only", "dtd", "--root", root]) == 1
    out = capsys.readouterr().out
    assert "cannot be fetched" in out
    assert "0 of 2 splits are ready" in out
    assert main(["data", "prepare", "--only", "dtb"]) == 2
    assert "did you mean dtd" in capsys.readouterr().err
    assert main(["data", "prepare", "--suite", "9"]) == 2


# --- copies as they are on the hub ----------------------------------------------------------------


def shards(folder: Path, counts: Sequence[int], labels: Sequence[str]) -> list[Path]:
    """As clip-benchmark's WebDatasets are: train/0.tar with 0.jpg and 0.cls, counted over all."""
    paths, number = [], 0
    for shard, count in enumerate(counts):
        path = folder / f"{shard}.tar"
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as out:
            for _ in range(count):
                add(out, f"s{number:07d}.cls", labels[number % len(labels)].encode())
                add(out, f"s{number:07d}.jpg", png(number % 7))
                number += 1
        paths.append(path)
    (folder / "nshards.txt").write_text(str(len(counts)))
    return paths


@pytest.mark.parametrize("labels", [list("0123456"), list(load_data_set("fer2013").labels or ())])
def test_fer2013_is_read_from_its_tar_shards(tmp_path: Path, monkeypatch, labels) -> None:
    """The repository's layout, by way of the hub's client, from numbers or from names."""
    card = load_data_set("fer2013")
    sizes = {"train": 35, "test": 14}
    for split, count in sizes.items():
        shards(tmp_path / "repo" / split, [count - 7, 7], labels)
    (tmp_path / "repo" / "classnames.txt").write_text("angry")
    asked = []

    def snapshot_download(name, *, allow_patterns, revision, **options):
        from huggingface_hub.utils import filter_repo_objects

        names = [str(p.relative_to(tmp_path / "repo")) for p in (tmp_path / "repo").rglob("*.*")]
        asked.append(
            (name, revision, sorted(filter_repo_objects(names, allow_patterns=allow_patterns)))
        )
        return str(tmp_path / "repo")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    done = prepare([replace(card, sizes=sizes)], tmp_path / "data", from_hub)
    assert [(each.images, each.classes, each.ready) for each in done] == [
        (35, 7, True),
        (14, 7, True),
    ]
    assert asked == [
        ("clip-benchmark/wds_fer2013", None, ["train/0.tar", "train/1.tar"]),
        ("clip-benchmark/wds_fer2013", None, ["test/0.tar", "test/1.tar"]),
    ]
    images = labelled_images(str(tmp_path / "data/fer2013/test.parquet"), card.classnames, "w")
    assert [item.open().getpixel((0, 0))[0] for item in images.items] == list(images.labels)


def test_a_repository_without_parquet_is_read_from_the_hubs_converted_branch(
    tmp_path: Path, monkeypatch
) -> None:
    published(tmp_path / "converted/default/test/0000.parquet", [i % 10 for i in range(30)], None)
    (tmp_path / "main").mkdir()
    asked = []

    def snapshot_download(name, *, revision, **options):
        asked.append(revision)
        return str(tmp_path / ("converted" if revision else "main"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    where = EUROSAT.huggingface
    assert [path.name for path in from_hub(where, "test")] == ["0000.parquet"]
    assert asked == [None, "refs/convert/parquet"]
    asked.clear()
    with pytest.raises(DataError, match="holds no Parquet file of dev; it has 'default/test'"):
        hub_files("hf:a/b@v1:dev", "a/b", "v1", "dev", None)
    assert asked == ["v1"]  # what was asked for by name is not replaced


def test_booleans_and_other_names_of_columns_are_read(tmp_path: Path) -> None:
    """PatchCamelyon has booleans; a copy that is published again may rename its columns."""
    pcam = replace(load_data_set("pcam"), sizes={"train": 4, "test": 4})

    def fetch(where: HuggingFace, split: str) -> list[Path]:
        path = tmp_path / f"{split}.parquet"
        images = [png(int(i % 2)) for i in range(4)]
        columns = {"image": images, "label": [False, True, False, True]}
        if split == "test":
            columns = {"img": images, "labels": [False, True, False, True], "id": list("abcd")}
        pq.write_table(pa.table(columns), path)
        return [path]

    done = prepare([pcam], tmp_path / "data", fetch)
    assert [(each.images, each.ready) for each in done] == [(4, True), (4, True)]
    for split in ("train", "test"):
        path = tmp_path / "data" / "pcam" / f"{split}.parquet"
        assert labelled_images(str(path), pcam.classnames, "w").labels == (0, 1, 0, 1)


def test_the_hubs_spelling_of_a_class_is_known(tmp_path: Path) -> None:
    """All copies of CIFAR-100 on the hub have a class "cra"."""
    card = replace(load_data_set("cifar100"), sizes={"train": 100, "test": 100})
    names = [name.replace(" ", "_") for name in card.classnames]
    names[names.index("crab")] = "cra"

    def fetch(where: HuggingFace, split: str) -> list[Path]:
        assert where.label == "label"
        return [published(tmp_path / f"{split}.parquet", range(100), names)]

    assert all(each.ready for each in prepare([card], tmp_path / "data", fetch))
    listed = labelled_images(str(tmp_path / "test.parquet"), card.classnames, "w")
    assert listed.labels == tuple(range(100))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(4000) + b"PAR1", b"\x80" * 300])
@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_whatever_is_wrong_with_a_copy_is_one_line(tmp_path: Path, content: bytes, suffix) -> None:
    def fetch(where: HuggingFace, split: str) -> list[Path]:
        path = tmp_path / f"{split}.{suffix}"
        path.write_bytes(content)
        return [path]

    for each in prepare([SMALL], tmp_path / "data", fetch):
        assert not each.ready
        assert len(each.problem.splitlines()) == 1
    assert not any(path.is_file() for path in (tmp_path / "data").rglob("*"))


def test_two_at_once_leave_whole_files(tmp_path: Path) -> None:
    """Each writes a file of its own, and neither sees the other's half."""
    code = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2].split(",")
import test_prepare as t
from raymerge.data import prepare as p
contents = p._content
def slow(source, row):
    time.sleep(0.01)
    return contents(source, row)
p._content = slow
done = p.prepare([t.SMALL], Path(sys.argv[1]), t.hub(Path(sys.argv[1] + sys.argv[3]), None))
print([each.problem for each in done])
"""
    here = Path(__file__).parent
    folders = f"{here},{here.parent / 'support'}"
    argv = [sys.executable, "-c", code, str(tmp_path / "data"), folders]
    running = [
        subprocess.Popen([*argv, str(i)], stdout=subprocess.PIPE, text=True) for i in range(3)
    ]
    outs = [process.communicate(timeout=120)[0].strip() for process in running]
    assert outs == ["['', '']"] * 3
    written = sorted(path.name for path in (tmp_path / "data" / "eurosat").iterdir())
    assert written == ["test.parquet", "train.parquet"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def write_table(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    split_files = {split: hub(tmp_path, None)(EUROSAT.huggingface, split) for split in COUNTS}
    monkeypatch.setattr(pq.ParquetWriter, "write_table", write_table)
    for each in prepare([SMALL], tmp_path / "data", lambda where, split: split_files[split]):
        assert "No space left on device" in each.problem
    assert not any(path.is_file() for path in (tmp_path / "data").rglob("*"))


def test_a_root_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    for each in prepare([SMALL], tmp_path / "data", hub(tmp_path, None)):
        assert "data/eurosat: cannot be made" in each.problem
