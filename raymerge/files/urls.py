"""URLs, and how to show them without passwords and signatures. Imports nothing heavy."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# A password may hold quotes and spaces, so all before the @ of a host is the URL. Texts can
# be long: no pattern takes more than a bounded look at each character.
_URL_IN_TEXT = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]{1,20}://"
    r"(?:[^\s/]*@|[^\s/@:]{0,100}:(?!\d*\s)[^/@]{0,100}@)?"
    r"[^\s'\"<>`|]+"
)
# What a quote in an address cuts off, and the login of an address in another one's query.
_PARAMETER_IN_TEXT = re.compile(r"([?&;#]([\w.%-]{1,60})=)([^\s&;<>|`]*)")
_LOGIN_IN_TEXT = re.compile(r"(?i)(%3A%2F%2F)[^\s'\"/]{0,200}?(%40)")
# Tokens by their own form, by the header that holds them, and by the name of their setting.
_TOKENS_IN_TEXT = (
    re.compile(r"()\b(?:hf_|gh[opsur]_|github_pat_|glpat-|sk-)[\w-]{16,}", re.ASCII),
    re.compile(r"(?i)(\b(?:authorization['\"]?\s?[:=]\s?['\"]?\w+|bearer)\s+)[\w.~+/=-]{8,}"),
    re.compile(
        r"(?i)((?<![?&;#\w-])[\w-]{0,40}"
        r"(?:token|secret|password|passwd|api[_-]?key|access[_-]?key|authorization)['\"]?"
        # After a colon a word may also be prose: a secret has a digit.
        r"(?:\s?:\s?['\"]?(?=[^\s'\"\d]{0,60}\d)(?=\S{6})|=['\"]?(?=\d{0,60}[^\W\d])(?=\S{4})))"
        r"[\w.~+/=%-]+"
    ),
)
_AFTER_URL = ".,;:!)]}'\""
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
_SHOWN_PARAMETERS = _OPEN_PARAMETERS | {"root"}
"""``root`` is torchvision's, whose references are no URLs."""


def is_remote(reference: str) -> bool:
    """Return whether a reference is a URL (``s3://…``, ``hf://…``) and no path on this machine."""
    return _REMOTE.match(reference) is not None


def redact_url(url: str) -> str:
    """Return a URL without its password and without query parameters that may be secret."""
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that hold no address
        return url.partition("://")[0] + "://…"
    rest = f"{parts.path}?{parts.query}#{parts.fragment}"
    if ":" in parts.netloc and "@" in rest:
        return f"{parts.scheme}://…"  # a password with a mark that ends the host
    path = parts.path.partition(";")[0]
    fragment = "" if "=" in parts.fragment else parts.fragment
    pairs = [pair for pair in parse_qsl(parts.query) if pair[0].lower() in _OPEN_PARAMETERS]
    query, netloc = urlencode(pairs), _public_host(parts)
    shown = parts._replace(netloc=netloc, path=path, query=query, fragment=fragment)
    return url if shown == parts else shown.geturl()


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
    for pattern in _TOKENS_IN_TEXT:
        text = pattern.sub(lambda match: match[1] + "…", text)
    text = _LOGIN_IN_TEXT.sub(r"\1…\2", text)
    if "://" not in text:
        return text

    def replace(match: re.Match[str]) -> str:
        url = match.group()
        bare = url.rstrip(_AFTER_URL)
        return redact_url(bare) + url[len(bare) :]

    def hide(match: re.Match[str]) -> str:
        if match[2].lower() in _SHOWN_PARAMETERS:
            return match.group()
        return f"{match[1]}…{match[3][len(match[3].rstrip(_AFTER_URL)) :]}"

    return _PARAMETER_IN_TEXT.sub(hide, _URL_IN_TEXT.sub(replace, text))


def redact_values(data: Any) -> Any:
    """Return plain data (mappings, lists, values) with every string that is a URL redacted."""
    if isinstance(data, dict):
        return {key: redact_values(value) for key, value in data.items()}
    if isinstance(data, list):
        return [redact_values(value) for value in data]
    if isinstance(data, str) and is_remote(data.removeprefix("local-dir:")):
        prefix = "local-dir:" if data.startswith("local-dir:") else ""
        return prefix + redact_url(data.removeprefix(prefix))
    return data
