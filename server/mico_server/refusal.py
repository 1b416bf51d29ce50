"""Turn a request away before its body is read."""

from __future__ import annotations

from typing import Literal

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Reason = Literal["auth", "body", "origin", "rate_limit", "scope", "unavailable", "user"]

_DISCARDED_BYTES = 1 << 20
"""A body up to so long is let come and thrown away, which keeps the connection for the next
request; a longer one, or one of unknown length, ends with the connection."""


async def refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    response: Response,
    reason: Reason,
    *,
    close: bool = False,
) -> None:
    """Send ``response``; ``reason`` is kept as ``scope["state"]["refused"]`` for the metrics.

    The connection is closed where much of the body may still come, or when ``close`` is set.
    """
    scope.setdefault("state", {})["refused"] = reason
    if close or not _short(scope):
        response.headers["connection"] = "close"
    await response(scope, receive, send)


def _short(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    if b"transfer-encoding" in headers:
        return False
    length = headers.get(b"content-length", b"0")
    return length.isdigit() and int(length) <= _DISCARDED_BYTES
