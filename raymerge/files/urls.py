"""URLs, and how to show them without passwords and signatures. Imports nothing heavy."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# A password may hold quotes, so all before an @ of the host belongs to the URL.
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://(?:[^\s/]*@)?[^\s'\"<>`|]+")
_TOKEN_IN_TEXT = re.compile(
    r"(?i)(\b(?:authorization:\s*\w+|bearer)\s+)[\w.~+/=-]{8,}|\bhf_[A-Za-z0-9]{16,}"
)
_AFTER_URL = ".,;:!)]}"
_LOGIN_SCHEMES = ("ftp", "sftp", "ssh", "smb")
"""Their user name is part of the address; only the password is a secret."""
_STORE_PARAMETERS = (
    "download",
    "dl",
    "generation",
    "raw",
    "rev",
    "revision",
    "version",
    "versionid",
)
_DATA_PARAMETERS = (
    "config",
    "image",
    "label",
    "limit",
    "match",
    "split",
)  # see data/sources/reference.py
_OPEN_PARAMETERS = frozenset((*_STORE_PARAMETERS, *_DATA_PARAMETERS))
"""All other parameters of a query may be signatures or tokens."""


def is_remote(reference: str) -> bool:
    """Return whether a reference is a URL (``s3://…``, ``hf://…``) and no path on this machine."""
    return _REMOTE.match(reference) is not None


def redact_url(url: str) -> str:
    """Return a URL without its password and without query parameters that may be secret."""
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that hold no address
        return url.partition("://")[0] + "://…"
    if "@" in parts.path and not re.fullmatch(r"[^:]*(:\d*)?", parts.netloc):
        return f"{parts.scheme}://…"  # a password with a slash, which ends the host
    pairs = [pair for pair in parse_qsl(parts.query) if pair[0].lower() in _OPEN_PARAMETERS]
    query, netloc = urlencode(pairs), _public_host(parts)
    if (query, netloc) == (parts.query, parts.netloc):
        return url
    text = f"{parts.scheme}://{netloc}{parts.path}"
    return text + (f"?{query}" if query else "") + (f"#{parts.fragment}" if parts.fragment else "")


def _public_host(parts: SplitResult) -> str:
    """Return host and user name; ``abfs://container@account`` holds no credential, nor does hf."""
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
    """Return a text with every URL in it redacted, and without tokens of an authorization."""
    text = _TOKEN_IN_TEXT.sub(lambda match: (match[1] or "") + "…", text)

    def replace(match: re.Match[str]) -> str:
        url = match.group()
        bare = url.rstrip(_AFTER_URL)
        return redact_url(bare) + url[len(bare) :]

    return _URL_IN_TEXT.sub(replace, text) if "://" in text else text


def redact_values(data: Any) -> Any:
    """Return plain data (mappings, lists, values) with every string that is a URL redacted."""
    if isinstance(data, dict):
        return {key: redact_values(value) for key, value in data.items()}
    if isinstance(data, list):
        return [redact_values(value) for value in data]
    if isinstance(data, str) and is_remote(data.removeprefix("local-dir:")):
        return redact(data)
    return data
