"""Stored data sets: the same pixels and labels as the same images in a folder, or one line why."""

from __future__ import annotations

import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from stored_sets import Sample, add, pixels_of, samples_of, write_npz, write_parquet, write_tar
from world import World, write_image

from raymerge.data import folder
from raymerge.data.decoding import check_image, decode, decode_all
from raymerge.data.preprocess import Preprocess
from raymerge.data.sources import (
    arrays,
    is_folder,
    labelled_images,
    labels_in_order,
    parquet,
    parquet_pages,
    unlabeled_images,
)
from raymerge.data.sources.files import stamps_of
from raymerge.errors import DataError

CFG = PreprocessCfg(size=16)
PREPROCESS = Preprocess((16, 16), CFG.mean, CFG.std, image_transform_v2(CFG, is_train=False))
CLASSES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def images(world: World) -> Path:
    """Three class folders of six images."""
    return world.root / "data" / "colour" / "test"


@pytest.fixture(scope="module")
def samples(images: Path) -> list[Sample]:
    return samples_of(images, CLASSES)


def _halves(write: Callable[[Path, list[Sample]], Path], names: list[str]):
    def both(root: Path, samples: list[Sample]) -> str:
        for name, part in zip(names, (samples[:7], samples[7:]), strict=True):
            write(root / name, part)
        return str(root)

    return both


