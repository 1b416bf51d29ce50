"""What operators see of the requests: a log line for each, and figures for Prometheus.

All lines that are logged while a request is answered have its id. Contents of messages and answers,
file names and keys are never logged; the id of a key is.

``GET /metrics`` has the figures. Their labels have few values, whatever clients send: routes are
templates, methods and reasons come from lists.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING, NamedTuple, get_args
from urllib.parse import quote

import prometheus_client as prometheus
import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars
from structlog.typing import EventDict, Processor, WrappedLogger

from mico_chat.engine.base import EngineStats
from mico_chat.errors import MediaError
from mico_chat.media.file import LimitName
from mico_chat.media.medium import MediaReport
from mico_chat.wire import Usage
from mico_server.http.auth import OPEN_PATHS, Caller

if TYPE_CHECKING:
    from mico_chat.encode import CacheStats

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# The pages /docs and /redoc start with a script that is part of the page.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; worker-src blob:; frame-ancestors 'none'"
)
"""A page of the service may load files of the service alone, and no other page may frame it."""


class RequestLog:
    """The outermost ASGI middleware: it logs and counts requests, and knows when all have ended.

    It must wrap ``app.build_middleware_stack()``: a framework's handler of crashes is outside of
    its middlewares. The id of a request is the client's ``X-Request-Id`` if that is harmless,
    otherwise a new one; the answer has it in the same header. An answer without a content policy of
    its own gets :data:`CONTENT_POLICY`. No browser may guess the type of an answer.
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
        if scope["type"] not in ("http", "websocket"):
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
            bytes_in += len(message.get("body") or message.get("text") or b"")
            gone = gone or (message["type"] == "http.disconnect" and not complete)
            return message

        async def labelled(message: Message) -> None:
            nonlocal status, bytes_out, complete
            kind = message["type"].removeprefix("websocket.")
            if kind in ("http.response.start", "accept"):
                status = message.get("status", 101)
                message.setdefault("headers", [])
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                headers.setdefault("content-security-policy", CONTENT_POLICY)
                headers.setdefault("x-content-type-options", "nosniff")
            elif kind in ("http.response.body", "send"):
                bytes_out += len(message.get("body") or message.get("text") or b"")
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
                        "method": scope.get("method", "GET"),
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


def configure_logging(level: str, format: str, stream: IO[str] | None = None) -> None:
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
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _without_private,
                *rendering,
            ],
        )
    )
    threshold = logging.getLevelNamesMapping()[level.upper()]
    handler.setLevel(threshold)  # also for loggers that have a level of their own
    logging.basicConfig(level=max(threshold, logging.WARNING), handlers=[handler], force=True)
    for name in ("mico_chat", "mico_server", "uvicorn"):
        logging.getLogger(name).setLevel(threshold)
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)  # RequestLog says more


