"""Work for a client ends when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

T = TypeVar("T")

CLIENT_LEFT = "the client left"
"""The message of the cancellation of such work: whatever else ends it has another."""


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """What ``work`` gives; it is cancelled when the client disconnects.

    The request's body must have been read: what arrives after it is the disconnection alone.

    Raises:
        ClientDisconnect: when it did.
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
