"""Image folders: sorted, complete, labelled by class order, and errors that name the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raymerge.config.suites.specs import DATA_SETS, load_data_set
from raymerge.data.folder import labelled_images, match_names, unlabeled_images
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


@pytest.mark.parametrize("is_there", [True, False])
def test_a_class_without_images_is_scored_and_said(tmp_path, caplog, is_there):
    _touch(tmp_path, "a/1.png", "c/2.png")
    if is_there:
        (tmp_path / "b").mkdir()
    assert len(unlabeled_images(str(tmp_path), "w")) == 2
    assert ("w: 1 folders hold no image ('b')" in caplog.text) == is_there
    assert labelled_images(str(tmp_path), ["a", "b", "c"], "w").labels == (0, 2)
    assert "w: 1 of 3 classes have no image ('b')" in caplog.text


def test_a_folder_without_any_image_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="no class folder holds an image; sort"):
        labelled_images(str(tmp_path), ["a", "b"], "w")


HIDDEN = (
    "@eaDir/a/SYNOPHOTO_THUMB_M.png",
    "a/@eaDir/1.png",
    "$RECYCLE.BIN/1.png",
    "lost+found/1.png",
    ".ipynb_checkpoints/1-checkpoint.png",
    "a/.ipynb_checkpoints/1-checkpoint.png",
    "__MACOSX/a/._1.png",
    "a/._1.png",
    "a/.thumbs/x/1.png",
)


def test_hidden_files_and_folders_are_no_images_anywhere(tmp_path):
    _touch(tmp_path, "a/1.png", "b/2.png", *HIDDEN)
    assert len(unlabeled_images(str(tmp_path), "w")) == 2
    assert labelled_images(str(tmp_path), ["a", "b"], "w").labels == (0, 1)


def test_a_data_sets_own_folder_names_are_known(tmp_path):
    card = load_data_set("eurosat")
    _touch(tmp_path, *(f"{label}/1.png" for label in card.labels))
    images = labelled_images(str(tmp_path), card.classnames, "w")
    of_class = {
        path.parent.name: label for path, label in zip(images.items, images.labels, strict=True)
    }
    assert of_class["AnnualCrop"] == card.classnames.index("annual crop land")
    assert sorted(of_class.values()) == list(range(10))


def test_numbered_folders_are_the_classes_by_place(tmp_path):
    names = load_data_set("gtsrb").classnames
    _touch(tmp_path, *(f"{place:05d}/1.png" for place in range(0, 43, 2)))
    images = labelled_images(str(tmp_path), names, "w")
    assert images.labels == tuple(range(0, 43, 2))
    _touch(tmp_path / "digits", "7/1.png", "3/1.png")  # by name, where names are digits
    digits = [str(d) for d in (9, 8, 7, 6, 5, 4, 3)]
    assert labelled_images(str(tmp_path / "digits"), digits, "w").labels == (2, 6)
    _touch(tmp_path / "far", "44/1.png")
    with pytest.raises(DataError, match="no class for folder '44'"):
        labelled_images(str(tmp_path / "far"), names, "w")


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


def test_many_missing_classes_are_counted_not_listed(tmp_path, caplog):
    _touch(tmp_path, "c0/1.png")
    assert len(labelled_images(str(tmp_path), [f"c{i}" for i in range(100)], "w")) == 1
    assert "99 of 100 classes have no image ('c1', 'c2', 'c3' and 96 more)" in caplog.text


def test_a_class_listed_twice_is_ambiguous(tmp_path):
    _touch(tmp_path, "a/1.png")
    with pytest.raises(DataError, match="'a' is there twice"):
        labelled_images(str(tmp_path), ["a", "a"], "w")


def test_many_names_are_matched_in_linear_time(tmp_path):
    names = [f"class {i}" for i in range(60_000)]
    places = match_names([name.replace(" ", "_") for name in names], names, "w", "class")
    assert places == list(range(60_000))


def test_a_cards_labels_are_known_in_any_order_of_its_classes():
    card = load_data_set("eurosat")
    for classnames in (card.classnames, card.classnames[::-1]):
        places = match_names(card.labels, classnames, "w", "folder")
        assert [classnames[place] for place in places] == list(card.classnames)


@pytest.mark.parametrize("name", DATA_SETS)
def test_no_label_of_a_card_is_the_name_of_another_class(name):
    card = load_data_set(name)
    places = match_names(card.labels or card.classnames, card.classnames, "w", "folder")
    assert places == list(range(card.classes))


def test_numbers_from_1_are_places_if_all_are_there(tmp_path, caplog):
    _touch(tmp_path, *(f"{number}/1.png" for number in (1, 2, 3)))
    listed = labelled_images(str(tmp_path), ["x", "y", "z"], "w")
    assert listed.labels == (0, 1, 2)
    assert [path.parent.name for path in listed.items] == ["1", "2", "3"]
    assert "taken as places in classnames" in caplog.text
    with pytest.raises(DataError, match="no class for folder"):
        labelled_images(str(tmp_path), ["x", "y"], "w")


def test_links_to_folders_are_followed_alike_and_end(tmp_path):
    """Class folders are often links; a link back to the top would never end."""
    _touch(tmp_path / "store", "1.png", "more/2.png")
    _touch(tmp_path / "set", "b/3.png")
    (tmp_path / "set" / "a").symlink_to(tmp_path / "store")
    (tmp_path / "set" / "b" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "store" / "again").symlink_to(tmp_path / "set" / "b")
    names = ["a/1.png", "a/more/2.png", "b/3.png"]
    assert _names(tmp_path / "set", unlabeled_images(str(tmp_path / "set"), "w")) == names
    listed = labelled_images(str(tmp_path / "set"), ["a", "b"], "w")
    assert _names(tmp_path / "set", listed) == names


def test_images_beside_the_class_folders_are_said(tmp_path, caplog):
    _touch(tmp_path, "a/1.png", "b/2.png", "3.png", "notes.txt")
    assert len(labelled_images(str(tmp_path), ["a", "b"], "w")) == 2
    assert f"1 images lie in {tmp_path} itself" in caplog.text


def test_class_folders_one_level_down_are_named(tmp_path):
    _touch(tmp_path, "test/a/1.png", "test/b/1.png", "train/a/1.png")
    with pytest.raises(DataError, match=rf"the class folders lie in {tmp_path}/t\w+: name that"):
        labelled_images(str(tmp_path), ["a", "b"], "w")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    _touch(tmp_path, "a/1.png", "b/1.png")
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=rf"{tmp_path}/b: cannot be read \(Permission denied\)"):
        unlabeled_images(str(tmp_path), "w")