def _without_private(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Leave out what libraries keep in records for themselves (Ray's ``_ray_timestamp_ns``)."""
    return {name: value for name, value in event.items() if not name.startswith("_")}


def _escape(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Keep a message on one line, so that nobody can write lines of their own into the log."""
    text = str(event["event"])
    event["event"] = text if text.isprintable() else repr(text)[1:-1]
    return event


# --- Figures ---

FAULTS = frozenset(
    {
        *("damaged", "empty", "killed", "limit", "missing", "unsupported", "unusable", "url"),
        *get_args(LimitName),
    }
)
"""The reasons for refusing a medium; a limit has the name of its setting."""

_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_REFUSED_BY_STATUS = {429: "busy", 503: "not_ready"}

# A name, its description, its labels.
_COUNTERS = (
    ("requests", "Requests.", "route", "method", "status"),
    ("refused_requests", "Requests refused before any work was done.", "reason"),
    ("prompt_tokens", "Tokens of prompts, those of media and cached ones included."),
    ("media_tokens", "Context tokens of media."),
    ("cached_tokens", "Tokens of prompts whose state was reused."),
    ("completion_tokens", "Tokens of answers."),
    ("media", "Media of answered requests.", "kind"),
    ("media_failures", "Media that were refused.", "reason"),
)
_HISTOGRAMS = (
    ("request_duration", "Seconds from the head of a request to the end of its answer.", "route"),
    ("time_to_first_token", "Seconds from the head of a request to its first token."),
    ("media_decode", "Seconds to decode one medium.", "kind"),
    ("media_encode", "Seconds to encode one medium.", "kind"),
)
# A field of the engine's or the cache's counts, the name of its metric, its description.
_ENGINE = (
    ("running", "engine_running_requests", "Requests being computed."),
    ("waiting", "engine_waiting_requests", "Requests waiting for a slot."),
    ("slots", "engine_slots", "Requests that can be computed at the same time."),
    ("cells_used", "engine_used_cells", "Tokens whose state is held."),
    ("cells", "engine_cells", "Tokens whose state can be held."),
    ("state_bytes", "engine_state_bytes", "Bytes of recurrent states that are held."),
)
_CACHE = (
    ("hits", "context_cache_hits", "Media whose encodings were in the cache."),
    ("misses", "context_cache_misses", "Media that had to be encoded."),
    ("entries", "context_cache_entries", "Media whose encodings are in the cache."),
    ("bytes", "context_cache_bytes", "Bytes of encodings in the cache."),
    ("max_bytes", "context_cache_max_bytes", "Most bytes of encodings that the cache may hold."),
)


# A field of ModelFigures, the name of its metric, its description.
_MODELS = (
    ("loaded", "model_loaded", "1 while the model is loaded, else 0."),
    ("bytes", "model_bytes", "Bytes that the loaded model counts with."),
    ("requests", "model_requests", "Requests that use the model."),
    ("loads", "model_loads", "How often the model was loaded."),
)


class ModelFigures(NamedTuple):
    """Counts of one of the served models."""

    name: str
    loaded: int
    bytes: int
    requests: int
    loads: int


class Metrics(Collector):
    """All counters of one application.

    ``engine`` and ``cache`` give the present counts of all loaded models together at every scrape,
    None while no model is loaded; ``models`` those of each served model.
    """

    def __init__(
        self,
        engine: Callable[[], EngineStats | None],
        cache: Callable[[], CacheStats | None],
        models: Callable[[], Sequence[ModelFigures]] = tuple,
    ) -> None:
        self._engine, self._cache, self._models = engine, cache, models
        self.registry = prometheus.CollectorRegistry()
        self._counters = {
            name: prometheus.Counter(f"mico_{name}", what, labels, registry=self.registry)
            for name, what, *labels in _COUNTERS
        }
        self._seconds = {
            name: prometheus.Histogram(
                f"mico_{name}_seconds", what, labels, registry=self.registry, buckets=_SECONDS
            )
            for name, what, *labels in _HISTOGRAMS
        }
        prometheus.ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def answered(self, usage: Usage, media: Sequence[MediaReport] = ()) -> None:
        for field in ("prompt_tokens", "media_tokens", "cached_tokens", "completion_tokens"):
            self._counters[field].inc(getattr(usage, field))
        for report in media:
            self._counters["media"].labels(report.kind).inc()
            times = {"media_decode": report.decode_ms, "media_encode": report.encode_ms}
            for name, ms in times.items():
                if ms is not None:
                    self._seconds[name].labels(report.kind).observe(ms / 1000)

    def failed(self, error: MediaError) -> None:
        # The fault comes from the decoder's process, which a hostile file may control.
        fault = error.fault if error.fault in FAULTS else "unusable"
        self._counters["media_failures"].labels(fault).inc()

    def first_token(self, seconds: float) -> None:
        self._seconds["time_to_first_token"].observe(seconds)

    def request(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = "unmatched" if route is None else route.path
        method = scope.get("method", "GET")
        method = method if method in _METHODS else "other"
        self._counters["requests"].labels(path, method, str(status)).inc()
        self._seconds["request_duration"].labels(path).observe(seconds)
        reason = scope.get("state", {}).get("refused") or _REFUSED_BY_STATUS.get(status)
        if reason is not None and scope["path"] not in OPEN_PATHS:
            self._counters["refused_requests"].labels(reason).inc()

    def response(self) -> Response:
        return Response(
            prometheus.generate_latest(self.registry),
            media_type=prometheus.CONTENT_TYPE_PLAIN_0_0_4,
        )

    def describe(self) -> tuple[Metric, ...]:
        return ()  # nothing can be read before a model is loaded

    def collect(self) -> Iterator[Metric]:
        for counts, figures in ((self._engine(), _ENGINE), (self._cache(), _CACHE)):
            for field, name, what in figures if counts is not None else ():
                counted = field in ("hits", "misses")
                family = CounterMetricFamily if counted else GaugeMetricFamily
                yield family(f"mico_{name}", what, value=getattr(counts, field))
        models = self._models()
        for field, name, what in _MODELS if models else ():
            family = CounterMetricFamily if field == "loads" else GaugeMetricFamily
            found = family(f"mico_{name}", what, labels=["model"])
            for one in models:
                found.add_metric([one.name], getattr(one, field))
            yield found
