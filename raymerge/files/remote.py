"""Files behind URLs, fetched into the cache folder: complete, verified, only when they changed.

    remote/blobs/SHA256            the content, read-only
    remote/folders/KEY/…           links to contents, laid out as in the store; KEY.json lists them
    remote/index/KEY.json          the last known state of a URL, and its content
    remote/partial/KEY-IDENTITY    an incomplete download that the next one continues

Each machine fetches for itself, and its processes take turns: the second finds the file there.
stores.py knows what a store says of a file, download.py how its content is received.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from raymerge.files.atomic import cache_folder, sync
from raymerge.files.download import download, update_hashes
from raymerge.files.progress import Progress, progress_bar
from raymerge.files.remote_errors import one_line_errors
from raymerge.files.stores import ChooseNames, RemoteFile, find_file, find_files, key_of, open_store
from raymerge.files.urls import redact_url

logger = logging.getLogger(__name__)

_HEADER_BYTES = 100 << 20  # the limit of safetensors
_FILES_AT_ONCE = 8
_LOCK_NAMES = 3  # hex digits: downloads of different files rarely share one of 4096 locks


def fetch(url: str) -> Path:
    """Return the file behind a URL, in the cache, under its own name.

    An unchanged remote is not fetched again. Raises :class:`RemoteError` in one line.
    """
    with one_line_errors(url):
        file = find_file(url)
        return _fetch_all(url, {file.name: file}) / file.name


def fetch_folder(
    url: str,
    choose: ChooseNames | None = None,
    is_skipped: Callable[[str], bool] = lambda name: False,
) -> Path:
    """Return a folder in the cache with the files below a URL, laid out as there.

    ``choose`` picks among the names directly in it; default: all, at any depth. ``is_skipped``
    tells by its relative name that a file is not wanted.
    """
    with one_line_errors(url):
        return _fetch_all(url, find_files(url, choose, is_skipped))


def list_folder(url: str, choose: ChooseNames) -> list[str]:
    """Return the names that ``choose`` picks among those directly in a folder."""
    with one_line_errors(url):
        return list(find_files(url, choose))


def is_folder(url: str) -> bool:
    """Return whether a URL names a folder; raises :class:`RemoteError` where nothing is."""
    with one_line_errors(url):
        fs, path = open_store(url)
        return bool(fs.info(path)["type"] == "directory")


def outline(url: str, folder: Path) -> Path:
    """Return a stand-in for a safetensors file: its header and its size, with zeros as data.

    Reads the header alone; a file of another kind is fetched.
    """
    with one_line_errors(url):
        file = find_file(url)
        start = _read(file, 0, 8)
        length = int.from_bytes(start, "little")
        fits = file.size is not None and 8 + length <= file.size and length <= _HEADER_BYTES
        header = _read(file, 8, length) if len(start) == 8 and fits else b""
        if header[:1] != b"{":
            return fetch(url)
        path = folder / file.name
        with path.open("wb") as out:
            out.write(start + header)
            out.truncate(file.size)
        return path


def _read(file: RemoteFile, start: int, length: int) -> bytes:
    with file.fs.open(file.path, "rb", block_size=max(1, length), cache_type="none") as stream:
        stream.seek(start)
        return bytes(stream.read(length))[:length]


def sha256_of(path: Path) -> str | None:
    """Return the SHA-256 of a fetched file, which is its name in the cache; else None."""
    real = path.resolve()
    return real.name if real.parent == _blobs().resolve() else None


# --- folders of the cache ------------------------------------------------------------------------


def _root() -> Path:
    return cache_folder() / "remote"


def _blobs() -> Path:
    return _root() / "blobs"


def _fetch_all(url: str, files: Mapping[str, RemoteFile]) -> Path:
    """Return a folder with a link to the content of each file, by its relative name."""
    # One record per folder: of ten thousand unchanged images, none is looked up by itself.
    key = _hash([key_of(url), [[name, f.size, f.identity] for name, f in sorted(files.items())]])
    folder = _root() / "folders" / key
    is_identified = all(file.identity is not None for file in files.values())
    if is_identified and _is_complete(folder):
        return folder
    with _locked(f"folder-{key[:_LOCK_NAMES]}"):
        if is_identified and _is_complete(folder):
            return folder
        digests = _download_all(url, files)
        if not is_identified:  # only the contents tell one state of the folder from another
            folder = folder.with_name(_hash(digests))
        _lay_out(folder, digests)
    return folder


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _is_complete(folder: Path) -> bool:
    """Return whether all contents of a folder are in the cache as they were stored."""
    contents = _read_json(folder.with_name(f"{folder.name}.json"))
    try:
        return bool(contents) and all(
            _stamp(_blobs() / digest) == stamp for digest, *stamp in contents.values()
        )
    except OSError:
        return False


def _download_all(url: str, files: Mapping[str, RemoteFile]) -> dict[str, str]:
    """Return the digest of each file by its relative name; several are fetched at a time."""
    total = sum(file.size or 0 for file in files.values())
    title = f"fetching {PurePosixPath(urlsplit(redact_url(url)).path).name or redact_url(url)}"
    with progress_bar(title, unit="B", total=total) as advance:
        pool = ThreadPoolExecutor(_FILES_AT_ONCE)
        try:
            digests = list(pool.map(lambda file: _content(file, advance), files.values()))
        finally:
            pool.shutdown(cancel_futures=True)
    return dict(zip(files, digests, strict=True))


def _lay_out(folder: Path, digests: Mapping[str, str]) -> None:
    """Link the contents; the folder appears by one rename, and may be moved with the cache."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
        try:
            for name, digest in digests.items():
                link = temporary / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(os.path.relpath(_blobs() / digest, (folder / name).parent))
            temporary.chmod(0o755)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    contents = {name: [digest, *_stamp(_blobs() / digest)] for name, digest in digests.items()}
    _write_json(folder.with_name(f"{folder.name}.json"), contents)


