"""One log line for each request. All lines that are logged while it is answered have its id.

Contents of messages and answers, file names and keys are never logged; the id of a key is.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import time
import uuid
from contextlib import suppress
from typing import IO, Literal
from urllib.parse import quote

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars
from structlog.typing import EventDict, Processor, WrappedLogger

from mico_server.http.auth import Caller
from mico_server.http.metrics import Metrics

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# The pages /docs and /redoc start with a script that is part of the page.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; worker-src blob:"
)
"""A page of the service may load files of the service alone."""

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "text", "json"]


class RequestLog:
    """The outermost ASGI middleware: it logs and counts requests, and knows when all have ended.

    It must wrap ``app.build_middleware_stack()``: a framework's handler of crashes is outside of
    its middlewares. The id of a request is the client's ``X-Request-Id`` if that is harmless,
    otherwise a new one; the answer has it in the same header. An answer without a content policy of
    its own gets :data:`CONTENT_POLICY`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics | None = None) -> None:
        self.app = app
        self._metrics = metrics
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def ended(self, timeout_s: float) -> bool:
        """Wait until no request runs; False if some still do after ``timeout_s`` seconds.

        A cancelled request stores the text that the model has said, and needs the database.
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self._idle.is_set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _GIVEN_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status, bytes_in, bytes_out = 499, 0, 0  # 499: nobody was left to answer
        complete = gone = False

        async def counted() -> Message:
            nonlocal bytes_in, gone
            message = await receive()
            bytes_in += len(message.get("body", b""))
            gone = gone or (message["type"] == "http.disconnect" and not complete)
            return message

        async def labelled(message: Message) -> None:
            nonlocal status, bytes_out, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                headers.setdefault("content-security-policy", CONTENT_POLICY)
            elif message["type"] == "http.response.body":
                bytes_out += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            await send(message)

        self._running += 1
        self._idle.clear()
        with bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, counted, labelled)
            except Exception:
                status = 500
                raise
            finally:
                seconds = time.perf_counter() - started
                caller: Caller | None = scope["state"].get("caller")
                logger.info(
                    "request",
                    extra={
                        "method": scope["method"],
                        # Quoted, so that no control character is in it; the query is left out.
                        "path": quote(scope["path"])[:200],
                        "status": status,
                        "ms": round(1000 * seconds, 1),
                        "bytes_in": bytes_in,
                        "bytes_out": bytes_out,
                        "key": None if caller is None else caller.key_id,
                        "client_gone": gone,
                    },
                )
                if self._metrics is not None:
                    self._metrics.request(scope, status, seconds)
                self._running -= 1
                if not self._running:
                    self._idle.set()


def configure_logging(level: Level, format: Format, stream: IO[str] | None = None) -> None:
    """Log to ``stream`` (standard error by default); ``auto`` is text on a terminal, else JSON.

    Other libraries log from ``warning`` up: at lower levels they log addresses and contents.
    """
    stream = sys.stderr if stream is None else stream
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[Processor]
    if format == "text" or (format == "auto" and stream.isatty()):
        # Other formatters of exceptions show local variables, and so what people sent.
        plain = structlog.dev.plain_traceback
        console = structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)
        rendering = [_escape, console]
    else:
        rendering = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    threshold = logging.getLevelNamesMapping()[level.upper()]
    handler.setLevel(threshold)  # also for loggers that have a level of their own
    logging.basicConfig(level=max(threshold, logging.WARNING), handlers=[handler], force=True)
    for name in ("mico_chat", "mico_server", "uvicorn"):
        logging.getLogger(name).setLevel(threshold)
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)  # RequestLog says more


def _escape(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Keep a message on one line, so that nobody can write lines of their own into the log."""
    text = str(event["event"])
    event["event"] = text if text.isprintable() else repr(text)[1:-1]
    return event
