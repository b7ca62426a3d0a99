"""Remote files as their stores describe them: name, size, identity, checksums.

Any scheme of fsspec works, with the credentials that the store's own tools use. Errors are those
of the store; remote_errors.py turns them into one line.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from raymerge.errors import RemoteError
from raymerge.files.bounded_http import client_options
from raymerge.files.urls import redact_url

ChooseNames = Callable[[Sequence[str]], Sequence[str]]

_CONTENT_FACTS = ("blob_id", "ETag", "etag", "md5Hash", "Content-MD5")
_TIME_FACTS = ("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created")
_SIGNING = re.compile(
    r"x-(amz|goog|ms)-.*|awsaccesskeyid|googleaccessid|key-pair-id|policy|expires|sig|signature"
    r"|token|access_token|s[eprtv]|spr|sk[a-z]+",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RemoteFile:
    """A remote file. ``url`` may hold credentials: show ``redact_url(url)`` instead.

    ``identity`` changes with the content; None where the store reports only a size.
    ``checksums``: algorithm → hex digest of the whole content.
    """

    url: str
    fs: Any
    path: str
    size: int | None
    identity: str | None
    checksums: Mapping[str, str]

    @property
    def name(self) -> str:
        name = PurePosixPath(urlsplit(self.path).path).name
        return re.sub(r"[^\w.@+=-]", "_", name).lstrip(".") or "file"

    @property
    def key(self) -> str:
        return key_of(self.url)


def key_of(url: str) -> str:
    """Return a hash of a URL without its login and signature: signed anew, it is the same file."""
    parts = urlsplit(url)
    query = [pair for pair in parse_qsl(parts.query) if not _SIGNING.fullmatch(pair[0])]
    plain = urlsplit(redact_url(url))
    facts = [plain.scheme, plain.netloc, plain.path.rstrip("/"), query]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def find_file(url: str) -> RemoteFile:
    """Return the file at a URL; raises :class:`RemoteError` for a folder."""
    fs, path = open_store(url)
    info = fs.info(path)
    if info.get("type") == "directory":
        raise RemoteError(f"{redact_url(url)}: is a folder; name a file in it")
    return _describe(url, fs, path, info)


def find_files(
    url: str, choose: ChooseNames | None, is_skipped: Callable[[str], bool] = lambda name: False
) -> dict[str, RemoteFile]:
    """Return the files of a folder by relative name, without those that are skipped.

    ``choose`` picks among the names directly in the folder; None: all files at any depth.
    """
    # List the folder. Hugging Face spells the revision in listings in its own way.
    fs, root = open_store(url)
    listing = fs.find(root, detail=True, **({} if choose is None else {"maxdepth": 1}))
    if hasattr(fs, "resolve_path"):
        root = fs.resolve_path(root).unresolve()
    base = str(fs._strip_protocol(root)).rstrip("/")
    if set(listing) == {base}:
        raise RemoteError(f"{redact_url(url)}: is a file; name the folder that it lies in")

    # Keep the files that stay inside the folder when they are written by these names.
    files = {}
    for path, info in listing.items():
        name = str(path).removeprefix(base).lstrip("/")
        is_file = info.get("type") != "directory" and name and not name.endswith("/")
        if is_file and not is_skipped(name):
            if ".." in PurePosixPath(name).parts:
                raise RemoteError(f"{redact_url(url)}: {name}: leads out of the folder; rename it")
            files[name] = (str(path), info)
    if not files:
        raise RemoteError(f"{redact_url(url)}: no such folder, or it is empty; check the address")
    names = sorted(files) if choose is None else choose(sorted(files))
    return {name: _describe(f"{url.rstrip('/')}/{name}", fs, *files[name]) for name in names}


def open_store(url: str) -> tuple[Any, str]:
    """Return the file system and the path in it, without cached listings."""
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(url, **client_options(url))
    fs.invalidate_cache()
    return fs, str(path)


def _describe(url: str, fs: Any, path: str, info: Mapping[str, Any]) -> RemoteFile:
    size = None if info.get("size") is None else int(info["size"])
    return RemoteFile(url, fs, path, size, _identity(info, size), _checksums(fs, info))


def _identity(info: Mapping[str, Any], size: int | None) -> str | None:
    """Return a hash that changes with the content.

    fsspec's ``ukey`` does not serve: it is constant for HTTP and changes with every signature.
    """
    lfs = info.get("lfs")
    content = lfs.get("sha256") if lfs else None
    for name in _CONTENT_FACTS:
        content = content or info.get(name)
    facts = [content] if content else [info.get(name) for name in (*_TIME_FACTS, "ino")]
    if not any(facts):
        return None
    texts = [fact.isoformat() if isinstance(fact, datetime) else str(fact) for fact in facts]
    return hashlib.sha256(json.dumps([size, *texts]).encode()).hexdigest()


def _checksums(fs: Any, info: Mapping[str, Any]) -> dict[str, str]:
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