FORMS: dict[str, Callable[[Path, list[Sample]], object]] = {
    "parquet": lambda root, s: write_parquet(root / "test.parquet", s),
    "parquet of plain bytes": lambda root, s: write_parquet(root / "t.parquet", s, struct=False),
    "parquet with names": lambda root, s: write_parquet(root / "t.parquet", s, CLASSES),
    "folder of parquet": _halves(
        write_parquet, ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"]
    ),
    "layout of the hub": _halves(
        write_parquet, ["data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet"]
    ),
    "tar": lambda root, s: write_tar(root / "x.tar", s),
    "tar with class names": lambda root, s: write_tar(
        root / "x.tar", s, "txt", [CLASSES[label] for _, label in s]
    ),
    "tar with json": lambda root, s: write_tar(
        root / "x.tar", s, "json", [json.dumps({"label": label}) for _, label in s]
    ),
    "folder of tar": _halves(write_tar, ["0.tar", "1.tar"]),
    "tar pattern": lambda root, s: (
        _halves(write_tar, ["s-009.tar", "s-010.tar"])(root, s) + "/s-{009..010}.tar"
    ),
    "npz": lambda root, s: write_npz(root / "x.npz", s),
    "compressed npz": lambda root, s: write_npz(root / "x.npz", s, compressed=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_pixels_and_labels_are_those_of_the_folder(form, tmp_path, images, samples):
    reference = str(FORMS[form](tmp_path, samples))
    expected = folder.labelled_images(str(images), CLASSES, "w")
    listed = labelled_images(reference, CLASSES, "w")
    assert listed.labels == expected.labels
    assert labels_in_order(reference, CLASSES, "w") == expected.labels
    pixels = decode_all(expected.items, PREPROCESS)
    assert torch.equal(decode_all(listed.items, PREPROCESS), pixels)
    unlabeled = unlabeled_images(reference, "w")
    assert unlabeled.labels == (-1,) * len(samples)
    assert torch.equal(decode_all(unlabeled.items[5:11], PREPROCESS), pixels[5:11])
    assert [check_image(item) for item in listed.items] == [None] * len(samples)


@pytest.mark.parametrize("form", FORMS)
def test_an_image_is_small_to_send_and_opens_elsewhere(form, tmp_path, samples):
    listed = unlabeled_images(str(FORMS[form](tmp_path, samples)), "w")
    decode(listed.items[0], PREPROCESS)  # whatever that keeps stays here
    sent = pickle.dumps(listed.items[9])
    assert len(sent) < 2000
    received = pickle.loads(sent)
    assert received == listed.items[9]
    assert torch.equal(decode(received, PREPROCESS), decode(listed.items[9], PREPROCESS))


@pytest.mark.parametrize("form", FORMS)
def test_keys_tell_images_apart_and_do_not_say_where_they_lie(form, tmp_path, samples):
    keys = unlabeled_images(str(FORMS[form](tmp_path, samples)), "w").keys("unused")
    assert len(set(keys)) == len(samples)
    assert not any(str(tmp_path) in key for key in keys)


def test_an_image_folder_is_one_whatever_else_lies_in_it(tmp_path, images, samples):
    write_image(tmp_path / "a" / "1.png", np.random.default_rng(0))
    write_tar(tmp_path / "download.tar", samples)
    write_parquet(tmp_path / "train.parquet", samples)
    assert is_folder(str(tmp_path))
    assert [p.name for p in unlabeled_images(str(tmp_path), "w").items] == ["1.png"]
    assert is_folder(str(images))
    assert unlabeled_images(str(images), "w") == folder.unlabeled_images(str(images), "w")


def test_a_limit_takes_images_evenly(tmp_path, samples):
    path = write_npz(tmp_path / "x.npz", samples)
    listed = labelled_images(f"{path}?limit=6", CLASSES, "w")
    assert listed.labels == (0, 0, 1, 1, 2, 2)
    assert len(unlabeled_images(f"{path}?limit=1000", "w")) == len(samples)


# --- labels --------------------------------------------------------------------------------------


def test_names_match_in_any_order_and_by_letters_and_digits(tmp_path, samples):
    stored = ["Bright_Red", "blue", "GREEN", "never used"]
    numbers = [[0, 2, 1][label] for _, label in samples]
    path = write_parquet(tmp_path / "x.parquet", samples, stored, labels=numbers)
    listed = labelled_images(str(path), ["bright red", "green", "blue"], "w")
    assert listed.labels == tuple(label for _, label in samples)


def test_names_that_do_not_match_are_listed_with_the_remedy(tmp_path, samples):
    path = write_parquet(tmp_path / "x.parquet", samples, CLASSES)
    with pytest.raises(DataError) as raised:
        labelled_images(str(path), ["red", "green", "violet"], "tasks[1].test")
    assert str(raised.value) == (
        f"tasks[1].test: {path}: the data set has 3 classes for 3 class names; none is 'violet'; "
        "no class name is 'blue'; use its names, or ?match=index takes the numbers as places in "
        "classnames"
    )
    listed = labelled_images(f"{path}?match=index", ["a", "b", "c"], "w")
    assert listed.labels == tuple(label for _, label in samples)


@pytest.mark.parametrize(
    ("form", "classes"),
    [("parquet", "class names"), ("tar", "class names"), ("npz", "class names")],
)
def test_numbers_outside_the_classes_are_counted(form, classes, tmp_path, samples):
    reference = str(FORMS[form](tmp_path, samples))
    with pytest.raises(DataError, match=rf"6 of 18 labels are not in 0 to 1, the 2 {classes}"):
        labelled_images(reference, ["a", "b"], "w")


def test_a_split_without_labels_says_so(tmp_path, samples):
    path = write_parquet(tmp_path / "x.parquet", samples, CLASSES, labels=[-1] * len(samples))
    with pytest.raises(DataError, match=r"18 of 18 labels .*choose a labelled split"):
        labelled_images(str(path), CLASSES, "w")


# --- Parquet -------------------------------------------------------------------------------------


def test_splits_and_configurations_are_chosen_by_name(tmp_path, samples):
    for config, split, count in (("a", "train", 4), ("a", "test", 3), ("b", "test", 2)):
        write_parquet(tmp_path / config / f"{split}-00000-of-00001.parquet", samples[:count])
    reference = f"{tmp_path}?config=a&split=train"
    assert len(unlabeled_images(reference, "w")) == 4
    for options, message in (
        ("", r"holds the splits 'test', 'train'; name one: \?split=test"),
        ("?split=test", r"holds the configurations 'a', 'b'; name one: config=a"),
        ("?split=dev", r"no Parquet file of dev; it has 'a/test', 'a/train', 'b/test'"),
        (
            "?splits=dev",
            r"option 'splits' is unknown; did you mean split\? \(known: image, label",
        ),
        ("?split", r"'split' is not a list of options"),
        ("?limit=0", r"limit='0' is no whole number"),
        ("?split=test&split=train", "an option is given twice"),
    ):
        with pytest.raises(DataError, match=message):
            unlabeled_images(f"{tmp_path}{options}", "w")


def test_a_missing_shard_is_named(tmp_path, samples):
    write_parquet(tmp_path / "test-00001-of-00003.parquet", samples)
    with pytest.raises(DataError, match=r"1 of 3 Parquet files .* without '00000', '00002'"):
        unlabeled_images(str(tmp_path), "w")


def test_columns_are_found_or_named(tmp_path, samples):
    path = write_parquet(tmp_path / "x.parquet", samples, columns=("photo", "fine_label"))
    labels = tuple(label for _, label in samples)
    assert labelled_images(str(path), CLASSES, "w").labels == labels
    assert labelled_images(f"{path}?image=photo&label=fine_label", CLASSES, "w").labels == labels
    with pytest.raises(DataError, match=r"column 'x' holds no images; name it: image=…, .*'photo'"):
        unlabeled_images(f"{path}?image=x", "w")
    table = pq.read_table(path)
    pq.write_table(table.append_column("coarse_label", table.column(1)), path)
    with pytest.raises(DataError, match=r"which column holds the labels; .*'coarse_label'"):
        labelled_images(str(path), CLASSES, "w")
    pq.write_table(table.select(["fine_label"]), path)
    with pytest.raises(DataError, match=r"no column holds images \(columns: fine_label: integer\)"):
        unlabeled_images(str(path), "w")


def test_images_that_are_only_paths_are_refused_not_opened(tmp_path, samples):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": None, "path": str(samples[0][0])}, None], kind)
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
    for item in unlabeled_images(str(tmp_path / "x.parquet"), "w").items:
        assert "has no bytes in column 'image'" in str(check_image(item))


def test_a_damaged_image_in_parquet_is_named_by_file_and_row(tmp_path, samples):
    bad = tmp_path / "bad.png"
    bad.write_bytes(samples[0][0].read_bytes()[:200])
    path = write_parquet(tmp_path / "train-0001.parquet", [*samples[:7], (bad, 0)])
    items = unlabeled_images(str(path), "w").items
    assert [i for i, item in enumerate(items) if check_image(item)] == [7]
    with pytest.raises(DataError, match=r"image .*/train-0001\.parquet row 7: does not decode"):
        decode(items[7], PREPROCESS)


@pytest.mark.parametrize("keep", [0, 3, 100, -200, -5])
def test_a_truncated_parquet_file_is_refused(tmp_path, samples, keep):
    path = write_parquet(tmp_path / "x.parquet", samples)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"^w: .*x\.parquet: not a readable Parquet file") as raised:
        unlabeled_images(str(path), "w")
    assert "\n" not in str(raised.value)


def test_damage_inside_a_parquet_file_is_found_by_the_check(tmp_path, samples):
    path = write_parquet(tmp_path / "x.parquet", samples)
    content = bytearray(path.read_bytes())
    content[100:3000] = bytes(2900)
    path.write_bytes(content)
    problems = [check_image(item) for item in unlabeled_images(str(path), "w").items]
    assert any(problems)
    assert all("x.parquet" in str(problem) for problem in problems if problem)


# --- the hub -------------------------------------------------------------------------------------


def test_the_hub_is_asked_for_one_split_and_read_like_a_folder(tmp_path, samples, monkeypatch):
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", samples[:2], CLASSES)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", samples, CLASSES)
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    listed = labelled_images("hf:tanganke/sun397@v1.0:test", CLASSES, "w")
    assert listed.labels == tuple(label for _, label in samples)
    assert (asked["name"], asked["repo_type"], asked["revision"]) == (
        "tanganke/sun397",
        "dataset",
        "v1.0",
    )
    assert not any("train" in pattern for pattern in asked["allow_patterns"])
    assert str(listed.items[3]) == (
        "hf:tanganke/sun397@v1.0:test test-00000-of-00001.parquet row 3"
    )
    with pytest.raises(DataError, match=r"no Parquet file of dev; it has 'default/test', "):
        unlabeled_images("hf:tanganke/sun397:dev", "w")


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("data/test-00000-of-00001.parquet", ""),
        ("cropped_digits/test-00000-of-00001.parquet", "cropped_digits"),
        ("cropped_digits/test/0000.parquet", "cropped_digits"),
        ("test.parquet", ""),
    ],
)
def test_the_patterns_fetch_every_usual_layout(path, pattern, tmp_path, samples, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    write_parquet(tmp_path / path, samples)

    def snapshot_download(name, *, allow_patterns, **options):
        names = [path, path.replace("test", "train"), "README.md"]
        assert list(filter_repo_objects(names, allow_patterns=allow_patterns)) == [path]
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert len(unlabeled_images("hf:a/b:test", "w")) == len(samples)
    if pattern:
        assert len(unlabeled_images(f"hf:a/b:test?config={pattern}", "w")) == len(samples)


def test_what_cannot_be_fetched_is_one_line(monkeypatch):
    with pytest.raises(DataError, match=r"w: hf:no/such:test: cannot be fetched \(.*HF_TOKEN"):
        unlabeled_images("hf:no/such:test", "w")
    for text in ("hf:no/such", "hf:such:test", "hf:a/b:c/d", "hf:"):
        with pytest.raises(DataError, match="write hf:ORG/NAME:SPLIT"):
            unlabeled_images(text, "w")
    with pytest.raises(DataError, match="images come from local files"):
        unlabeled_images("zfs:pool", "w")


# --- WebDataset ----------------------------------------------------------------------------------


def _tar(path: Path, *members: tuple[str, bytes], **changes: object) -> str:
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            add(shard, name, content, **changes)
    return str(path)


def test_names_in_a_tar_are_no_paths(tmp_path, samples):
    content = samples[0][0].read_bytes()
    names = ("../../a.png", "/etc/b.png", "d\ne\x1b[31m.png", "._hidden.png", "notes.md")
    reference = _tar(tmp_path / "x.tar", *((name, content) for name in names))
    before = sorted(tmp_path.parent.rglob("*"))
    items = unlabeled_images(reference, "w").items
    assert len(items) == 3
    assert torch.equal(decode(items[0], PREPROCESS), decode(samples[0][0], PREPROCESS))
    assert str(items[0]) == f"{reference} member ../../a"
    assert str(items[2]).isprintable()
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(tmp_path, kind):
    reference = _tar(tmp_path / "x.tar", ("a.png", b""), type=kind, linkname="/etc/passwd")
    with pytest.raises(DataError, match=r"x\.tar member a\.png: is a link or no plain file"):
        unlabeled_images(reference, "w")


@pytest.mark.parametrize("size", [1 << 20, 1 << 40, -512, -(1 << 40)])
def test_sizes_that_cannot_be_are_refused(tmp_path, samples, size):
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        good = tarfile.TarInfo("a.png")
        good.size = 512
        file.write(good.tobuf() + bytes(512))
        bad = tarfile.TarInfo("b.png")
        bad.size = size
        file.write(bad.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match=r"x\.tar") as raised:
        unlabeled_images(str(path), "w")
    assert "\n" not in str(raised.value)


def test_an_image_too_large_to_hold_is_not_read(tmp_path, samples, monkeypatch):
    monkeypatch.setattr("raymerge.data.sources.files.MOST_ENCODED_BYTES", 1000)
    reference = str(write_tar(tmp_path / "x.tar", samples))
    problem = check_image(unlabeled_images(reference, "w").items[0])
    assert "x.tar member 00000: is 0 MiB encoded" in str(problem)


@pytest.mark.parametrize("keep", [0, 100, 700, -12000])
def test_a_truncated_tar_is_refused(tmp_path, samples, keep):
    path = write_tar(tmp_path / "x.tar", samples)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"x\.tar"):
        unlabeled_images(str(path), "w")


