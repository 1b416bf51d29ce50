"""Guards of the service: ASGI middlewares that refuse a request before its body is read."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mico_chat.errors import MicoError
from mico_server.http.errors import mico_error_response

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health/live", "/health/ready"})
"""The paths of load balancers' checks: no guard looks at them."""

Reason = Literal["auth", "origin", "rate_limit", "scope", "unavailable", "user"]
"""Why a guard refuses a request."""


@dataclass
class Refused(Exception):
    """The answer to a request that a guard refuses; the metrics count ``reason``."""

    reason: Reason
    response: Response


@dataclass
class Guard(ABC):
    """A middleware that answers a request that fails its check, before the body is read.

    The server reads the body of a refused request, up to 1 MiB, and throws it away, so that the
    connection can serve the next request. After a longer body, or one of unknown length, the
    connection is closed.
    """

    app: ASGIApp

    @abstractmethod
    async def check(self, scope: Scope, headers: Headers) -> None:
        """Raise :class:`Refused`, or a MicoError if the guard itself cannot work."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            await self.check(scope, headers)
        except Refused as error:
            refused = error
        except MicoError as error:  # the application's own handlers are further in
            logger.error("%s cannot work: %s", type(self).__name__, error)
            refused = Refused("unavailable", mico_error_response(error))
        else:
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})["refused"] = refused.reason
        length = headers.get("content-length", "0")
        short = length.isdecimal() and int(length) <= 1 << 20
        if not short or "transfer-encoding" in headers:
            refused.response.headers["connection"] = "close"
        await refused.response(scope, receive, send)
