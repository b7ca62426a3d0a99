"""SHA-256 of checkpoints: computed in the background, and remembered between runs.

Hashing K files takes longer than merging them. A digest is remembered for a path, size and
modification time together, as make and git do; a file that changes is hashed again.
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

_HASH_BYTES = 32 << 20  # few turns at the interpreter's lock, which an import hardly lets go
_MOST_REMEMBERED = 10_000
_LOCK = threading.Lock()
_digests: dict[str, Future[str]] = {}


def sha256(path: Path) -> str:
    """The file's SHA-256, in hex; waits for the one that ``hash_ahead`` has begun."""
    future, mine = _future(path)
    if mine:
        _digest(path, future)
    return future.result()


def hash_ahead(references: Iterable[str]) -> None:
    """Begin to hash local checkpoints in the background; what cannot be found is left for later."""
    work = []
    for reference in references:
        if not (reference.startswith("hf-hub:") or is_remote(reference)):
            with suppress(RaymergeError, OSError):
                for path in files_of(locate(reference)):
                    work.append((path, *_future(path)))
    threading.Thread(target=_digest_all, args=(work,), daemon=True).start()


def remember() -> None:
    """Keep this process's digests for later ones, where the cache folder can be written."""
    done = {key: f.result() for key, f in _digests.items() if f.done() and not f.exception()}
    known = _remembered()
    if done.items() <= known.items():
        return
    merged = {**known, **done}
    with suppress(RaymergeError, OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_json(_file(), dict(list(merged.items())[-_MOST_REMEMBERED:]))


def _file() -> Path:
    return cache_folder() / "sha256.json"


def _remembered() -> dict[str, str]:
    try:
        known = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _future(path: Path) -> tuple[Future[str], bool]:
    """The digest of this very state of the file, and whether the caller is to compute it."""
    stat = path.stat()
    identity = f"{path.absolute()}|{stat.st_size}|{stat.st_mtime_ns}"
    with _LOCK:
        if identity in _digests:
            return _digests[identity], False
        future = _digests[identity] = Future()
        known = sha256_of(path) or _remembered().get(identity)
        if known is not None:
            future.set_result(known)
        return future, known is None


def _digest_all(work: Iterable[tuple[Path, Future[str], bool]]) -> None:
    for path, future, mine in work:
        if mine:
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
