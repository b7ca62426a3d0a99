"""The one check of a folder that a command is about to write into."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raymerge.errors import UserError
from raymerge.files.output_folder import nearest_folder, require_output

MARKS = ("run.json", "runs")


def _require(folder: Path, **flags: bool) -> bool:
    return require_output(folder, MARKS, writer="a test", flags=flags)


@pytest.mark.parametrize("state", ["absent", "empty", "hidden files"])
def test_an_unused_folder_is_free(tmp_path: Path, state: str) -> None:
    folder = tmp_path / "out"
    if state != "absent":
        folder.mkdir()
    if state == "hidden files":
        (folder / ".run.json.x1.tmp").write_text("")
    for flags in ({}, {"resume": False, "overwrite": False}, {"resume": True}):
        assert not _require(folder, **flags)


@pytest.mark.parametrize("mark", MARKS)
def test_a_folder_of_its_own_needs_a_flag_where_there_are_flags(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).mkdir()
    assert _require(tmp_path)
    assert _require(tmp_path, resume=True, overwrite=False)
    assert _require(tmp_path, overwrite=True)
    with pytest.raises(UserError, match=r"is in use; .* --resume to continue that run$"):
        _require(tmp_path, resume=False)
    with pytest.raises(UserError, match=r"that run or --overwrite to replace it$"):
        _require(tmp_path, resume=False, overwrite=False)


@pytest.mark.parametrize("flags", [{}, {"overwrite": False}, {"overwrite": True}])
def test_no_flag_opens_the_folder_of_another_writer(tmp_path: Path, flags: dict[str, bool]) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"not written by a test \(it has no run\.json\)"):
        _require(tmp_path, **flags)


def test_a_file_and_a_name_that_is_too_long_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^output .*file: is a file; name a folder$"):
        _require(tmp_path / "file", overwrite=True)
    with pytest.raises(UserError, match=r"^zoo .*: File name too long; choose another folder$"):
        require_output(tmp_path / ("x" * 300), MARKS, writer="a test", what="zoo")


def test_nothing_is_written_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is not writable"):
        _require(tmp_path / "file" / "out")


def test_the_nearest_folder_must_be_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write anywhere, so the answer of the system is faked.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} is not writable"):
        _require(tmp_path / "a" / "b")


def test_the_nearest_folder_is_the_one_that_exists(tmp_path: Path) -> None:
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
