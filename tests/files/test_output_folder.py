"""The one check of a folder that a command is about to write into."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raymerge.errors import RunError, UserError
from raymerge.files.output_folder import PREVIOUS, OutputFolder, nearest_folder, require_output

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


# --- one writer, and the result that it replaces -------------------------------------------------


def _output(path: Path, *, overwrite: bool = False) -> OutputFolder:
    folder = OutputFolder(path, ["run.json"], "results.json", writer="a test")
    folder.check({"overwrite": overwrite})
    return folder


def _write(path: Path, text: str, names: tuple[str, ...] = ("weights", "hf/weights")) -> list[Path]:
    """Write a result's files, ``results.json`` last, and return all but the mark."""
    files = [path / name for name in (*names, "results.json")]
    for file in [path / "run.json", *files]:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return files


def _read(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): file.read_text()
        for file in path.rglob("*")
        if file.is_file() and file.parent.name != ".attempts"
    }


def test_a_whole_result_is_kept_until_the_new_one_is_finished(tmp_path: Path) -> None:
    files, old = _write(tmp_path, "old"), _read(tmp_path)
    first = _output(tmp_path, overwrite=True)
    first.claim(files)
    assert _read(tmp_path / PREVIOUS) == old
    assert _read(tmp_path).keys() - {f"{PREVIOUS}/{name}" for name in old} == {"run.json"}
    # The first is killed in the middle, and so is a second one; what they wrote is removed.
    (tmp_path / "weights").write_text("half")
    _output(tmp_path, overwrite=True).claim([tmp_path / "weights"])
    assert _read(tmp_path / PREVIOUS) == old
    third = _output(tmp_path, overwrite=True)
    third.claim()
    _write(tmp_path, "new")
    third.finish()
    assert set(_read(tmp_path).values()) == {"new"}
    assert not (tmp_path / PREVIOUS).exists()


@pytest.mark.parametrize("moves", range(4))
def test_a_move_that_was_killed_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    files, old = _write(tmp_path, "old"), _read(tmp_path)
    left, move = [moves], Path.replace

    def replace(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        if moves < len(files):
            with pytest.raises(KeyboardInterrupt):
                _output(tmp_path, overwrite=True).claim(files)
    _output(tmp_path, overwrite=True).claim([file for file in files if file.exists()])
    assert _read(tmp_path / PREVIOUS) == old


def test_a_result_that_another_driver_has_written_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    late = _output(tmp_path)
    early = _output(tmp_path)
    early.claim()
    files = _write(tmp_path, "early")
    early.finish()
    with pytest.raises(UserError, match="is in use"):
        late.claim(files)
    assert set(_read(tmp_path).values()) == {"early"}


def test_the_older_of_two_drivers_may_write_no_more(tmp_path: Path) -> None:
    older, newer = _output(tmp_path, overwrite=True), _output(tmp_path, overwrite=True)
    older.claim()
    older.require_own()
    newer.claim()
    newer.require_own()
    with pytest.raises(RunError, match="another run has taken it over"):
        older.require_own()
