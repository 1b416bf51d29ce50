"""Refuse a body beyond the limit before it fills memory or disk."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mico_chat.errors import LimitError
from mico_server.errors import mico_error_response


class BodyLimit:
    """ASGI middleware: by the length a request claims, and by what really arrives."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        claimed = dict(scope["headers"]).get(b"content-length", b"")
        if claimed.isdigit() and int(claimed) > self.max_bytes:
            response = mico_error_response(self._error(f"{int(claimed)} bytes"))
            response.headers["connection"] = "close"  # the body is not read
            await response(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise self._error(f"more than {self.max_bytes} bytes")
            return message

        await self.app(scope, limited, send)

    def _error(self, size: str) -> LimitError:
        reason = f"{size}, over the limit of {self.max_bytes} (MICO_SERVER_MAX_BODY_BYTES)"
        return LimitError("request body", reason)
