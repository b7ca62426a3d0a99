"""An HTTP client whose answers have a limit.

A server may answer a range of 100 bytes with gigabytes, and fsspec reads an answer whole before it
looks at it.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any
from urllib.parse import urlsplit

_MOST_PAGE_BYTES = 64 << 20
"""The limit of an answer to a request without a range: a page that lists a folder."""


def client_options(url: str) -> dict[str, Any]:
    """Return fsspec's options for a URL: for http(s), a client that bounds what it reads."""
    if urlsplit(url).scheme.lower() not in ("http", "https"):
        return {}
    return {"client_kwargs": {"response_class": _response_class()}}


@cache
def _response_class() -> type:
    """Return the class of the client's answers; aiohttp is needed for http(s) only."""
    from aiohttp import ClientResponse

    class BoundedResponse(ClientResponse):  # type: ignore[misc, unused-ignore]
        async def read(self) -> bytes:
            if self._body is not None:
                return self._body
            limit = _asked_bytes(self.request_info.headers.get("Range"))
            parts: list[bytes] = []
            size = 0
            async for part in self.content.iter_any():
                size += len(part)
                if size > limit:
                    self.close()
                    raise OSError(f"more came than the {limit:,} bytes that were asked for")
                parts.append(part)
            self._body = b"".join(parts)
            return self._body

    return BoundedResponse


def _asked_bytes(asked: str | None) -> int:
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "")
    return int(match[2]) - int(match[1]) + 1 if match else _MOST_PAGE_BYTES
