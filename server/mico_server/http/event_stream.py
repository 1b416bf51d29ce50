"""Work for a client ends when the client goes away; server-sent events are such work."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from mico_chat.errors import MicoError
from mico_server.http.errors import mico_error_body

logger = logging.getLogger(__name__)

T = TypeVar("T")

CLIENT_LEFT = "the client left"
"""The message of a cancellation because the client left; other cancellations have another."""

_TO_JSON = json.JSONEncoder(separators=(",", ":"))


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client disconnects.

    The request's body must have been read before.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel(CLIENT_LEFT if leaving.done() else None)
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event. If ``data`` is text, it must be JSON already."""
    text = data if isinstance(data, str) else _TO_JSON.encode(data)
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {text}\n\n".encode()


class EventStream(StreamingResponse):
    """Sends a first event, then each of ``events`` as soon as it exists.

    A MicoError of ``events`` ends the stream with an event that is called ``error_name``.
    ``events`` is closed when the client leaves, or takes nothing for ``send_timeout_s`` seconds.
    """

    _events: AsyncGenerator[bytes, None]
    _send_timeout_s: float

    @classmethod
    async def started(
        cls,
        events: AsyncGenerator[bytes, None],
        receive: Receive,
        *,
        send_timeout_s: float,
        error_name: str | None = None,
    ) -> EventStream:
        """The response, once its first event exists; an error before it gets its own status."""
        try:
            first = await while_connected(receive, anext(events))
        except BaseException:
            await events.aclose()
            raise
        # A proxy must neither store nor buffer the stream.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        pieces = _pieces(first, events, error_name)
        response = cls(pieces, headers=headers, media_type="text/event-stream")
        response._events, response._send_timeout_s = events, send_timeout_s
        return response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def timed(message: Message) -> None:
            async with asyncio.timeout(self._send_timeout_s):
                await send(message)

        try:
            async with aclosing(self._events):
                await while_connected(receive, self.stream_response(timed))
        except ClientDisconnect:
            logger.info("%s: the client disconnected", scope["path"])
        except TimeoutError:
            logger.info("%s: the client stopped reading; the connection was closed", scope["path"])


async def _pieces(
    first: bytes, events: AsyncGenerator[bytes, None], error_name: str | None
) -> AsyncGenerator[bytes, None]:
    yield first
    try:
        async for piece in events:
            yield piece
    except MicoError as error:
        yield event(mico_error_body(error), error_name)
