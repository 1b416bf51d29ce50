"""The FastAPI application: routes, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel

from mico_chat import __version__
from mico_chat.assistant import Assistant
from mico_chat.engine import Usage
from mico_chat.errors import RequestError
from mico_chat.media.kinds import KINDS
from mico_chat.media.medium import MediaReport
from mico_server.body_limit import BodyLimit
from mico_server.errors import add_error_handlers
from mico_server.model_host import ModelHost
from mico_server.settings import ServerSettings
from mico_server.uploads import read_form


class ChatResponse(BaseModel):
    """An answer, what it cost, and what was seen and heard for it."""

    answer: str
    usage: Usage
    media: list[MediaReport]


# The route reads its form itself, to keep the order of the media; this tells the API's page.
_CHAT_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["message"],
                    "properties": {
                        "message": {"type": "string"},
                        **{
                            kind: {"type": "array", "items": {"type": "string", "format": "binary"}}
                            for kind in KINDS
                        },
                        "max_tokens": {"type": "integer", "default": 128},
                        "temperature": {"type": "number", "default": 0},
                        "top_p": {"type": "number", "default": 1},
                        "top_k": {"type": "integer", "default": 0},
                        "seed": {"type": "integer"},
                        "repetition_penalty": {"type": "number", "default": 1},
                        "stop": {"type": "array", "items": {"type": "string"}},
                    },
                }
            }
        },
    }
}


def create_app(
    load: Callable[[], Assistant],
    settings: ServerSettings | None = None,
    *,
    on_ready: Callable[[], None] | None = None,
    on_failed: Callable[[Exception], None] | None = None,
) -> FastAPI:
    """The application. ``load`` makes the assistant once the application has started.

    ``on_ready`` or ``on_failed`` is called when the model is loaded, or cannot be.
    """
    settings = settings or ServerSettings()
    host = ModelHost(
        load,
        max_requests=settings.max_requests,
        on_ready=on_ready,
        on_failed=on_failed,
    )
    started = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(host.run())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    app = FastAPI(title="MiCo-Chat", version=__version__, lifespan=lifespan)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    add_error_handlers(app)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready", "model": host.assistant.name}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"object": "model", "created": started, "owned_by": "mico-chat"}
        return {"object": "list", "data": [{"id": host.assistant.name, **model}]}

    @app.post("/v1/chat", openapi_extra=_CHAT_FORM)
    async def chat(request: Request) -> ChatResponse:
        _ = host.assistant  # while it is loading, nobody needs to upload anything
        content_type = request.headers.get("content-type", "")
        if not content_type.startswith(
            ("multipart/form-data", "application/x-www-form-urlencoded")
        ):
            got = repr(content_type) if content_type else "nothing"
            raise RequestError(f"content-type: expected multipart/form-data, got {got}")
        form = request.form(
            max_files=settings.max_media, max_fields=64, max_part_size=settings.max_text_bytes
        )
        async with form as fields:
            with tempfile.TemporaryDirectory(prefix="mico-upload-") as folder:
                messages, options = await read_form(fields, Path(folder))
                answer = await host.answer(messages, options)
        return ChatResponse(answer=answer.text, usage=answer.usage, media=list(answer.media))

    return app
