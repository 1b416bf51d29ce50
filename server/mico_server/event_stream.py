"""Server-sent events: a response that ends its work when the client leaves or stops reading."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mico_server.disconnect import while_connected

logger = logging.getLogger(__name__)

_TO_JSON = json.JSONEncoder(separators=(",", ":"))


def event(data: Any, name: str | None = None) -> bytes:
    """One event; ``data`` is JSON already when it is text."""
    text = data if isinstance(data, str) else _TO_JSON.encode(data)
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {text}\n\n".encode()


class EventStream(Response):
    """Sends a first event and then what ``events`` yields, each as soon as it is there.

    ``events`` is closed when the client leaves, or takes nothing for ``send_timeout_s`` seconds.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes, events: AsyncGenerator[bytes, None], *, send_timeout_s: float
    ) -> None:
        # A proxy must neither keep nor gather what it passes on.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._send_timeout_s = send_timeout_s

    @classmethod
    async def started(
        cls, events: AsyncGenerator[bytes, None], receive: Receive, *, send_timeout_s: float
    ) -> EventStream:
        """The response, once its first event is there: what is wrong with a request shows before
        that, and gets a status of its own.

        Raises:
            ClientDisconnect: when the client went away meanwhile.
            Exception: whatever came in place of the first event.
        """
        try:
            first = await while_connected(receive, anext(events))
        except BaseException:
            await events.aclose()
            raise
        return cls(first, events, send_timeout_s=send_timeout_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await while_connected(receive, self._send(send))
        except ClientDisconnect:
            logger.info("%s: the client disconnected", scope["path"])
        except TimeoutError:
            logger.info("%s: the client stopped reading; the connection was closed", scope["path"])

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with aclosing(self._events) as events:
            await self._pass(send, start)
            await self._pass(send, _body(self._first))
            async for piece in events:
                await self._pass(send, _body(piece))
            await self._pass(send, {"type": "http.response.body", "body": b""})

    async def _pass(self, send: Send, message: Message) -> None:
        async with asyncio.timeout(self._send_timeout_s):
            await send(message)


def _body(piece: bytes) -> Message:
    return {"type": "http.response.body", "body": piece, "more_body": True}
