"""Metrics as Prometheus reads them: its own parser, over real HTTP."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from prometheus_client.parser import text_string_to_metric_families

from mico_chat.encode import CacheStats
from mico_chat.engine.base import EngineStats
from mico_chat.errors import LimitError, MediaError, MissingFileError
from mico_chat.media import MediaLimits
from mico_chat.media.medium import MediaReport
from mico_chat.wire import Usage
from mico_server.errors import BusyError, FetchError
from mico_server.http.auth import Auth
from mico_server.http.errors import add_error_handlers
from mico_server.http.limits import BodyLimit
from mico_server.http.request_log import Metrics, RequestLog
from mico_server.settings import ServerSettings
from tests.server.door.test_auth import alice, bearer
from tests.server.support.running import live

ENGINE = EngineStats.model_validate(
    dict.fromkeys(EngineStats.model_fields, 0)
    | {"running": 1, "waiting": 2, "slots": 16, "cells_used": 300, "cells": 4096}
)
CACHE = CacheStats(hits=5, misses=6, entries=7, bytes=800, max_bytes=9000)


def metrics() -> Metrics:
    return Metrics(lambda: ENGINE, lambda: CACHE)


def samples(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def of(metrics: Metrics) -> dict[str, float]:
    return samples(bytes(metrics.response().body).decode())


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    app, counted = FastAPI(), metrics()
    app.add_middleware(BodyLimit, settings=ServerSettings(max_body_bytes=100, max_json_bytes=10))
    app.add_middleware(Auth, keys=alice("chat", "metrics"), required=True)
    add_error_handlers(app)
    app.get("/metrics")(counted.response)
    router = APIRouter()

    @router.get("/v1/media/{media_id}")
    def medium(media_id: str) -> str:
        if media_id == "gone":
            raise HTTPException(404)
        return media_id

    @router.post("/v1/chat")
    def chat(what: dict[str, str]) -> None:
        raise BusyError("too many")

    app.include_router(router)
    app.middleware_stack = RequestLog(app.build_middleware_stack(), counted)
    with live(app) as started:
        started.headers.update(bearer("alice"))
        yield started


def test_requests_by_route_and_status(client: httpx.Client) -> None:
    for path in ("/v1/media/a", "/v1/media/b", "/v1/media/gone", "/v1/nothing", "/" + "x" * 300):
        client.get(path)
    client.post("/v1/media/a")
    client.request("PROPFIND", "/v1/media/a")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(response.text)
    requests = {
        name: value for name, value in found.items() if name.startswith("mico_requests_total")
    }
    template = "route=/v1/media/{media_id}"
    assert requests == {
        f"mico_requests_total{{method=GET,{template},status=200}}": 2,
        f"mico_requests_total{{method=GET,{template},status=404}}": 1,
        f"mico_requests_total{{method=POST,{template},status=405}}": 1,
        f"mico_requests_total{{method=other,{template},status=405}}": 1,
        "mico_requests_total{method=GET,route=unmatched,status=404}": 2,
    }
    assert found[f"mico_request_duration_seconds_count{{{template}}}"] == 5


def test_refused_requests_by_reason(client: httpx.Client) -> None:
    assert client.get("/v1/media/a", headers=bearer("wrong")).status_code == 401
    assert client.post("/v1/chat", content=b"x" * 11).status_code == 413
    assert client.post("/v1/chat", content=iter([b"x" * 11])).status_code == 413
    headers = {"content-type": "application/json"}
    assert client.post("/v1/chat", content=b'{"b":""}', headers=headers).status_code == 429
    found = samples(client.get("/metrics").text)
    assert found["mico_refused_requests_total{reason=auth}"] == 1
    assert found["mico_refused_requests_total{reason=body}"] == 2
    assert found["mico_refused_requests_total{reason=busy}"] == 1


def test_a_busy_service_is_told_from_a_key_past_its_limit() -> None:
    counted = metrics()
    scope: dict[str, Any] = {"path": "/a", "method": "GET", "type": "http"}
    counted.request({**scope}, 429, 0.1)
    counted.request({**scope, "state": {"refused": "rate_limit"}}, 429, 0.1)
    counted.request({**scope}, 503, 0.1)
    counted.request({**scope, "path": "/health/ready"}, 503, 0.1)
    found = of(counted)
    for reason in ("busy", "rate_limit", "not_ready"):
        assert found[f"mico_refused_requests_total{{reason={reason}}}"] == 1


def test_what_an_answer_took() -> None:
    counted = metrics()
    usage = Usage(prompt_tokens=100, completion_tokens=20, media_tokens=64, cached_tokens=10)
    media = [
        MediaReport(name="a", kind="image", decode_ms=20.0),
        MediaReport(name="b", kind="image"),
        MediaReport(name="c", kind="video", decode_ms=1500.0),
    ]
    counted.answered(usage, media)
    counted.answered(usage)
    counted.first_token(0.2)
    found = of(counted)
    tokens = {name: found[f"mico_{name}_tokens_total"] for name in ("prompt", "media", "cached")}
    assert tokens == {"prompt": 200, "media": 128, "cached": 20}
    assert found["mico_completion_tokens_total"] == 40
    assert found["mico_media_total{kind=image}"] == 2
    assert found["mico_media_decode_seconds_sum{kind=image}"] == pytest.approx(0.02)
    assert found["mico_media_decode_seconds_count{kind=image}"] == 1
    assert found["mico_media_decode_seconds_sum{kind=video}"] == pytest.approx(1.5)
    assert found["mico_time_to_first_token_seconds_bucket{le=0.25}"] == 1
    assert found["mico_time_to_first_token_seconds_bucket{le=0.1}"] == 0


def test_the_engine_and_the_cache_as_they_are_when_asked() -> None:
    loading = of(Metrics(lambda: None, lambda: None))
    assert not [name for name in loading if "engine" in name or "context_cache" in name]
    found = of(metrics())
    figures = {
        **{"engine_running_requests": 1, "engine_waiting_requests": 2, "engine_slots": 16},
        **{"engine_used_cells": 300, "engine_cells": 4096, "context_cache_hits_total": 5},
        **{"context_cache_misses_total": 6, "context_cache_entries": 7},
        **{"context_cache_bytes": 800, "context_cache_max_bytes": 9000},
    }
    assert {name: found[f"mico_{name}"] for name in figures} == figures


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MissingFileError("damaged.png"), "missing"),
        (FetchError("url", "answered with status 404"), "url"),
        (MediaError("a", "words", "killed"), "killed"),
        (MediaError("a", "words", "whatever a decoder's process says"), "unusable"),
        (LimitError("messages", "words"), "limit"),
        (MediaLimits().out_of_time("a").named("b"), "timeout_s"),
        (MediaLimits().exceeded("a", "memory_mb", "more"), "memory_mb"),
    ],
)
def test_reasons_are_from_a_list(error: MediaError, reason: str) -> None:
    counted = metrics()
    counted.failed(error)
    assert of(counted)[f"mico_media_failures_total{{reason={reason}}}"] == 1
