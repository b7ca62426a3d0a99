"""Image folders: sorted, complete, labelled by class order, and errors that name the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymerge.data.folder import labelled_images, unlabeled_images
from raymerge.errors import DataError


def _touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def _names(root: Path, listed) -> list[str]:
    return [path.relative_to(root).as_posix() for path in listed.items]


def test_unlabeled_images_are_all_images_below_in_sorted_order(tmp_path):
    _touch(tmp_path, "b/2.png", "b/1.JPG", "a.webp", "c/d/e.tiff")
    listed = unlabeled_images(str(tmp_path), "tasks[0].adapt")
    assert _names(tmp_path, listed) == ["a.webp", "b/1.JPG", "b/2.png", "c/d/e.tiff"]
    assert listed.labels == (-1,) * 4
    assert len(listed) == 4


def test_other_files_and_hidden_files_are_no_images(tmp_path):
    _touch(tmp_path, "1.png", "README.md", "labels.csv", "._1.png", ".2.jpg", "png")
    (tmp_path / "folder.png").mkdir()
    _touch(tmp_path, "folder.png/3.png")
    assert _names(tmp_path, unlabeled_images(str(tmp_path), "w")) == ["1.png", "folder.png/3.png"]


@pytest.mark.parametrize("classnames", [["cat", "dog", "ape"], ["ape", "cat", "dog"]])
def test_labels_follow_the_order_of_the_class_names(tmp_path, classnames):
    _touch(tmp_path, "dog/1.png", "cat/2.png", "cat/1.png", "ape/x/9.png")
    listed = labelled_images(str(tmp_path), classnames, "w")
    labelled = [
        (classnames[label], path.relative_to(tmp_path).as_posix())
        for path, label in zip(listed.items, listed.labels, strict=True)
    ]
    expected = {"ape": ["ape/x/9.png"], "cat": ["cat/1.png", "cat/2.png"], "dog": ["dog/1.png"]}
    assert labelled == [(name, path) for name in classnames for path in expected[name]]


def test_folders_match_names_by_their_letters_and_digits(tmp_path):
    _touch(tmp_path, "sea_or_lake/1.png", "Annual-Crop/1.png", "river/1.png")
    listed = labelled_images(str(tmp_path), ["annual crop", "River", "Sea or Lake"], "w")
    assert [path.parent.name for path in listed.items] == ["Annual-Crop", "river", "sea_or_lake"]
    assert listed.labels == (0, 1, 2)


def test_an_exact_name_wins_over_a_similar_one(tmp_path):
    _touch(tmp_path, "a b/1.png", "a_b/2.png")
    listed = labelled_images(str(tmp_path), ["a_b", "a b"], "w")
    assert _names(tmp_path, listed) == ["a_b/2.png", "a b/1.png"]


def test_hidden_folders_are_ignored(tmp_path):
    _touch(tmp_path, "x/1.png", "y/1.png", ".ipynb_checkpoints/1.png")
    assert labelled_images(str(tmp_path), ["x", "y"], "w").labels == (0, 1)


@pytest.mark.parametrize("read", [unlabeled_images, lambda f, w: labelled_images(f, ["a", "b"], w)])
def test_a_missing_folder_is_named_with_its_key(tmp_path, read):
    with pytest.raises(DataError, match=r"tasks\[2\]\.adapt: .*nowhere: no such folder"):
        read(str(tmp_path / "nowhere"), "tasks[2].adapt")


def test_a_folder_without_images_says_which_suffixes_count(tmp_path):
    _touch(tmp_path, "notes.txt")
    with pytest.raises(DataError, match=r"holds no image \(.*\.jpeg.*\.png"):
        unlabeled_images(str(tmp_path), "w")


def test_an_empty_class_folder_is_named_even_when_unlabeled(tmp_path):
    _touch(tmp_path, "a/1.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="b: this folder holds no image"):
        unlabeled_images(str(tmp_path), "w")
    with pytest.raises(DataError, match="b: this class folder holds no image"):
        labelled_images(str(tmp_path), ["a", "b"], "w")


def test_missing_and_unexpected_class_folders_are_named_with_the_counts(tmp_path):
    _touch(tmp_path, "a/1.png", "zebra/1.png")
    with pytest.raises(DataError) as raised:
        labelled_images(str(tmp_path), ["a", "b", "c"], "tasks[1].test")
    message = str(raised.value)
    assert "tasks[1].test" in message
    assert "2 class folders for 3 class names" in message
    assert "no folder for 'b', 'c'" in message
    assert "no class for folder 'zebra'" in message
    assert "\n" not in message


def test_many_missing_classes_are_counted_not_listed(tmp_path):
    _touch(tmp_path, "c0/1.png")
    with pytest.raises(DataError, match="'c1', 'c2', 'c3' and 96 more"):
        labelled_images(str(tmp_path), [f"c{i}" for i in range(100)], "w")


def test_a_class_listed_twice_is_ambiguous(tmp_path):
    _touch(tmp_path, "a/1.png")
    with pytest.raises(DataError, match="'a' is listed twice"):
        labelled_images(str(tmp_path), ["a", "a"], "w")
