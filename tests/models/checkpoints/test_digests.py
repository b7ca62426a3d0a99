"""SHA-256 of files: correct, computed once per state of a file, remembered between processes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from raymerge.files.atomic import cache_folder
from raymerge.models.checkpoints import digests
from raymerge.models.checkpoints.digests import hash_ahead, remember, sha256


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    _forget(monkeypatch)
    return tmp_path / "cache" / "sha256.json"


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the module to the state of a new process."""
    monkeypatch.setattr(digests, "_digests", {})


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Record the files that are read."""
    seen: list[Path] = []
    digest = digests._digest

    def counted(path, future):
        seen.append(path)
        digest(path, future)

    monkeypatch.setattr(digests, "_digest", counted)
    return seen


def _expected(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 2_100_000])
def test_sha256_is_the_files_digest(tmp_path, monkeypatch, size):
    monkeypatch.setattr(digests, "_HASH_BYTES", 1 << 20)  # several reads and a part of one
    path = tmp_path / "x"
    path.write_bytes(b"abc" * (size // 3) + b"d" * (size % 3))
    assert sha256(path) == _expected(path)


def test_a_file_is_read_once_until_it_changes(tmp_path, hashed):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    assert sha256(path) == sha256(path) == _expected(path)
    assert hashed == [path]
    path.write_bytes(b"longer")
    assert sha256(path) == _expected(path)
    path.write_bytes(b"LONGER")
    os.utime(path, ns=(1, 1))  # the same size, but another time
    assert sha256(path) == _expected(path)
    assert len(hashed) == 3


def test_digests_are_remembered_between_processes(tmp_path, monkeypatch, cache, hashed):
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(path.name.encode())
        sha256(path)
        remember()
        _forget(monkeypatch)
    assert len(json.loads(cache.read_text())) == 2
    assert [sha256(path) for path in paths] == [_expected(path) for path in paths]
    assert hashed == paths


@pytest.mark.parametrize("content", ["", "[]", "{", '"x"', "\x00"])
def test_a_damaged_cache_is_ignored(tmp_path, monkeypatch, cache, content):
    cache.parent.mkdir()
    cache.write_text(content)
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert sha256(path) == _expected(path)
    remember()
    assert list(json.loads(cache.read_text()).values()) == [_expected(path)]


def test_an_unwritable_cache_is_ignored(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "file"))
    sha256(tmp_path / "file")
    remember()
    assert (tmp_path / "file").read_text() == ""


def test_only_the_newest_digests_are_remembered(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(digests, "_MAX_REMEMBERED", 2)
    for name in "abc":
        (tmp_path / name).write_text(name)
        sha256(tmp_path / name)
    remember()
    kept = list(json.loads(cache.read_text()).values())
    assert kept == [_expected(tmp_path / name) for name in "bc"]


def test_a_file_hashed_ahead_is_hashed_once(tmp_path, hashed):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode())
    hash_ahead([*map(str, paths), str(tmp_path / "nowhere"), "hf-hub:nobody/nothing", "openai"])
    assert [sha256(path) for path in paths] == [_expected(path) for path in paths]
    assert sorted(hashed) == paths


def test_a_file_that_cannot_be_read_raises_for_the_waiting_caller(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"abc")

    def fail(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(PermissionError):
        sha256(path)
    remember()  # an error is not remembered
    assert not (cache_folder() / "sha256.json").exists()