# --- contents of the cache -----------------------------------------------------------------------


def _content(file: RemoteFile, advance: Progress) -> str:
    """Return the SHA-256 of a file's content, which is in the cache then."""
    digest = _known_digest(file)
    if digest is None:
        with _locked(f"file-{file.key[:_LOCK_NAMES]}"):
            digest = _known_digest(file)  # another process may have fetched it meanwhile
            if digest is None:
                return _store(file, *download(file, _root() / "partial", advance))
    advance(file.size or 0)
    return digest


def _store(file: RemoteFile, copy: Path, digest: str) -> str:
    blob = _blobs() / digest
    blob.parent.mkdir(parents=True, exist_ok=True)
    copy.chmod(0o444)
    copy.replace(blob)
    sync(blob.parent)
    _remember(file, digest)
    return digest


def _known_digest(file: RemoteFile) -> str | None:
    """Return the digest of an earlier download if the remote is unchanged and the copy intact.

    A copy is taken as intact when its size and time are as recorded; otherwise it is hashed.
    """
    entry = _read_json(_root() / "index" / f"{file.key}.json")
    digest = entry.get("sha256")
    if file.identity is None or entry.get("identity") != file.identity or not digest:
        return None
    blob = _blobs() / digest
    try:
        if _stamp(blob) == entry.get("stamp"):
            return str(digest)
        sha256 = hashlib.sha256()
        update_hashes(blob, [sha256])
    except OSError:
        return None
    if sha256.hexdigest() == digest:
        _remember(file, digest)
        return str(digest)
    logger.warning("%s: the copy in the cache is damaged; fetching it again", redact_url(file.url))
    blob.unlink(missing_ok=True)
    return None


def _remember(file: RemoteFile, digest: str) -> None:
    entry = {
        "url": redact_url(file.url),
        "size": file.size,
        "identity": file.identity,
        "sha256": digest,
        "stamp": _stamp(_blobs() / digest),
    }
    _write_json(_root() / "index" / f"{file.key}.json", entry)


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Hold a lock in one thread of one process; the system frees it when that process ends."""
    path = _root() / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("waiting for a file that another process fetches")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: Any) -> None:
    """Write at once but not durably: an entry lost in a power cut costs one more hashing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(value, file)
    Path(name).replace(path)
