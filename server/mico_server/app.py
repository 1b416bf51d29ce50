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
from mico_chat.assistant import Answer, Assistant, Choice
from mico_chat.engine import FinishReason, TokenLogprob, Usage
from mico_chat.errors import RequestError
from mico_chat.media.medium import MediaReport
from mico_server.body_limit import BodyLimit
from mico_server.disconnect import while_connected
from mico_server.errors import add_error_handlers
from mico_server.model_host import ModelHost
from mico_server.settings import ServerSettings
from mico_server.uploads import form_schema, read_form


class ChatResponse(BaseModel):
    """An answer, what it cost, and what was seen and heard for it.

    ``choices`` has all ``n`` answers where more than one was asked for, the first one too;
    ``logprobs`` those of the first one's tokens where they were asked for.
    """

    answer: str
    finish_reason: FinishReason
    usage: Usage
    media: tuple[MediaReport, ...]
    choices: tuple[Choice, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()

    @classmethod
    def of(cls, answer: Answer) -> ChatResponse:
        """The response that tells an answer."""
        first = answer.choices[0]
        return cls(
            answer=first.text,
            finish_reason=first.finish_reason,
            usage=answer.usage,
            media=answer.media,
            choices=answer.choices if len(answer.choices) > 1 else (),
            logprobs=first.logprobs,
        )


# The route reads its form itself, to keep the order of the media; this tells the API's page.
_CHAT_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": form_schema()}},
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
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        max_json_bytes=settings.max_json_bytes,
        timeout_s=settings.body_timeout_s,
    )
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
        host.check()  # nobody needs to upload what will be refused
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
                answer = await while_connected(request, host.answer(messages, options))
        return ChatResponse.of(answer)

    return app
