"""Errors of stores and their clients in one line: the remedy, and no credential.

The clients' exceptions are recognised by class name, so that none of them is imported here.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from raymerge.errors import RaymergeError, RemoteError, one_line
from raymerge.files.atomic import cache_folder
from raymerge.files.urls import redact, redact_url

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}


@contextmanager
def one_line_errors(url: str) -> Iterator[None]:
    """Raise what a store raises as one line without credentials, and so without its cause."""
    try:
        yield
    except RaymergeError:
        raise
    except Exception as error:
        raise RemoteError(f"{redact_url(url)}: {_reason(error, url)}") from None


_REFUSALS = {"NoCredentialsError", "GatedRepoError", "PermissionError", "CredentialRetrievalError"}
_SILENCE = {"ClientConnectorError", "EndpointConnectionError", "ConnectError", "ConnectTimeout"}


def _reason(error: Exception, url: str) -> str:
    scheme = urlsplit(url).scheme.lower()
    status, kinds = http_status(error), {type(cause).__name__ for cause in _causes(error)}
    if isinstance(error, ImportError):
        extra = _EXTRAS.get(scheme)
        install = f"pip install 'raymerge[{extra}]'" if extra else error_line(error, url)
        return f"{scheme}:// needs a package that is missing; {install}"
    if isinstance(error, ValueError) and "rotocol" in str(error):
        return f"{scheme}:// is no known scheme; use hf://, s3://, gs:// or https://"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no room in the cache folder {cache_folder()}; set RAYMERGE_CACHE to another disk"
    if status in (401, 403) or _REFUSALS & kinds:
        return f"no access; {_login(scheme)}"
    if _SILENCE & kinds:
        return "the server cannot be reached; check the network and the address"
    if isinstance(error, FileNotFoundError) or status == 404:
        private = f", or no access: {_login(scheme)}" if scheme == "hf" else ""
        return f"no such file or folder{private}"
    return f"cannot be fetched ({error_line(error, url)}); run again to continue it"


def _login(scheme: str) -> str:
    where = {
        "hf": "set HF_TOKEN, or run `hf auth login`",
        "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        "s3a": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
        "gcs": "set GOOGLE_APPLICATION_CREDENTIALS",
    }
    return where.get(scheme, "check the credentials on this machine")


def _causes(error: BaseException) -> list[BaseException]:
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return causes


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, or None."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(response, "status_code", None) or getattr(cause, "status", None)
        if isinstance(status, int):
            return status
    return None


def error_line(error: BaseException, url: str) -> str:
    """Return an error's class and text without the secrets of the URL."""
    text = str(error)
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    for secret in (parts.query, login, login.partition(":")[2]):
        if secret and secret not in redact_url(url):
            text = text.replace(secret, "…")
    name = type(error).__name__
    return f"{name}: {one_line(redact(text))}" if text.strip() else name
