"""Figures for operators, which Prometheus reads at ``GET /metrics``.

Labels have few values, whatever clients send: routes are templates, methods and reasons come from
lists. Every application has a registry of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, get_args

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response
from starlette.types import Scope

from mico_chat.engine import EngineStats
from mico_chat.errors import MediaError
from mico_chat.media.file import LimitName
from mico_chat.media.medium import MediaReport
from mico_chat.wire import Usage
from mico_server.http.auth import OPEN_PATHS

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

_ENGINE_GAUGES = {
    "running": ("engine_running_requests", "Requests being computed."),
    "waiting": ("engine_waiting_requests", "Requests waiting for a slot."),
    "slots": ("engine_slots", "Requests that can be computed at the same time."),
    "cells_used": ("engine_used_cells", "Tokens whose state is held."),
    "cells": ("engine_cells", "Tokens whose state can be held."),
}
_CACHE_COUNTERS = {
    "hits": ("context_cache_hits", "Media whose encodings were in the cache."),
    "misses": ("context_cache_misses", "Media that had to be encoded."),
}
_CACHE_GAUGES = {
    "entries": ("context_cache_entries", "Media whose encodings are in the cache."),
    "bytes": ("context_cache_bytes", "Bytes of encodings in the cache."),
    "max_bytes": ("context_cache_max_bytes", "Most bytes of encodings that the cache may hold."),
}


class Metrics:
    """All counters of one application; ``engine`` and ``cache`` are called at every scrape.

    Args:
        engine: gives the engine's counts, None while no model is loaded.
        cache: gives the counts of the cache of encoded media, None while no model is loaded.
    """

    def __init__(
        self,
        engine: Callable[[], EngineStats | None],
        cache: Callable[[], CacheStats | None],
    ) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"mico_{name}", what, labels, registry=registry)

        def histogram(name: str, what: str, *labels: str) -> Histogram:
            return Histogram(f"mico_{name}", what, labels, registry=registry, buckets=_SECONDS)

        self._requests = counter("requests", "Requests.", "route", "method", "status")
        self._duration = histogram(
            "request_duration_seconds",
            "Seconds from the head of a request to the end of its answer.",
            "route",
        )
        self._refused = counter(
            "refused_requests", "Requests refused before any work was done.", "reason"
        )
        self._first_token = histogram(
            "time_to_first_token_seconds",
            "Seconds from the head of a request to the first token of its answer.",
        )
        self._tokens = {
            field: counter(f"{field}_tokens", what)
            for field, what in (
                ("prompt", "Tokens of prompts, those of media and cached ones included."),
                ("media", "Context tokens of media."),
                ("cached", "Tokens of prompts whose state was reused."),
                ("completion", "Tokens of answers."),
            )
        }
        self._media = counter("media", "Media of answered requests.", "kind")
        self._decode = histogram("media_decode_seconds", "Seconds to decode one medium.", "kind")
        self._encode = histogram("media_encode_seconds", "Seconds to encode one medium.", "kind")
        self._failures = counter("media_failures", "Media that were refused.", "reason")
        ProcessCollector(registry=registry)
        registry.register(_Gauges(engine, cache))

    def answered(self, usage: Usage, media: Sequence[MediaReport] = ()) -> None:
        for field, tokens in self._tokens.items():
            tokens.inc(getattr(usage, f"{field}_tokens"))
        for report in media:
            self._media.labels(report.kind).inc()
            if report.decode_ms is not None:
                self._decode.labels(report.kind).observe(report.decode_ms / 1000)
            if report.encode_ms is not None:
                self._encode.labels(report.kind).observe(report.encode_ms / 1000)

    def failed(self, error: MediaError) -> None:
        # The fault comes from the decoder's process, which a hostile file may control.
        self._failures.labels(error.fault if error.fault in FAULTS else "unusable").inc()

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def request(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = "unmatched" if route is None else route.path
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.labels(path, method, str(status)).inc()
        self._duration.labels(path).observe(seconds)
        reason = scope.get("state", {}).get("refused") or _REFUSED_BY_STATUS.get(status)
        if reason is not None and scope["path"] not in OPEN_PATHS:
            self._refused.labels(reason).inc()

    def response(self) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


class _Gauges(Collector):
    def __init__(
        self,
        engine: Callable[[], EngineStats | None],
        cache: Callable[[], CacheStats | None],
    ) -> None:
        self._engine = engine
        self._cache = cache

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing can be read before a model is loaded

    def collect(self) -> Iterator[Metric]:
        engine, cache = self._engine(), self._cache()
        if engine is not None:
            for field, (name, what) in _ENGINE_GAUGES.items():
                yield GaugeMetricFamily(f"mico_{name}", what, value=getattr(engine, field))
        if cache is not None:
            for field, (name, what) in _CACHE_COUNTERS.items():
                yield CounterMetricFamily(f"mico_{name}", what, value=getattr(cache, field))
            for field, (name, what) in _CACHE_GAUGES.items():
                yield GaugeMetricFamily(f"mico_{name}", what, value=getattr(cache, field))