def test_what_is_wrong_with_a_tar_is_named(tmp_path, samples):
    png = samples[0][0].read_bytes()
    cases = {
        "the sample has another image": [("a.png", png), ("a.jpg", png)],
        "is there twice": [("a.png", png), ("a.cls", b"0"), ("a.cls", b"1")],
        "holds no image": [("a.cls", b"0")],
        r"member a: has no label": [("a.png", png)],
        r"member a\.cls: no label can be read": [("a.png", png), ("a.cls", b"\xff")],
        r"member a\.json: holds no label.*'label'": [("a.png", png), ("a.json", b"{}")],
        r"member a\.json: no label can be read": [("a.png", png), ("a.json", b"[" * 100000)],
    }
    for i, (message, members) in enumerate(cases.items()):
        with pytest.raises(DataError, match=message):
            labelled_images(_tar(tmp_path / f"{i}.tar", *members), CLASSES, "w")
    for i in (0, 1):
        write_tar(tmp_path / f"s-{i}.tar", samples)
    with pytest.raises(DataError, match=r"1 of 3 files are missing: 's-2\.tar'"):
        unlabeled_images(str(tmp_path / "s-{0..2}.tar"), "w")
    with pytest.raises(DataError, match=r"\{5\.\.2\} names no shard"):
        unlabeled_images(str(tmp_path / "s-{5..2}.tar"), "w")
    with pytest.raises(DataError, match=r"nowhere\.tar: no such file"):
        unlabeled_images(str(tmp_path / "nowhere.tar"), "w")


