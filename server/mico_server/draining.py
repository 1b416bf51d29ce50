"""The end of the service waits for the last words of requests that were cut.

A server that has waited long enough cancels what still runs and asks the application to end. A
request that is cancelled keeps what was said so far, for which the database must still be there.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send


class Draining:
    """ASGI middleware, the outermost: it knows when all requests have ended."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self._running += 1
        self._idle.clear()
        try:
            await self.app(scope, receive, send)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def drained(self, timeout_s: float) -> bool:
        """Wait until no request runs; False if some still do after so many seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
