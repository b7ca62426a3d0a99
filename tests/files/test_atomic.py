"""A written file is the old one or the new one, whatever happens in between."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from raymerge.errors import RunError
from raymerge.files.atomic import (
    cache_folder,
    exists,
    stage_file,
    write_atomically,
    write_json,
    write_text,
)


def test_the_new_content_replaces_the_old(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old, and longer")
    write_text(path, "nëw")
    assert path.read_bytes() == "nëw".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("in the middle"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_seen_under_the_name_before_the_writer_is_done(tmp_path):
    path = tmp_path / "x.txt"

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename across file systems is a copy

    write_atomically(path, write)
    assert path.read_text() == "new"


def test_a_full_disk_is_a_run_error_that_names_the_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"x\.txt: cannot be written: No space left on device"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_rename_that_fails_leaves_no_temporary_file(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    with pytest.raises(RunError, match="x: cannot be written"):
        write_text(tmp_path / "x", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_are_as_readable_as_the_umask_allows(tmp_path, umask, mode):
    """Temporary files are private; results are not meant to be."""
    before = os.umask(umask)
    try:
        write_text(tmp_path / "x", "y")
    finally:
        assert os.umask(before) == umask  # and the mask itself is left as it was
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode


def test_json_that_no_reader_takes_is_not_written(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


# --- staged: the file before its folder --------------------------------------------------------


def test_a_staged_file_appears_where_it_belongs_only_when_committed(tmp_path):
    path = tmp_path / "out" / "x"
    with stage_file(path, tmp_path) as (temporary, commit):
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert not path.parent.exists()
        path.parent.mkdir()
        commit()
        assert path.read_text() == "new"
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]


@pytest.mark.parametrize("error", [None, ValueError("x"), KeyboardInterrupt()])
def test_without_a_commit_nothing_is_left(tmp_path, error):
    path = tmp_path / "x"
    path.write_text("old")
    with (
        contextlib.suppress(ValueError, KeyboardInterrupt),
        stage_file(path, tmp_path) as (temporary, _),
    ):
        temporary.write_text("new")
        if error is not None:
            raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_staged_in_is_a_run_error(tmp_path):
    with (
        pytest.raises(RunError, match="x: cannot be written: No such file"),
        stage_file(tmp_path / "x", tmp_path / "gone"),
    ):
        raise AssertionError("not entered")


def test_the_cache_folder_is_the_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("RAYMERGE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "raymerge"


def test_half_a_character_is_written_as_its_number(tmp_path):
    write_text(tmp_path / "x", "a\ud800b")
    assert (tmp_path / "x").read_text() == "a\\ud800b"


def test_a_name_that_no_file_can_have_does_not_exist(tmp_path):
    assert exists(tmp_path)
    assert not exists(tmp_path / "x")
    assert not exists(tmp_path / ("x" * 5000))
    assert not exists(tmp_path / "a\0b")
