"""Files behind URLs: fetched once, gone on with, checked, shared, and told of without secrets."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from raymerge.errors import RemoteError
from raymerge.files import download, remote
from raymerge.files.remote import fetch, fetch_folder, sha256_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own; no waiting between attempts."""
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_WAIT_S", 0.0)
    monkeypatch.setattr(download, "_CHUNK_BYTES", 1000)
    return tmp_path / "cache" / "remote"


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


class Store(MemoryFileSystem):
    """A store that counts what is read of it, breaks off, lies and tells checksums as asked."""

    protocol = "store"
    store: dict[str, Any] = {}  # noqa: RUF012 - one for all instances, as its base class has
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False
    read_bytes = 0
    breaks_at: list[int] = []  # noqa: RUF012
    facts: dict[str, Any] = {}  # noqa: RUF012
    damaged = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return ("/" + path.removeprefix("store://").strip("/")).rstrip("/")

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {**super().info(path, **kwargs), **self.facts}

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode != "rb":
            return super()._open(path, mode, **kwargs)
        return _Reader(bytes(super()._open(path, mode).getvalue()))


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.position = content, 0
        if Store.damaged:
            Store.damaged -= 1
            self.content = content[:-1] + bytes([content[-1] ^ 1])

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def seek(self, position: int) -> None:
        self.position = position

    def read(self, count: int) -> bytes:
        if Store.breaks_at and self.position >= Store.breaks_at[0]:
            Store.breaks_at.pop(0)
            raise ConnectionError("the peer is gone")
        chunk = self.content[self.position : self.position + count]
        self.position += len(chunk)
        Store.read_bytes += len(chunk)
        return chunk


@pytest.fixture
def store() -> type[Store]:
    fsspec.register_implementation("store", Store, clobber=True)
    Store.store, Store.read_bytes, Store.breaks_at, Store.facts = {}, 0, [], {}
    Store.damaged = 0
    return Store


def put(content: bytes, path: str = "/a/model.pt") -> str:
    MemoryFileSystem.pipe_file(Store(), path, content)
    return f"store:/{path}"


CONTENT = bytes(range(256)) * 40  # 10240 bytes: eleven readings
DIGEST = hashlib.sha256(CONTENT).hexdigest()


# --- once ----------------------------------------------------------------------------------------


def test_a_file_has_its_name_and_is_stored_by_its_content(
    memory: MemoryFileSystem, cache: Path
) -> None:
    memory.pipe("/bucket/x/expert.safetensors", CONTENT)
    path = fetch("memory://bucket/x/expert.safetensors")
    assert path.name == "expert.safetensors"
    assert path.read_bytes() == CONTENT
    assert path.resolve() == (cache / "blobs" / DIGEST).resolve()
    assert sha256_of(path) == DIGEST
    assert not list((cache / "partial").iterdir())


def test_the_same_content_is_stored_once(memory: MemoryFileSystem, cache: Path) -> None:
    for name in ("one.pt", "two.pt"):
        memory.pipe(f"/{name}", CONTENT)
        assert fetch(f"memory://{name}").name == name
    assert len(list((cache / "blobs").iterdir())) == 1


def test_an_unchanged_remote_is_not_read_again(store: type[Store]) -> None:
    url = put(CONTENT)
    first = fetch(url)
    assert store.read_bytes == len(CONTENT)
    assert fetch(url) == first
    assert store.read_bytes == len(CONTENT)


def test_a_changed_remote_is_fetched_and_the_old_content_stays(store: type[Store]) -> None:
    url = put(CONTENT)
    first = fetch(url)
    put(CONTENT[::-1])  # of the same size
    second = fetch(url)
    assert second.read_bytes() == CONTENT[::-1]
    assert first.read_bytes() == CONTENT


def test_a_local_file_by_url_is_fetched_again_when_it_changes(tmp_path: Path) -> None:
    source = tmp_path / "there" / "a.pt"
    source.parent.mkdir()
    source.write_bytes(b"old")
    assert fetch(f"file://{source}").read_bytes() == b"old"
    source.write_bytes(b"new")
    os.utime(source, ns=(1, 1))
    assert fetch(f"file://{source}").read_bytes() == b"new"