def test_a_decompression_bomb_is_refused_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    bomb = [(write_image(tmp_path / "x.png", np.random.default_rng(0)), 0)]
    for form in ("parquet", "tar"):
        items = unlabeled_images(str(FORMS[form](tmp_path / form, bomb)), "w").items
        assert "decompression bomb" in str(check_image(items[0]))
        with pytest.raises(DataError, match="decompression bomb"):
            decode(items[0], PREPROCESS)


# --- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(5, 20, 18), (5, 20, 18, 1)])
def test_grey_arrays_are_grey_images(tmp_path, save, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    save(tmp_path / "x.npz", images=pixels)
    items = unlabeled_images(str(tmp_path / "x.npz"), "w").items
    for i, item in enumerate(items):
        Image.fromarray(pixels[i].reshape(20, 18)).save(tmp_path / "x.png")
        assert torch.equal(decode(item, PREPROCESS), decode(tmp_path / "x.png", PREPROCESS))


def test_fortran_order_is_read_too(tmp_path, samples):
    pixels = np.asfortranarray(pixels_of(samples))
    np.savez(tmp_path / "x.npz", images=pixels)
    item = unlabeled_images(str(tmp_path / "x.npz"), "w").items[4]
    assert torch.equal(decode(item, PREPROCESS), decode(samples[4][0], PREPROCESS))


def test_arrays_of_objects_are_refused_in_one_line(tmp_path, samples):
    ragged = np.empty(2, dtype=object)
    ragged[:] = [np.zeros((2, 2, 3), np.uint8), np.zeros((3, 3, 3), np.uint8)]
    np.savez(tmp_path / "x.npz", images=ragged)
    with pytest.raises(DataError, match=r"w: .*x\.npz: images holds Python objects.*pickle") as r:
        unlabeled_images(str(tmp_path / "x.npz"), "w")
    assert "\n" not in str(r.value)
    np.savez(tmp_path / "y.npz", images=pixels_of(samples), labels=np.array(["a", None] * 9))
    with pytest.raises(DataError, match=r"labels holds Python objects"):
        labelled_images(str(tmp_path / "y.npz"), CLASSES, "w")


def test_arrays_of_another_kind_are_refused_with_their_shape(tmp_path, samples):
    pixels = pixels_of(samples)
    for images, message in (
        (pixels.astype(np.float32), r"images is float32 of shape \(18, 40, 36, 3\)"),
        (pixels.transpose(0, 3, 1, 2).copy(), r"uint8 of shape \(18, 3, 40, 36\)"),
        (pixels[:0], r"shape \(0, "),
    ):
        np.savez(tmp_path / "x.npz", images=images)
        with pytest.raises(DataError, match=message):
            unlabeled_images(str(tmp_path / "x.npz"), "w")
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.zeros(17, int))
    with pytest.raises(DataError, match=r"labels is int64 of shape \(17,\); .*\(18,\)"):
        labelled_images(str(tmp_path / "x.npz"), CLASSES, "w")
    np.savez(tmp_path / "x.npz", x_train=pixels)
    with pytest.raises(DataError, match=r"no array 'images' \(it has x_train\)"):
        unlabeled_images(str(tmp_path / "x.npz"), "w")


