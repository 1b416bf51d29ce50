"""One line for each request, and its id on every line that is logged while it is answered.

What people send and are told, file names and keys are never logged; a key's id is.
"""

from __future__ import annotations

import logging
import re
import sys
import time
import uuid
from typing import IO, Literal
from urllib.parse import quote

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars
from structlog.typing import EventDict, Processor, WrappedLogger

from mico_server.auth import Caller

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"

_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OWN_LOGGERS = ("mico_chat", "mico_server", "uvicorn")
_MAX_PATH = 200

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "text", "json"]


class RequestLog:
    """ASGI middleware: the outermost, so that it sees every answer.

    A framework keeps its own handler of crashes outside of its middlewares; to be outside of that,
    wrap the finished stack: ``app.middleware_stack = RequestLog(app.build_middleware_stack())``.

    The id is the client's ``X-Request-Id`` if that is harmless, else a new one; the answer has it
    in the same header, and ``scope["state"]["request_id"]`` for whoever is inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _GIVEN_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status, bytes_in, bytes_out = 499, 0, 0  # what is logged if nobody is left to answer
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
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            elif message["type"] == "http.response.body":
                bytes_out += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            await send(message)

        with bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, counted, labelled)
            except Exception:
                status = 500
                raise
            finally:
                caller: Caller | None = scope["state"].get("caller")
                logger.info(
                    "request",
                    extra={
                        "method": scope["method"],
                        "path": _path(scope),
                        "status": status,
                        "ms": round(1000 * (time.perf_counter() - started), 1),
                        "bytes_in": bytes_in,
                        "bytes_out": bytes_out,
                        "key": None if caller is None else caller.key_id,
                        "client_gone": gone,
                    },
                )


def _path(scope: Scope) -> str:
    """The path without its query; percent signs leave no control characters in it."""
    return quote(scope["path"])[:_MAX_PATH]


def configure_logging(level: Level, format: Format, stream: IO[str] | None = None) -> None:
    """Log to ``stream`` (standard error by default), as JSON lines or as text for a person.

    ``auto`` is text on a terminal and JSON elsewhere. Other libraries log from ``warning`` up:
    at lower levels they tell addresses, statements and contents.
    """
    stream = sys.stderr if stream is None else stream
    text = format == "text" or (format == "auto" and stream.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[Processor]
    if text:
        rendering = [
            _escape,
            structlog.dev.ConsoleRenderer(
                colors=stream.isatty(),
                # The others show local variables, and with them what people sent.
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    else:
        rendering = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    threshold = logging.getLevelNamesMapping()[level.upper()]
    handler.setLevel(threshold)  # also for loggers that have a level of their own
    logging.basicConfig(level=max(threshold, logging.WARNING), handlers=[handler], force=True)
    for name in _OWN_LOGGERS:
        logging.getLogger(name).setLevel(threshold)
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)  # RequestLog says more
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def _escape(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Keep a message on its line, for nobody to write lines of their own into a log."""
    text = str(event["event"])
    event["event"] = text if text.isprintable() else repr(text)[1:-1]
    return event