def test_without_anything_that_tells_a_change_it_is_fetched_every_time(
    store: type[Store],
) -> None:
    store.facts = {"created": None}
    url = put(CONTENT)
    fetch(url)
    fetch(url)
    assert store.read_bytes == 2 * len(CONTENT)


# --- broken off, damaged, changed ----------------------------------------------------------------


def test_a_download_that_breaks_off_goes_on_by_itself(store: type[Store]) -> None:
    url = put(CONTENT)
    store.breaks_at = [3000, 7000]
    assert fetch(url).read_bytes() == CONTENT
    assert store.read_bytes == len(CONTENT)  # not a byte twice


def test_a_download_goes_on_in_the_next_run(store: type[Store], cache: Path) -> None:
    url = put(CONTENT)
    store.breaks_at = [4000] * 4
    with pytest.raises(RemoteError, match=r"store://a/model.pt: cannot be fetched .*run again"):
        fetch(url)
    [partial] = (cache / "partial").iterdir()
    assert partial.stat().st_size == 4000
    assert fetch(url).read_bytes() == CONTENT
    assert store.read_bytes == len(CONTENT)


def test_a_killed_download_goes_on(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "big.pt"
    source.write_bytes(CONTENT)
    code = """
import os, signal, sys
from raymerge.files import download, remote
download._CHUNK_BYTES = 1000
def chunks(file, start, plain=download._chunks):
    for i, chunk in enumerate(plain(file, start)):
        if i == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk
download._chunks = chunks
remote.fetch(sys.argv[1])
"""
    url = f"file://{source}"
    ran = subprocess.run([sys.executable, "-c", code, url], check=False, timeout=60)
    assert ran.returncode == -9
    [partial] = (cache / "partial").iterdir()
    left = partial.stat().st_size
    assert 0 < left <= 6000
    starts: list[int] = []
    plain = download._chunks

    def chunks(file: Any, start: int) -> Iterator[bytes]:
        starts.append(start)
        return plain(file, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "_chunks", chunks)
        assert fetch(url).read_bytes() == CONTENT
    assert starts == [left]


def test_the_part_of_an_earlier_state_is_not_gone_on_with(store: type[Store], cache: Path) -> None:
    url = put(CONTENT)
    store.breaks_at = [4000] * 4
    with pytest.raises(RemoteError):
        fetch(url)
    put(CONTENT[::-1])
    assert fetch(url).read_bytes() == CONTENT[::-1]
    assert not list((cache / "partial").iterdir())


def test_a_truncated_copy_is_detected(store: type[Store], caplog: Any) -> None:
    url = put(CONTENT)
    blob = fetch(url).resolve()
    blob.chmod(0o644)
    blob.write_bytes(CONTENT[:-5])
    assert fetch(url).read_bytes() == CONTENT
    assert "damaged" in caplog.text


def test_a_copy_that_was_only_touched_is_kept(store: type[Store]) -> None:
    url = put(CONTENT)
    blob = fetch(url).resolve()
    os.utime(blob, ns=(1, 1))
    assert fetch(url).resolve() == blob
    assert store.read_bytes == len(CONTENT)


def test_a_wrong_checksum_is_fetched_anew_then_refused(store: type[Store]) -> None:
    url = put(CONTENT)
    store.facts = {"lfs": {"sha256": DIGEST}}
    store.damaged = 1
    assert fetch(url).read_bytes() == CONTENT
    put(CONTENT, "/b.pt")
    store.damaged = 9
    with pytest.raises(RemoteError, match=f"the sha256 of what came is not {DIGEST}"):
        fetch("store://b.pt")


def test_a_tag_that_is_no_md5_does_not_stand_in_the_way(store: type[Store]) -> None:
    """S3 with keys of its own: the tag looks like an MD5 and is none."""
    url = put(CONTENT)
    store.facts = {"Content-MD5": "AAAAAAAAAAAAAAAAAAAAAA=="}
    assert fetch(url).read_bytes() == CONTENT
    assert store.read_bytes == 2 * len(CONTENT)


def test_a_remote_that_changes_under_the_download_is_refused(
    store: type[Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put(CONTENT)
    plain = download._chunks

    def chunks(file: Any, start: int) -> Iterator[bytes]:
        yield from plain(file, start)
        put(CONTENT[::-1])

    monkeypatch.setattr(download, "_chunks", chunks)
    with pytest.raises(RemoteError, match="changed while it was fetched; run again"):
        fetch(url)


def test_no_room(store: type[Store], monkeypatch: pytest.MonkeyPatch) -> None:
    url = put(CONTENT)
    usage = download.shutil.disk_usage(".")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(RemoteError, match=r"has 10,240 bytes, but .* has 10,000 free.*RAYMERGE_"):
        fetch(url)


def test_what_is_here_already_needs_no_room(
    store: type[Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put(CONTENT)
    store.breaks_at = [8000] * 4
    with pytest.raises(RemoteError):
        fetch(url)
    usage = download.shutil.disk_usage(".")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=3000))
    assert fetch(url).read_bytes() == CONTENT


def test_a_full_disk_is_not_left_full(
    store: type[Store], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chunks(file: Any, start: int) -> Iterator[bytes]:
        yield CONTENT[:3000]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_chunks", chunks)
    with pytest.raises(RemoteError, match="no room in the cache folder"):
        fetch(put(CONTENT))
    assert not list((cache / "partial").iterdir())


def test_what_cannot_be_continued_is_removed(store: type[Store], cache: Path) -> None:
    store.facts = {"created": None}  # nothing says whether the next run finds the same content
    store.breaks_at = [4000] * 4
    with pytest.raises(RemoteError):
        fetch(put(CONTENT))
    assert not list((cache / "partial").iterdir())


def test_a_download_that_nobody_continues_is_forgotten(store: type[Store], cache: Path) -> None:
    left = cache / "partial" / "old"
    left.parent.mkdir(parents=True)
    for age_s, stays in ((6 * 86400, True), (8 * 86400, False)):
        left.write_bytes(b"x")
        os.utime(left, (time.time() - age_s,) * 2)
        fetch(put(CONTENT, f"/{age_s}.pt"))
        assert left.exists() == stays


# --- at once -------------------------------------------------------------------------------------


def test_threads_share_one_download(store: type[Store]) -> None:
    url = put(CONTENT)
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(url))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 8
    assert store.read_bytes == len(CONTENT)


def test_processes_share_one_download(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "big.pt"
    source.write_bytes(CONTENT)
    code = """
import sys, time
from raymerge.files import remote
def download(*args, plain=remote.download):
    print("fetched"); time.sleep(0.3); return plain(*args)
remote.download = download
remote.fetch(sys.argv[1])
"""
    argv = [sys.executable, "-c", code, f"file://{source}"]
    running = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outs = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert "".join(outs) == "fetched\n"
    assert (cache / "blobs" / DIGEST).read_bytes() == CONTENT


# --- folders -------------------------------------------------------------------------------------


def put_folder(count: int = 5) -> str:
    for i in range(count):
        put(b"image %d" % i, f"/data/class {i % 2}/{i}.png")
    return "store://data"


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_folder_is_laid_out_as_there_and_read_once(store: type[Store]) -> None:
    url = put_folder()
    folder = fetch_folder(url)
    assert contents(folder) == {f"class {i % 2}/{i}.png": b"image %d" % i for i in range(5)}
    read = store.read_bytes
    assert fetch_folder(url + "/") == folder
    assert store.read_bytes == read


def test_of_a_changed_folder_only_what_changed_is_read(store: type[Store]) -> None:
    url = put_folder()
    before = fetch_folder(url)
    read = store.read_bytes
    put(b"another", "/data/class 0/9.png")
    after = fetch_folder(url)
    assert after != before
    assert set(contents(after)) - set(contents(before)) == {"class 0/9.png"}
    assert store.read_bytes == read + len(b"another")


def test_a_damaged_file_of_a_folder_is_mended(store: type[Store]) -> None:
    url = put_folder()
    folder = fetch_folder(url)
    blob = (folder / "class 0" / "0.png").resolve()
    blob.unlink()
    assert fetch_folder(url) == folder
    assert contents(folder)["class 0/0.png"] == b"image 0"


def test_what_a_name_may_not_do(store: type[Store]) -> None:
    put(b"x", "/data/a/../../../b")
    with pytest.raises(RemoteError, match="leads out of the folder"):
        fetch_folder("store://data")


def test_a_file_is_no_folder_and_a_folder_no_file(store: type[Store]) -> None:
    put_folder()
    with pytest.raises(RemoteError, match=r"store://data: is a folder; name a file in it"):
        fetch("store://data")
    with pytest.raises(RemoteError, match="is a file; name the folder"):
        fetch_folder("store://data/class 0/0.png")
    with pytest.raises(RemoteError, match="no such folder"):
        fetch_folder("store://nothing")


# --- headers -------------------------------------------------------------------------------------


def test_an_outline_has_the_header_and_the_size_and_reads_nothing_else(
    store: type[Store], tmp_path: Path
) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save

    url = put(save({"visual.a": torch.ones(1000, 30)}), "/a/model.safetensors")
    path = remote.outline(url, tmp_path)
    assert store.read_bytes < 200
    assert path.stat().st_size > 120_000
    with safe_open(path, framework="pt") as file:
        assert list(file.get_slice("visual.a").get_shape()) == [1000, 30]


def test_a_file_of_another_kind_has_no_outline(store: type[Store], tmp_path: Path) -> None:
    assert remote.outline(put(CONTENT), tmp_path).read_bytes() == CONTENT


# --- errors --------------------------------------------------------------------------------------


def test_what_is_not_there(memory: MemoryFileSystem) -> None:
    with pytest.raises(RemoteError, match=r"^memory://a/b.pt: no such file or folder$"):
        fetch("memory://a/b.pt")


def test_an_unknown_scheme() -> None:
    with pytest.raises(RemoteError, match=r"^nonsense://a: nonsense:// is no known scheme; use hf"):
        fetch("nonsense://a")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(
        RemoteError, match=r"^s3://b/x: s3:// needs .* pip install 'raymerge\[s3\]'"
    ):
        fetch("s3://b/x")


def test_no_access(store: type[Store], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError("Forbidden")

    monkeypatch.setattr(Store, "info", refuse)
    with pytest.raises(RemoteError, match=r"^store://a/b: no access; check the credentials"):
        fetch("store://a/b")


def test_no_message_or_log_holds_a_credential(
    monkeypatch: pytest.MonkeyPatch, caplog: Any, store: type[Store], cache: Path
) -> None:
    url = "store://me:hunter2@host/x.pt?X-Amz-Signature=abcdef&token=s3cr3t"

    def fail(self: Any, path: str, **kwargs: Any) -> Any:
        raise OSError(f"GET {url} and {path} (hunter2) failed: X-Amz-Signature=abcdef&token=s3cr3t")

    monkeypatch.setattr(Store, "_open", fail)
    monkeypatch.setattr(Store, "info", lambda self, path: {"size": 5, "type": "file", "mtime": 1})
    caplog.set_level("DEBUG", logger="raymerge")
    with pytest.raises(RemoteError) as caught:
        fetch(url)
    told = str(caught.value) + caplog.text + "".join(p.name for p in cache.rglob("*"))
    assert "store://host/x.pt" in told
    for secret in ("hunter2", "abcdef", "s3cr3t"):
        assert secret not in told
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_the_index_holds_no_credential_and_a_new_signature_is_the_same_file(
    store: type[Store], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(CONTENT)
    plain = Store._strip_protocol
    here = classmethod(lambda cls, path: "/a/model.pt" if "@" in path else plain(path))
    monkeypatch.setattr(Store, "_strip_protocol", here)
    for signature in ("one", "two"):
        fetch(f"store://me:hunter2@host/model.pt?X-Amz-Signature={signature}&X-Amz-Expires=60")
    assert store.read_bytes == len(CONTENT)
    [entry] = (cache / "index").iterdir()
    assert '"store://host/model.pt"' in entry.read_text()
    for secret in ("hunter2", "one", "two"):
        assert secret not in entry.read_text()


def test_an_ordinary_file_has_no_digest_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    assert sha256_of(tmp_path / "x") is None
    assert LocalFileSystem  # the file:// tests above run through it


def test_a_server_that_does_not_stop_sending_is_cut_off(
    store: type[Store], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    put(CONTENT)
    monkeypatch.setattr(
        Store, "info", lambda self, path: {"size": 3000, "type": "file", "mtime": 1}
    )
    monkeypatch.setattr(_Reader, "read", lambda self, count: b"x" * count)
    with pytest.raises(RemoteError, match="came instead of 3,000"):
        fetch("store://a/model.pt")
    assert not list((cache / "blobs").glob("*"))
