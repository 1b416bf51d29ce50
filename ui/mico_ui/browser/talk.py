"""Talking in real time: the WebSocket of a browser, joined to the server's.

A browser may not reach the server, and cannot give a WebSocket a key. So the page gets a secret for
its visitor, which opens such sessions alone, and offers it as OpenAI's clients do.
"""

import asyncio
import json
from contextlib import suppress

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from mico_ui.client import ApiError, AsyncClient

IN_PROTOCOL = "openai-insecure-api-key."
REFUSED = 1008  # what the server closes with, too


async def talk(socket: WebSocket, api: str) -> None:
    """Serve a browser until either side ends; an error is an event, as the server's own are."""
    offered: list[str] = socket.scope.get("subprotocols", [])
    secrets = [one for one in offered if one.startswith(IN_PROTOCOL)]
    await socket.accept("realtime" if "realtime" in offered else None)
    try:
        if len(secrets) != 1:
            raise ApiError("a session needs the secret that the page gives", 401)
        # A browser's own rights are in its secret: without a good one, it has none.
        secret = secrets[0].removeprefix(IN_PROTOCOL)
        where = {name: socket.query_params.get(name) for name in ("conversation", "store_media")}
        async with (
            AsyncClient(api, secret, require_key=True) as client,
            client.live("/v1/realtime", **where) as there,
        ):
            await _join(socket, there)
    except WebSocketDisconnect:
        return
    except ApiError as error:
        body = {"type": "invalid_request_error", "code": error.code, "message": str(error)}
        await socket.send_text(json.dumps({"type": "error", "error": body}))
        await socket.close(REFUSED)


async def _join(here: WebSocket, there: ClientConnection) -> None:
    """Pass on what each says, no faster than the other reads it."""

    async def said() -> None:
        with suppress(ConnectionClosed):  # which the other loop finds out, too
            while (message := await here.receive())["type"] == "websocket.receive":
                text = message.get("text")
                await there.send(message["bytes"] if text is None else text)
            await there.close()

    saying = asyncio.create_task(said())
    try:
        async for text in there:
            await here.send_text(str(text))
        if here.client_state is WebSocketState.CONNECTED:
            await here.close(there.close_code or 1000, there.close_reason)
    finally:
        saying.cancel()
        await asyncio.gather(saying, return_exceptions=True)
