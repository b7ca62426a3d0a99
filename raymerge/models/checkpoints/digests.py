"""SHA-256 of checkpoints: computed in the background, and remembered between runs.

Hashing K files takes longer than merging them. A digest belongs to a path, size and modification
time together, as in make and git; a file that changes is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from raymerge.errors import RaymergeError
from raymerge.files.atomic import cache_folder, write_json
from raymerge.files.remote import sha256_of
from raymerge.files.urls import is_remote
from raymerge.models.checkpoints.locate import files_of, locate

_HASH_BYTES = 32 << 20  # large: each read waits for the interpreter lock, which imports hold long
_MAX_REMEMBERED = 10_000
_LOCK = threading.Lock()
_digests: dict[str, Future[str]] = {}


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hex; where :func:`hash_ahead` has started it, wait for that."""
    future, is_new = _future(path)
    if is_new:
        _digest(path, future)
    return future.result()


def hash_ahead(references: Iterable[str]) -> None:
    """Start to hash local checkpoints in the background.

    A reference that leads to no file is skipped; opening it raises the error.
    """
    work = []
    for reference in references:
        if not (reference.startswith("hf-hub:") or is_remote(reference)):
            with suppress(RaymergeError, OSError):
                for path in files_of(locate(reference)):
                    work.append((path, *_future(path)))
    threading.Thread(target=_digest_all, args=(work,), daemon=True).start()


def remember() -> None:
    """Save this process's digests for later ones, if the cache folder can be written."""
    digests = {key: f.result() for key, f in _digests.items() if f.done() and not f.exception()}
    earlier = _remembered()
    if digests.items() <= earlier.items():
        return
    merged = {**earlier, **digests}
    with suppress(RaymergeError, OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_json(_file(), dict(list(merged.items())[-_MAX_REMEMBERED:]))


def _file() -> Path:
    return cache_folder() / "sha256.json"


def _remembered() -> dict[str, str]:
    try:
        digests = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return digests if isinstance(digests, dict) else {}


def _future(path: Path) -> tuple[Future[str], bool]:
    """Return the digest of the file's present state, and whether the caller must compute it."""
    stat = path.stat()
    identity = f"{path.absolute()}|{stat.st_size}|{stat.st_mtime_ns}"
    with _LOCK:
        if identity in _digests:
            return _digests[identity], False
        future = _digests[identity] = Future()
        digest = sha256_of(path) or _remembered().get(identity)
        if digest is not None:
            future.set_result(digest)
        return future, digest is None


def _digest_all(work: Iterable[tuple[Path, Future[str], bool]]) -> None:
    for path, future, is_new in work:
        if is_new:
            _digest(path, future)


def _digest(path: Path, future: Future[str]) -> None:
    try:
        future.set_result(file_sha256(path))
    except BaseException as error:
        future.set_exception(error)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the file's content in hex, computed now and not remembered."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASH_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