@pytest.mark.parametrize("keep", [0, 50, 4000, -100])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_truncated_npz_is_refused(tmp_path, samples, keep, compressed):
    path = write_npz(tmp_path / "x.npz", samples, compressed=compressed)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"x\.npz: not a readable \.npz file"):
        unlabeled_images(str(path), "w")


def test_an_npz_that_lies_about_its_size_is_refused(tmp_path):
    header = (
        b"\x93NUMPY\x01\x00\x76\x00"
        + str({"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**4, 10**4)}).encode()
    ).ljust(127) + b"\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", header + bytes(100))
    with pytest.raises(DataError, match=r"takes 100000000000000 bytes, but 228 are stored"):
        unlabeled_images(str(tmp_path / "x.npz"), "w")


def test_a_compressed_bomb_is_not_unpacked(tmp_path, samples, monkeypatch):
    path = write_npz(tmp_path / "x.npz", samples, compressed=True)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(DataError, match=r"unpacked, more than is free; save it with np\.savez"):
        unlabeled_images(str(path), "w")


def test_other_files_are_no_data_sets(tmp_path):
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"x\.csv: is no image folder and no \.parquet"):
        unlabeled_images(str(tmp_path / "x.csv"), "w")
    with pytest.raises(DataError, match=r"x\.parquet: no such file"):
        unlabeled_images(str(tmp_path / "x.parquet"), "w")
    write_image(tmp_path / "images" / "1.png", np.random.default_rng(0))
    with pytest.raises(DataError, match="a folder of images has no options"):
        unlabeled_images(f"{tmp_path / 'images'}?limit=3", "w")


# --- files that unpack to more than they are ------------------------------------------------------


