"""URLs, and what of them may be shown: no password, no signature. Imports nothing heavy."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s'\"<>`|]+")
_AFTER_URL = ".,;:!)]}"
_LOGIN_SCHEMES = ("ftp", "sftp", "ssh", "smb")
"""Their user name says where, as a host does; only the password is a secret."""
_OF_STORES = ("download", "dl", "generation", "raw", "rev", "revision", "version", "versionid")
_OF_DATA = ("config", "image", "label", "limit", "match", "split")  # see data/sources/reference.py
_OPEN_PARAMETERS = frozenset((*_OF_STORES, *_OF_DATA))
"""All other parameters of a query may be signatures or tokens."""


def is_remote(reference: str) -> bool:
    """Whether a reference is a URL (``s3://…``, ``hf://…``), not a path on this machine."""
    return _REMOTE.match(reference) is not None


def redact_url(url: str) -> str:
    """The URL without credentials: no password, and of its query only what cannot be a secret."""
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that are no address
        return url.partition("://")[0] + "://…"
    kept = [pair for pair in parse_qsl(parts.query) if pair[0].lower() in _OPEN_PARAMETERS]
    query, netloc = urlencode(kept), _public_host(parts)
    if (query, netloc) == (parts.query, parts.netloc):
        return url
    text = f"{parts.scheme}://{netloc}{parts.path}"
    return text + (f"?{query}" if query else "") + (f"#{parts.fragment}" if parts.fragment else "")


def _public_host(parts: SplitResult) -> str:
    """``abfs://container@account`` and ``hf://model@revision`` are places, not credentials."""
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return host
    if parts.scheme in ("http", "https"):
        return host
    name, colon, _ = login.partition(":")
    if not colon:
        return parts.netloc
    return f"{name}@{host}" if parts.scheme in _LOGIN_SCHEMES else host


def redact(text: str) -> str:
    """A text with every URL in it made public."""

    def replace(found: re.Match[str]) -> str:
        url = found.group()
        bare = url.rstrip(_AFTER_URL)
        return redact_url(bare) + url[len(bare) :]

    return _URL_IN_TEXT.sub(replace, text) if "://" in text else text


def redact_values(data: Any) -> Any:
    """Plain data (mappings, lists, values) with every string that is a URL made public."""
    if isinstance(data, dict):
        return {key: redact_values(value) for key, value in data.items()}
    if isinstance(data, list):
        return [redact_values(value) for value in data]
    if isinstance(data, str) and is_remote(data.removeprefix("local-dir:")):
        return redact(data)
    return data
