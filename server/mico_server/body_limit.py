"""Refuse a body beyond the limit before it fills memory or disk, and one that stops coming."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mico_chat.errors import LimitError, MicoError
from mico_server.errors import mico_error_response
from mico_server.refusal import refuse


class BodyTimeoutError(MicoError):
    """A request whose body stopped coming."""

    status = 408


class BodyLimit:
    """ASGI middleware: by the length a request claims, and by what really arrives.

    A multipart body goes to disk and may have ``max_bytes``. Any other is held in memory and may
    have ``max_json_bytes``, if that is less. The next piece of a body must come within
    ``timeout_s`` seconds; after the last one there is no limit, so that an application may wait
    for the client to go away.

    The answer to a body that is broken off here is made here as well: frameworks turn whatever is
    raised while they read a body into an error of their own.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_json_bytes: int, timeout_s: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_json_bytes = max_json_bytes
        self.timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        on_disk = headers.get("content-type", "").lower().startswith("multipart/form-data")
        limit = self.max_bytes if on_disk else min(self.max_bytes, self.max_json_bytes)
        claimed = headers.get("content-length", "")
        if claimed.isdigit() and int(claimed) > limit:
            response = mico_error_response(self._too_long(f"{int(claimed)} bytes", limit))
            await refuse(scope, receive, send, response, "body", close=True)
            return
        received = 0
        ended = started = False
        broken: MicoError | None = None

        async def limited() -> Message:
            nonlocal received, ended, broken
            try:
                async with asyncio.timeout(None if ended else self.timeout_s):
                    message = await receive()
            except TimeoutError as error:
                broken = self._stopped(received)
                raise broken from error
            ended = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > limit:
                broken = self._too_long(f"more than {limit} bytes", limit)
                raise broken
            return message

        async def answering(message: Message) -> None:
            nonlocal started
            if broken is None or started:
                started = True
                await send(message)

        try:
            await self.app(scope, limited, answering)
        except MicoError as error:
            if error is not broken:
                raise
        if broken is not None and not started:
            response = mico_error_response(broken)
            await refuse(scope, receive, send, response, "body", close=True)

    def _too_long(self, size: str, limit: int) -> LimitError:
        if limit == self.max_bytes:
            advice = "(MICO_SERVER_MAX_BODY_BYTES)"
        else:
            advice = (
                "for a body that is not a multipart form (MICO_SERVER_MAX_JSON_BYTES); upload "
                "media to /v1/media and send their ids"
            )
        return LimitError("request body", f"{size}, over the limit of {limit} {advice}")

    def _stopped(self, received: int) -> BodyTimeoutError:
        return BodyTimeoutError(
            f"request body: no bytes arrived for {self.timeout_s:g} s after {received} "
            "bytes (MICO_SERVER_BODY_TIMEOUT_S); send it again"
        )