def test_parquet_that_repeats_one_value_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary of one large value: the file has a few kB, its rows 64 MB."""
    monkeypatch.setattr(parquet, "_MOST_GROUP_BYTES", 1 << 24)
    monkeypatch.setattr(parquet, "_MOST_LABEL_BYTES", 1 << 20)
    images = pa.array([b"x" * (1 << 20)] * 64)
    table = pa.table({"image": images, "label": ["y" * (1 << 16)] * 64})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, dictionary_pagesize_limit=1 << 25)
    assert path.stat().st_size < 1 << 20
    found = unlabeled_images(str(path), "here")
    with pytest.raises(DataError, match=r"row group 0 has over 0.0 GiB of images"):
        found.items[0].encoded()
    with pytest.raises(DataError, match="column 'label' unpacks to over 1 MiB of labels"):
        labelled_images(str(path), ["a", "b"], "here")


def test_a_parquet_page_that_unpacks_to_gigabytes_is_refused_by_its_header(tmp_path: Path) -> None:
    """pyarrow unpacks a page as a whole; its header is read before."""
    image = pa.array([bytes(80 << 20)], pa.binary())
    for codec in ("brotli", "zstd", "gzip"):
        path = tmp_path / f"{codec}.parquet"
        pq.write_table(pa.table({"image": image, "label": [0]}), path, compression=codec)
        assert path.stat().st_size < 1 << 18
        found = unlabeled_images(str(path), "w")
        with pytest.raises(
            DataError, match=r"a page of column 'image' would unpack from [\d,]+ to"
        ):
            found.items[0].encoded()
        assert labelled_images(str(path), ["a"], "w").labels == (0,)


def test_a_small_value_for_many_rows_is_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_ANY_BYTES", 1 << 24)
    images = pa.array([bytes(1 << 20)] * 64, pa.binary())
    pq.write_table(pa.table({"image": images, "label": [0] * 64}), tmp_path / "x.parquet",
                   compression="zstd", dictionary_pagesize_limit=1 << 25)  # fmt: skip
    with pytest.raises(
        DataError, match=r"unpacks from [\d,]+ to over 16,777,216 bytes; write each"
    ):
        unlabeled_images(str(tmp_path / "x.parquet"), "w").items[0].encoded()


def test_pages_without_number_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_pages, "_ANY_PAGES", 8)
    table = pa.table({"image": [b"x" * 50] * 40, "label": [0] * 40})
    pq.write_table(table, tmp_path / "x.parquet", use_dictionary=False, data_page_size=1,
                   write_batch_size=1)  # fmt: skip
    with pytest.raises(DataError, match=r"column 'image' has over 8 pages in a row group"):
        unlabeled_images(str(tmp_path / "x.parquet"), "w").items[0].encoded()
    monkeypatch.setattr(parquet_pages, "_MOST_FOOTER_BYTES", 100)
    parquet_pages._chunks.cache_clear()
    with pytest.raises(DataError, match=r"its footer has \d+ bytes"):
        unlabeled_images(str(tmp_path / "x.parquet"), "w").items[0].encoded()


def test_a_large_value_is_unpacked_for_few_rows_at_a_time(tmp_path, monkeypatch):
    """A dictionary of one value for many rows, and values that repeat the one before them."""
    monkeypatch.setattr(parquet, "_MOST_GROUP_BYTES", 1 << 26)
    seen = []

    class Spy:
        def __init__(self, file):
            self._file, self.metadata = file, file.metadata
            self.schema_arrow = file.schema_arrow

        def iter_batches(self, rows, **options):
            seen.append(rows)
            return self._file.iter_batches(rows, **options)

    value = bytes(20 << 20)
    table = pa.table({"image": pa.array([value] * 12, pa.binary()), "label": [0] * 12})
    delta = {"use_dictionary": False, "column_encoding": {"image": "DELTA_BYTE_ARRAY"}}
    ways = {"dictionary": {"dictionary_pagesize_limit": 1 << 30}, "delta": delta}
    original = parquet._opened
    monkeypatch.setattr(parquet, "_opened", lambda file: Spy(original(file)))
    for name, options in ways.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table, path, **options)
        with pytest.raises(DataError, match=r"row group 0 has over 0\.1 GiB of images"):
            unlabeled_images(str(path), "w").items[0].encoded()
    assert len(seen) == 2
    assert max(seen) <= 6


def test_the_numbers_of_a_parquet_file_are_those_of_pyarrow(tmp_path, samples):
    path = write_parquet(tmp_path / "x.parquet", samples, CLASSES, row_group_size=4)
    (stamp,) = stamps_of([path])
    metadata = pq.ParquetFile(path).metadata
    for group in range(metadata.num_row_groups):
        chunks = [metadata.row_group(group).column(i) for i in range(3)]
        for column in ("image", "label"):
            size = parquet_pages.column_pages(stamp, group, column).total
            headers = sum(
                c.total_uncompressed_size for c in chunks if c.path_in_schema.startswith(column)
            )
            assert 0 < size < headers < size + 600


# --- archives ------------------------------------------------------------------------------------


def _extended(path: Path, kind: bytes, content: bytes, png: bytes) -> str:
    """Write a tar whose first member is an extended header, then an image."""
    with tarfile.open(path, "w") as shard:
        add(shard, "header", content, type=kind)
        add(shard, "a.png", png)
    return str(path)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE])
def test_long_numbers_in_a_tars_headers_are_refused_at_once(tmp_path, samples, kind):
    """tarfile searches them in a time that is the square of their length."""
    png = samples[0][0].read_bytes()
    for digits, message in ((60_000, "a number of hundreds of digits"), (1 << 20, "1,048,576 byt")):
        reference = _extended(tmp_path / "x.tar", kind, b"1" * digits, png)
        with pytest.raises(DataError, match=rf"x\.tar: not a readable tar file .*{message}"):
            unlabeled_images(reference, "w")
    reference = _extended(tmp_path / "y.tar", kind, b"16 comment=short", png)
    assert len(unlabeled_images(reference, "w")) == 1


def test_global_headers_that_grow_are_refused(tmp_path, samples):
    records = b"".join(b"%d %07d=x\n" % (13, key) for key in range(1500))
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        for _ in range(3):
            add(shard, "header", records, type=tarfile.XGLTYPE)
            add(shard, "a.png", samples[0][0].read_bytes())
    with pytest.raises(DataError, match=r"x\.tar: .*over 1000 keys in global headers"):
        unlabeled_images(str(tmp_path / "x.tar"), "w")


def test_long_names_of_members_are_read_in_both_forms(tmp_path, samples):
    content = samples[0][0].read_bytes()
    name = "a" * 90 + "/" + "b" * 90 + "/ü.png"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=form) as shard:
            add(shard, name, content)
        assert str(unlabeled_images(str(tmp_path / "x.tar"), "w").items[0]).endswith("…")


def test_labels_of_a_tar_may_be_boolean(tmp_path, samples):
    png = samples[0][0].read_bytes()
    members = [("a.png", png), ("a.json", b'{"label": true}'), ("b.png", png), ("b.json", b"false")]
    assert labelled_images(_tar(tmp_path / "x.tar", *members), ["n", "y"], "w").labels == (1, 0)


def _npy(header: bytes, version: int = 1, size: int = 0) -> bytes:
    width = 2 if version == 1 else 4
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + len(header).to_bytes(width, "little")
        + header
        + bytes(size)
    )


def _header(descr: str, shape: tuple[int, ...]) -> bytes:
    return str({"descr": descr, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"


def _npz(path: Path, **members: bytes) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return str(path)


def test_labels_of_enormous_texts_are_refused_before_they_are_read(tmp_path):
    images = _npy(_header("|u1", (1, 2, 2)), size=4)
    labels = _npy(_header("<U25000000", (1,)), size=100_000_000)
    reference = _npz(tmp_path / "x.npz", images=images, labels=labels)
    assert Path(reference).stat().st_size < 1 << 18
    with pytest.raises(DataError, match=r"labels is <U25000000 of shape \(1,\): 100,000,000 bytes"):
        labelled_images(reference, ["a"], "w")
    reference = _npz(tmp_path / "y.npz", images=images, labels=_npy(_header("|b1", (1,)), size=1))
    assert labelled_images(reference, ["a", "b"], "w").labels == (0,)


@pytest.mark.parametrize("version", [2, 3])
def test_an_npy_header_is_not_read_beyond_its_limit(tmp_path, version):
    reference = _npz(tmp_path / "x.npz", images=_npy(b" " * 50_000_000, version))
    with pytest.raises(DataError, match=r"a header of 50,000,000 bytes"):
        unlabeled_images(reference, "w")


def test_a_compressed_array_of_nothing_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_ANY_BYTES", 1 << 20)
    images = _npy(_header("|u1", (2, 1000, 1000)), size=2_000_000)
    with pytest.raises(
        DataError, match=r"images would unpack from [\d,]+ to 2,000,000 bytes; save"
    ):
        unlabeled_images(_npz(tmp_path / "x.npz", images=images), "w")


def test_names_in_files_are_quoted_in_part(tmp_path, samples):
    """A message holds at most a few dozen characters of what a file calls its parts."""
    long = "n" * 900_000
    png = samples[0][0].read_bytes()
    parquet_file = write_parquet(tmp_path / "a.parquet", samples[:2], labels=[long, "b"])
    names = write_parquet(tmp_path / "b.parquet", samples[:2], [long, "b"])
    pq.write_table(pa.table({long: ["x"], "y": ["z"]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"image": [png], long: [0], "z": [0]}), tmp_path / "d.parquet")
    tar = _tar(tmp_path / "e.tar", ("a.png", png), ("a.cls", long.encode()))
    zipped = _npz(tmp_path / "f.npz", **{"n" * 60_000: b""})
    deep = _npz(tmp_path / "g.npz", images=_npy(_header("|u1", (1,) * 30)))
    for reference in (parquet_file, names, tmp_path / "c.parquet", tmp_path / "d.parquet", tar,
                      zipped, deep):  # fmt: skip
        with pytest.raises(DataError) as raised:
            labelled_images(str(reference), CLASSES, "w")
        assert len(str(raised.value)) < 700 + len(str(reference))


def test_a_tar_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("x").tobuf())
    header[124:136] = b"\x80" + (1 << 62).to_bytes(11, "big")
    header[156:157] = tarfile.XHDTYPE
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "x.tar").write_bytes(bytes(header) + bytes(2048))
    with pytest.raises(DataError, match=r"x\.tar: not a readable tar file"):
        unlabeled_images(str(tmp_path / "x.tar"), "here")


def test_a_parquet_footer_with_any_byte_changed_is_read_or_refused(
    world: World, tmp_path: Path
) -> None:
    """It counts rows that the columns do not hold, and sizes that pyarrow gives up its life for."""
    folder = world.root / "data" / "tone" / "test"
    path = write_parquet(tmp_path / "x.parquet", samples_of(folder, ["warm", "cold"])[::4])
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    refusals = []
    for number, place in enumerate(range(len(content) - 8 - length, len(content) - 8, 3)):
        damaged = bytearray(content)
        damaged[place] ^= (1, 2, 0x40)[number % 3]
        (tmp_path / f"{number}.parquet").write_bytes(damaged)
        try:
            found = labelled_images(str(tmp_path / f"{number}.parquet"), ["warm", "cold"], "here")
            for item in found.items[:9]:
                item.encoded()
        except DataError as error:
            refusals.append(str(error))
    assert any("a header is damaged" in refusal for refusal in refusals)
    assert any("a row group has -4 rows" in refusal for refusal in refusals)


# --- inputs that people have ---------------------------------------------------------------------


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    gradient = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(gradient).save(tmp_path / "a.png")
    Image.fromarray((gradient / 257).round().astype(np.uint8)).save(tmp_path / "b.png")
    deep, plain = (decode(tmp_path / name, PREPROCESS) for name in ("a.png", "b.png"))
    assert torch.equal(deep, plain)
    assert check_image(tmp_path / "a.png") is None
    Image.fromarray(gradient.astype(np.float32)).save(tmp_path / "c.tif")
    error = check_image(tmp_path / "c.tif")
    assert "have no white; save it with 8 or 16 bits" in str(error)


def test_a_small_file_of_enormous_pixels_is_refused_before_decoding(tmp_path):
    size = ((12000 - 1) | (12000 - 1) << 14).to_bytes(4, "little")
    chunk = b"VP8L" + (10).to_bytes(4, "little") + b"\x2f" + size + bytes(5)
    (tmp_path / "a.webp").write_bytes(
        b"RIFF" + (len(chunk) + 4).to_bytes(4, "little") + b"WEBP" + chunk
    )
    assert Image.open(tmp_path / "a.webp").size == (12000, 12000)
    assert "12000 x 12000 pixels in 30 bytes" in str(check_image(tmp_path / "a.webp"))


def test_boolean_labels_are_classes_0_and_1(tmp_path, samples):
    content = [path.read_bytes() for path, _ in samples[:2]]
    table = pa.table({"image": content, "label": [True, False]})
    pq.write_table(table, tmp_path / "x.parquet")
    images = labelled_images(f"{tmp_path}/x.parquet", ["no", "yes"], "w")
    assert images.labels == (1, 0)


def test_texts_as_labels_may_lack_a_class_and_have_no_places(tmp_path, samples, caplog):
    content = [path.read_bytes() for path, _ in samples[:2]]
    pq.write_table(pa.table({"image": content, "label": ["c", "a"]}), tmp_path / "x.parquet")
    reference = f"{tmp_path}/x.parquet"
    assert labelled_images(reference, ["c", "b", "a"], "w").labels == (0, 2)
    assert "1 of 3 classes have no image ('b')" in caplog.text
    with pytest.raises(DataError, match="its labels are texts, which have no places; remove match"):
        labelled_images(f"{reference}?match=index", ["c", "b", "a"], "w")
    with pytest.raises(DataError, match=r"no class name is 'c'; use its names$"):
        labelled_images(reference, ["x", "a"], "w")


@pytest.mark.parametrize("place", ["", "train/"])
def test_a_folder_of_arrow_files_names_the_remedy(tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "data-00000-of-00001.arrow").write_bytes(b"x")
    (tmp_path / place / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"save_to_disk .*to_parquet\(FILE\)"):
        unlabeled_images(str(tmp_path), "w")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.zip"], r"holds archives \(train\.zip\); unpack them, and name the folder"),
        (["images.tar.gz"], r"holds compressed files \(images\.tar\.gz\); unpack them"),
        (["train/0.tar", "test/0.tar"], r"holds tar shards in t\w+; name .*/t\w+$"),
        (["a/1.heic"], r"images of another format \(1\.heic\); convert the images"),
        (["train_32x32.mat"], r"holds arrays .*np\.savez"),
        (["t10k-images-idx3-ubyte.gz"], "torchvision:MNIST:test"),
        (["cifar-10-batches-py/data_batch_1"], "torchvision:CIFAR10:test"),
        (
            ["snapshots/abc/data/x/test.parquet"],
            r"the hub's cache; name .*/snapshots/abc, or write",
        ),
        (["dataset_dict.json", "train/data-00000-of-00001.arrow"], "write each split with split"),
        (["labels.csv"], r"holds records \(labels\.csv\); write the images as a folder"),
        (["notes.txt"], "holds no image|0 class folders"),
    ],
)
def test_a_folder_of_another_form_is_named_with_the_remedy(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for read in (unlabeled_images, lambda text, where: labelled_images(text, CLASSES, where)):
        with pytest.raises(DataError, match=message) as r:
            read(str(tmp_path), "w")
        assert "\n" not in str(r.value)


def test_files_of_other_forms_beside_images_do_not_matter(tmp_path):
    write_image(tmp_path / "a" / "b" / "c" / "d" / "1.png", np.random.default_rng(0))
    for name in ("labels.csv", "train.zip", "x.arrow"):
        (tmp_path / name).write_bytes(b"x")
    assert len(unlabeled_images(str(tmp_path), "w")) == 1
    with pytest.raises(DataError, match=r"train\.zip: is no image folder .*; unpack it, and name"):
        unlabeled_images(str(tmp_path / "train.zip"), "w")


def test_texts_that_are_numbers_have_places(tmp_path, samples):
    content = [path.read_bytes() for path, _ in samples[:3]]
    table = pa.table({"image": content, "label": ["10", "9", "0"]})
    pq.write_table(table, tmp_path / "x.parquet")
    names = [f"c{i}" for i in range(11)]
    assert labelled_images(f"{tmp_path}/x.parquet?match=index", names, "w").labels == (10, 9, 0)


def test_a_boolean_beside_numbers_is_no_label(tmp_path, samples):
    content = [path.read_bytes() for path, _ in samples[:2]]
    table = pa.table({"image": content, "is_crowd": [True, True], "kind": [1, 0]})
    pq.write_table(table, tmp_path / "x.parquet")
    assert labelled_images(f"{tmp_path}/x.parquet", ["a", "b"], "w").labels == (1, 0)


def test_dotted_members_that_are_left_out_are_said(tmp_path, samples, caplog):
    png = samples[0][0].read_bytes()
    mask = ("a.mask.png", png)  # of a sample with an image, which webdataset reads so
    reference = _tar(tmp_path / "x.tar", ("a.png", png), mask)
    assert len(unlabeled_images(reference, "w")) == 1
    assert not caplog.text
    reference = _tar(tmp_path / "y.tar", ("a.png", png), ("b.v2.png", png), ("c.v2.png", png))
    assert len(unlabeled_images(reference, "w")) == 1
    assert "member b.v2.png: a name ends at its first dot" in caplog.text
    assert "2 members are left out" in caplog.text


def test_dots_in_a_members_name_are_said(tmp_path, samples):
    content = samples[0][0].read_bytes()
    reference = _tar(tmp_path / "x.tar", ("img.v1.0001.png", content))
    with pytest.raises(DataError, match=r"img\.v1\.0001\.png.*write no dots before the suffix"):
        unlabeled_images(reference, "w")


def test_hidden_members_of_a_tar_are_no_images(tmp_path, samples):
    content = samples[0][0].read_bytes()
    names = ("./a.png", "__MACOSX/._a.png", ".ipynb_checkpoints/b.png", "x/.c/d.png")
    reference = _tar(tmp_path / "x.tar", *((name, content) for name in names))
    assert len(unlabeled_images(reference, "w")) == 1


def test_hidden_files_of_a_store_are_not_fetched(tmp_path, samples, monkeypatch):
    fs = fsspec.filesystem("memory")
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    png = samples[0][0].read_bytes()
    for name in ("a/1.png", ".git/2.png", "a/.ipynb_checkpoints/3.png", "__MACOSX/a/._1.png"):
        fs.pipe(f"/bucket/set/{name}", png)
    assert len(unlabeled_images("memory://bucket/set", "w")) == 1
    fetched = {path.name for path in (tmp_path / "cache").rglob("*.png")}
    assert fetched == {"1.png"}
    fs.store.clear()
