"""Files behind URLs, brought into the cache folder: whole, checked, and only when they changed.

    remote/blobs/SHA256            the content, read-only
    remote/named/SHA256/NAME       → the content, under its name there
    remote/folders/KEY/…           → contents, laid out as there; KEY.json says which
    remote/index/KEY.json          what a URL last was, and which content that is
    remote/partial/KEY-IDENTITY    a download that the next one goes on with

Any scheme of fsspec will do. Each machine fetches for itself, and its processes take turns: the
second finds the file there. Credentials come from where the store's own tools look for them.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, urlsplit

from raymerge.errors import RaymergeError, RemoteError
from raymerge.files.atomic import cache_folder, sync
from raymerge.files.progress import Progress, progress_bar
from raymerge.files.remote_errors import http_status, short, told
from raymerge.files.urls import public

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 8 << 20
_HEADER_BYTES = 100 << 20  # what safetensors allows
_FILES_AT_ONCE = 8
_ATTEMPTS = 4
_WAIT_S = 1.0
_LOCK_NAMES = 3  # hex digits: that many downloads wait for each other only by chance

_CONTENT_FACTS = ("blob_id", "ETag", "etag", "md5Hash", "Content-MD5")
_TIME_FACTS = ("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created")
_SIGNING = re.compile(
    r"x-(amz|goog|ms)-.*|awsaccesskeyid|googleaccessid|key-pair-id|policy|expires|sig|signature"
    r"|token|access_token|s[eprtv]|spr|sk[a-z]+",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Source:
    """A remote file as its store describes it. ``url`` may hold credentials: it is never shown.

    ``identity`` changes with the content; None where the store says nothing but a size.
    ``sums``: algorithm → hex digest.
    """

    url: str
    fs: Any
    path: str
    size: int | None
    identity: str | None
    sums: Mapping[str, str]

    @property
    def name(self) -> str:
        return _plain_name(PurePosixPath(urlsplit(self.path).path).name)

    @property
    def key(self) -> str:
        return _key(self.url)


def fetch(url: str) -> Path:
    """The file behind a URL, in the cache, under its own name.

    An unchanged remote is not fetched again. Raises :class:`RemoteError` in one line.
    """
    with told(url):
        source = _source(url)
        return _named(_fetched(source), source.name)


def fetch_folder(url: str, only: Callable[[Sequence[str]], Sequence[str]] | None = None) -> Path:
    """The files below a URL, in the cache, laid out as there. ``only`` chooses among the names
    directly in it; default: all, at any depth."""
    with told(url):
        sources = _listed(url, only)
        return _folder(url, sources)


def list_folder(url: str, only: Callable[[Sequence[str]], Sequence[str]]) -> list[str]:
    """The names that ``only`` chooses of those directly in a folder."""
    with told(url):
        return list(_listed(url, only))


def is_folder(url: str) -> bool:
    """Raises :class:`RemoteError` where there is neither a file nor a folder."""
    with told(url):
        fs, path = _opened(url)
        return bool(fs.info(path)["type"] == "directory")


def outline(url: str, folder: Path) -> Path:
    """A stand-in for a safetensors file: its header, and as many bytes as it has, all of them 0.

    Reads the header alone; a file of another kind is fetched.
    """
    with told(url):
        source = _source(url)
        head = _read(source, 0, 8)
        length = int.from_bytes(head, "little")
        known = source.size is not None and 8 + length <= source.size
        if not (len(head) == 8 and known and length <= _HEADER_BYTES):
            return _named(_fetched(source), source.name)
        header = _read(source, 8, length)
        if header[:1] != b"{":
            return _named(_fetched(source), source.name)
        path = folder / source.name
        with path.open("wb") as file:
            file.write(head + header)
            file.truncate(source.size)
        return path


def sha256_of(path: Path) -> str | None:
    """The SHA-256 of a fetched file, which its name in the cache says; None for other files."""
    real = path.resolve()
    return real.name if real.parent == _blobs().resolve() else None


# --- what is there -------------------------------------------------------------------------------


def _opened(url: str) -> tuple[Any, str]:
    """The file system and the path in it; nothing that it remembers of earlier is used."""
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(url)
    fs.invalidate_cache()
    return fs, str(path)


def _source(url: str) -> _Source:
    fs, path = _opened(url)
    info = fs.info(path)
    if info["type"] == "directory":
        raise RemoteError(f"{public(url)}: is a folder; name a file in it")
    return _described(url, fs, path, info)


def _described(url: str, fs: Any, path: str, info: Mapping[str, Any]) -> _Source:
    size = None if info.get("size") is None else int(info["size"])
    return _Source(url, fs, path, size, _identity(info, size), _sums(fs, info))


def _identity(info: Mapping[str, Any], size: int | None) -> str | None:
    lfs = info.get("lfs")
    content = lfs.get("sha256") if lfs else None
    for name in _CONTENT_FACTS:
        content = content or info.get(name)
    facts = [content] if content else [info.get(name) for name in (*_TIME_FACTS, "ino")]
    if not any(facts):
        return None
    texts = [fact.isoformat() if isinstance(fact, datetime) else str(fact) for fact in facts]
    return hashlib.sha256(json.dumps([size, *texts]).encode()).hexdigest()


def _sums(fs: Any, info: Mapping[str, Any]) -> dict[str, str]:
    """The checksums that the store tells of the whole content."""
    if info.get("lfs"):
        return {"sha256": str(info["lfs"]["sha256"])}
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    etag = str(info.get("ETag", "")).strip('"')
    if "s3" in protocols and re.fullmatch("[0-9a-f]{32}", etag):  # one with a dash: many parts
        return {"md5": etag}
    encoded = info.get("md5Hash") or info.get("Content-MD5")
    with suppress(ValueError):
        if encoded:
            return {"md5": base64.b64decode(str(encoded), validate=True).hex()}
    return {}


def _listed(url: str, only: Callable[[Sequence[str]], Sequence[str]] | None) -> dict[str, _Source]:
    """Relative name → file."""
    fs, root = _opened(url)
    depth = {} if only is None else {"maxdepth": 1}
    found = fs.find(root, detail=True, **depth)
    if hasattr(fs, "resolve_path"):  # of Hugging Face: as its listing spells a revision
        root = fs.resolve_path(root).unresolve()
    base = str(fs._strip_protocol(root)).rstrip("/")
    if set(found) == {base}:
        raise RemoteError(f"{public(url)}: is a file; name the folder that it lies in")
    files = {}
    for path, info in found.items():
        name = str(path).removeprefix(base).lstrip("/")
        if info["type"] != "directory" and name and not name.endswith("/"):
            if ".." in PurePosixPath(name).parts:
                raise RemoteError(f"{public(url)}: {name}: leads out of the folder; rename it")
            files[name] = (str(path), info)
    if not files:
        raise RemoteError(f"{public(url)}: no such folder, or it is empty")
    names = sorted(files) if only is None else only(sorted(files))
    under = url.rstrip("/") + "/"
    return {name: _described(under + name, fs, *files[name]) for name in names}


# --- what is in the cache ------------------------------------------------------------------------


def _root() -> Path:
    return cache_folder() / "remote"


def _blobs() -> Path:
    return _root() / "blobs"


def _key(url: str) -> str:
    """Of a URL without its login and signature: signed anew, it is the same file."""
    parts = urlsplit(url)
    query = [pair for pair in parse_qsl(parts.query) if not _SIGNING.fullmatch(pair[0])]
    plain = urlsplit(public(url))
    facts = [plain.scheme, plain.netloc, plain.path.rstrip("/"), query]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _fetched(source: _Source, advance: Progress | None = None) -> str:
    """The SHA-256 of the content, which is in the cache then."""
    digest = _known(source)
    if digest is None:
        with _locked(f"file-{source.key[:_LOCK_NAMES]}"):
            digest = _known(source)
            if digest is None:
                return _download(source, advance)
    if advance is not None:
        advance(source.size or 0)
    return digest


def _known(source: _Source) -> str | None:
    """The digest of an earlier download, if the remote has not changed since and the copy is whole.

    A copy whose size and time are as recorded is taken for whole; else it is hashed.
    """
    entry = _read_json(_root() / "index" / f"{source.key}.json")
    digest = entry.get("sha256")
    if source.identity is None or entry.get("identity") != source.identity or not digest:
        return None
    blob = _blobs() / digest
    try:
        if _stamp(blob) == entry.get("stamp"):
            return str(digest)
        if _hash_file(blob, hashlib.sha256()).hexdigest() == digest:
            _remember(source, digest)
            return str(digest)
    except OSError:
        return None
    logger.warning("%s: the copy in the cache is damaged; fetching it again", public(source.url))
    blob.unlink(missing_ok=True)
    return None


def _remember(source: _Source, digest: str) -> None:
    entry = {
        "url": public(source.url),
        "size": source.size,
        "identity": source.identity,
        "sha256": digest,
        "stamp": _stamp(_blobs() / digest),
    }
    _write_json(_root() / "index" / f"{source.key}.json", entry)


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _named(digest: str, name: str) -> Path:
    path = _root() / "named" / digest / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _link(path, path)
    return path


def _link(link: Path, final: Path, digest: str | None = None) -> None:
    """Make ``link``, which will stand at ``final``, point to a content; relative, so that the
    cache may be moved."""
    target = _blobs() / (digest or final.parent.name)
    link.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # another process was first
        link.symlink_to(os.path.relpath(target, final.parent))


def _folder(url: str, sources: Mapping[str, _Source]) -> Path:
    state = [[name, s.size, s.identity] for name, s in sorted(sources.items())]
    key = hashlib.sha256(json.dumps([_key(url), state]).encode()).hexdigest()[:32]
    folder = _root() / "folders" / key
    certain = all(s.identity is not None for s in sources.values())
    if certain and _whole(folder):
        return folder
    with _locked(f"folder-{key[:_LOCK_NAMES]}"):
        if certain and _whole(folder):
            return folder
        digests = _fetch_all(url, sources)
        if not certain:  # what was fetched, not what was told, says which folder this is
            key = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:32]
            folder = folder.with_name(key)
        _lay_out(folder, digests)
    return folder


def _whole(folder: Path) -> bool:
    """Whether every content of a folder is in the cache as it was left there."""
    contents = _read_json(folder.with_name(f"{folder.name}.json"))
    try:
        return bool(contents) and all(
            _stamp(_blobs() / digest) == stamp for digest, *stamp in contents.values()
        )
    except OSError:
        return False


def _fetch_all(url: str, sources: Mapping[str, _Source]) -> dict[str, str]:
    """Relative name → digest; several files at a time."""
    total = sum(source.size or 0 for source in sources.values())
    title = f"fetching {PurePosixPath(urlsplit(public(url)).path).name or public(url)}"
    with progress_bar(title, unit="B", total=total) as advance:
        pool = ThreadPoolExecutor(_FILES_AT_ONCE)
        try:
            digests = list(pool.map(lambda source: _fetched(source, advance), sources.values()))
        finally:
            pool.shutdown(cancel_futures=True)
    return dict(zip(sources, digests, strict=True))


def _lay_out(folder: Path, digests: Mapping[str, str]) -> None:
    """Links to the contents; the folder appears by one rename."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
        try:
            for name, digest in digests.items():
                _link(made / name, folder / name, digest)
            made.chmod(0o755)
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    contents = {name: [digest, *_stamp(_blobs() / digest)] for name, digest in digests.items()}
    _write_json(folder.with_name(f"{folder.name}.json"), contents)


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Held by one thread of one process; the system frees it when that process ends."""
    path = _root() / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for a file that another process fetches")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all; after a power cut it may be lost, which costs one more hashing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(value, file)
    Path(name).replace(path)


# --- the download --------------------------------------------------------------------------------


class _MismatchError(Exception):
    """What came is not what the store says it has. ``digest``: of what came."""

    def __init__(self, message: str, digest: str) -> None:
        super().__init__(message)
        self.digest = digest


def _download(source: _Source, advance: Progress | None) -> str:
    """Fetch into a partial file, check, and make it a content of the cache."""
    _require_room(source)
    one_reading = source.size is not None and source.size <= _CHUNK_BYTES
    before = None if one_reading else _source(source.url).identity  # not as a listing tells it
    partial = _partial(source)
    bar = progress_bar(f"fetching {source.name}", unit="B", total=source.size)
    if advance is not None:
        digest = _received(source, partial, advance)
    else:
        with bar as own:
            digest = _received(source, partial, own)
    if before is not None and _source(source.url).identity != before:
        partial.unlink()
        raise RemoteError(f"{public(source.url)}: changed while it was fetched; run again")
    blob = _blobs() / digest
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial.chmod(0o444)
    partial.replace(blob)
    sync(blob.parent)
    _remember(source, digest)
    return digest


def _partial(source: _Source) -> Path:
    """The file to go on with; those of earlier states of the remote are removed."""
    folder, identity = _root() / "partial", source.identity
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{source.key}-{(identity or 'unknown')[:16]}"
    for left in folder.glob(f"{source.key}-*"):
        if left != path or identity is None:
            left.unlink(missing_ok=True)
    return path


def _require_room(source: _Source) -> None:
    free = shutil.disk_usage(_root()).free
    if source.size is not None and source.size > free:
        raise RemoteError(
            f"{public(source.url)}: has {source.size:,} bytes, but the cache folder "
            f"{cache_folder()} has {free:,} free; free some, or set RAYMERGE_CACHE to another disk"
        )


def _received(source: _Source, partial: Path, advance: Progress) -> str:
    """Fill ``partial`` with checked content; the SHA-256. What breaks off goes on a few times."""
    seen: set[str] = set()
    advance(_done(source, partial))
    for attempt in range(_ATTEMPTS):
        try:
            return _receive(source, partial, advance, seen)
        except Exception as error:
            if attempt == _ATTEMPTS - 1 or _is_final(error):
                raise
            if isinstance(error, _MismatchError):
                seen.add(error.digest)
                advance(-partial.stat().st_size)
                partial.unlink()
            logger.info("%s: %s; trying again", public(source.url), short(error, source.url))
            time.sleep(_WAIT_S * attempt)
    raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    kinds = (FileNotFoundError, PermissionError, ImportError, RaymergeError)
    return full or isinstance(error, kinds) or http_status(error) in (401, 403, 404)


def _done(source: _Source, partial: Path) -> int:
    """Bytes of an earlier download that count."""
    done = partial.stat().st_size if partial.exists() else 0
    return done if source.size is not None and done <= source.size else 0


def _receive(source: _Source, partial: Path, advance: Progress, seen: set[str]) -> str:
    done = _done(source, partial)
    hashes = {name: hashlib.new(name) for name in {"sha256", *source.sums}}
    with partial.open("r+b" if done else "wb") as out:
        if done:
            _hash_file(partial, *hashes.values())
            out.seek(done)
        try:
            _copy(source, done, out, hashes.values(), advance)
        except _NoRangesError:
            out.seek(0)
            out.truncate()
            hashes = {name: hashlib.new(name) for name in hashes}
            advance(-done)
            _copy(source, None, out, hashes.values(), advance)
        out.flush()
        os.fsync(out.fileno())
        size = out.tell()
    digest = hashes["sha256"].hexdigest()
    if source.size is not None and size != source.size:
        if size > source.size:
            raise _MismatchError(f"{size:,} bytes came instead of {source.size:,}", digest)
        raise OSError(f"ended after {size:,} of {source.size:,} bytes")
    for name, expected in source.sums.items():
        # Some stores' tags look like an MD5 and are none (S3 with keys of its own): what comes
        # twice alike is what is there.
        if hashes[name].hexdigest() != expected.lower() and not (name == "md5" and digest in seen):
            raise _MismatchError(f"the {name} of what came is not {expected}", digest)
    return digest


class _NoRangesError(Exception):
    """The server gives whole files only."""


def _copy(
    source: _Source, start: int | None, out: BinaryIO, hashes: Any, advance: Progress
) -> None:
    """From ``start`` to the end; None: as one stream, for servers that cannot read parts."""
    for chunk in _chunks(source, start):
        out.write(chunk)
        if source.size is not None and out.tell() > source.size:
            return  # the caller sees that it is too long; it may be without end
        for digest in hashes:
            digest.update(chunk)
        advance(len(chunk))


def _chunks(source: _Source, start: int | None) -> Iterator[bytes]:
    if source.size is None or start is None:
        how: dict[str, Any] = {"block_size": 0}
    else:
        how = {"block_size": _CHUNK_BYTES, "cache_type": "none"}
    with source.fs.open(source.path, "rb", **how) as file:
        try:
            if start:
                file.seek(start)
            while chunk := file.read(_CHUNK_BYTES):
                yield bytes(chunk)
        except ValueError as error:  # "… doesn't appear to support range requests"
            if "block_size" in str(error) or "seek" in str(error).lower():
                raise _NoRangesError from None
            raise


def _read(source: _Source, start: int, length: int) -> bytes:
    """A part of a remote file."""
    with source.fs.open(source.path, "rb", block_size=max(1, length), cache_type="none") as file:
        file.seek(start)
        return bytes(file.read(length))


def _hash_file(path: Path, *hashes: Any) -> Any:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            for digest in hashes:
                digest.update(chunk)
    return hashes[0]


def _plain_name(name: str) -> str:
    return re.sub(r"[^\w.@+=-]", "_", name).lstrip(".") or "file"
