"""Figures for operators, which Prometheus reads at ``GET /metrics``.

Labels have few values, whatever clients send: routes are templates, methods and reasons come from
lists. Every application has a registry of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, get_args

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response
from starlette.types import Scope

from mico_chat.engine.base import EngineStats
from mico_chat.errors import MediaError
from mico_chat.media.file import LimitName
from mico_chat.media.medium import MediaReport
from mico_chat.wire import Usage
from mico_server.http.guard import OPEN_PATHS

if TYPE_CHECKING:
    from mico_chat.encode import CacheStats

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
    (
        "time_to_first_token",
        "Seconds from the head of a request to the first token of its answer.",
    ),
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
)
_CACHE = (
    ("hits", "context_cache_hits", "Media whose encodings were in the cache."),
    ("misses", "context_cache_misses", "Media that had to be encoded."),
    ("entries", "context_cache_entries", "Media whose encodings are in the cache."),
    ("bytes", "context_cache_bytes", "Bytes of encodings in the cache."),
    ("max_bytes", "context_cache_max_bytes", "Most bytes of encodings that the cache may hold."),
)


class Metrics(Collector):
    """All counters of one application.

    ``engine`` and ``cache`` give the present counts at every scrape, None while no model is loaded.
    """

    def __init__(
        self,
        engine: Callable[[], EngineStats | None],
        cache: Callable[[], CacheStats | None],
    ) -> None:
        self._engine, self._cache = engine, cache
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
        method = scope["method"] if scope["method"] in _METHODS else "other"
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
