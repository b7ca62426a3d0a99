"""data prepare: whatever a published copy counts in, our files count in the card's class order."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raymerge.cli import main
from raymerge.config.suites import DataSet, HuggingFace, load_data_set
from raymerge.data.prepare import prepare, results_text
from raymerge.data.sources import labelled_images
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
        (SMALL, None, ("img", "label"), "no column 'image'"),
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
    assert not list(tmp_path.rglob("*.partial"))


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
