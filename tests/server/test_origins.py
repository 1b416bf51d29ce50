"""Other sites' pages, as browsers send their requests, in front of a real socket."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from mico_chat.errors import ConfigError
from mico_server.http.auth import Auth, Caller, OriginGuard, cors_options
from tests.server.live import Echo, live
from tests.server.test_auth import FakeKeys, alice


class As:
    """Lets everyone in as one caller, as the authentication would."""

    def __init__(self, app: ASGIApp, key_id: str | None) -> None:
        self.app = app
        self.key_id = key_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["caller"] = Caller("tenant", self.key_id)
        await self.app(scope, receive, send)


def asked(
    client: httpx.Client, path: str = "/v1/chat", method: str = "POST", **headers: Any
) -> tuple[int, str]:
    port = client.base_url.port
    lines = [f"{method} {path} HTTP/1.1", "Connection: close", "Content-Length: 0"]
    for name, values in headers.items():
        for value in values if isinstance(values, list) else [values]:
            lines.append(f"{name}: {value.replace('{port}', str(port))}")
    with socket.create_connection((client.base_url.host, port or 80)) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return int(answer.split(b" ")[1]), answer.decode()


@pytest.fixture(scope="module")
def client() -> Any:
    guard = OriginGuard(Echo(), loopback=True, cors_origins=("https://Friend.example/",))
    with live(As(guard, None)) as started:
        yield started


def test_hosts_of_this_machine(client: httpx.Client) -> None:
    for host in (
        *("localhost:{port}", "LOCALHOST:{port}", "localhost.:{port}", "127.0.0.1"),
        *("[::1]:{port}", "[::ffff:127.0.0.1]", "friend.example"),
    ):
        assert asked(client, host=host)[0] == 200, host


def test_hosts_that_are_made_to_lead_here(client: httpx.Client) -> None:
    """DNS rebinding: the browser believes it is still at the other site, and sends no Origin."""
    for host in (
        *("evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "[::]"),
        *("evil.example@127.0.0.1", "127.0.0.1@evil.example", "192.168.1.2", "0.0.0.0"),
        *("", ":{port}", "[::1", "localhost:x", "friend.example.evil", "2130706433"),
        *("127.0.0.1/evil.example", "evil.example/127.0.0.1", "localhost,evil.example"),
    ):
        status, answer = asked(client, host=host)
        assert (status, "forbidden_host" in answer) == (403, True), host
        assert "MICO_SERVER_CORS_ORIGINS" in answer
        assert "mico-chat keys create" in answer
    assert asked(client, method="GET", host="evil.example")[0] == 403


def test_a_host_is_named_once(client: httpx.Client) -> None:
    assert asked(client, host=["localhost", "evil.example"])[0] >= 400
    assert asked(client, host=["evil.example", "localhost"])[0] >= 400
    assert asked(client)[0] >= 400


def test_origins_that_may_call(client: httpx.Client) -> None:
    for origin, host in (
        ("http://LOCALHOST:{port}", "localhost:{port}"),
        ("http://[::1]:{port}", "[::1]:{port}"),
        ("http://localhost", "localhost:80"),
        ("https://localhost", "localhost"),  # behind a proxy that ends TLS
        ("https://localhost:443", "localhost"),
        ("HTTPS://friend.EXAMPLE", "localhost:{port}"),
    ):
        assert asked(client, host=host, origin=origin)[0] == 200, origin


FOREIGN = [
    *("https://evil.example", "http://evil.example:{port}", "null", "", "file://", "about:blank"),
    *("http://localhost", "http://localhost:1", "http://127.0.0.1:{port}", "http://localhost.evil"),
    *("https://localhost:{port}@evil.example", "http://x@localhost:{port}", "http://[::1"),
    *("https://friend.example.evil", "http://friend.example", "https://friend.example:8443"),
    *("https://a.friend.example", "chrome-extension://abcdef", "localhost:{port}", "*"),
]


def test_origins_that_may_not(client: httpx.Client) -> None:
    for origin in FOREIGN:
        status, answer = asked(client, host="localhost:{port}", origin=origin)
        assert (status, "forbidden_origin" in answer) == (403, True), origin
        assert "MICO_SERVER_CORS_ORIGINS" in answer
        assert "access-control-allow-origin" not in answer.lower()


def test_one_good_origin_does_not_help_another(client: httpx.Client) -> None:
    origins = ["https://friend.example", "https://evil.example"]
    assert asked(client, host="localhost:{port}", origin=origins)[0] == 403
    assert asked(client, host="localhost:{port}", origin=origins[::-1])[0] == 403


def test_health_is_told_to_any_host(client: httpx.Client) -> None:
    assert asked(client, path="/health/live", method="GET", host="balancer")[0] == 200


@pytest.mark.parametrize(("loopback", "key_id"), [(True, "key-1"), (False, None), (False, "key-1")])
def test_with_a_key_or_elsewhere_any_host_but_not_any_origin(
    loopback: bool, key_id: str | None
) -> None:
    with live(As(OriginGuard(Echo(), loopback=loopback), key_id)) as client:
        assert asked(client, host="chat.example.org")[0] == 200
        own = "https://chat.example.org"
        assert asked(client, host="chat.example.org", origin=own)[0] == 200
        assert asked(client, host="chat.example.org:443", origin=own)[0] == 200
        for origin in ("https://evil.example", "null", f"{own}:8443", f"{own}.evil"):
            assert asked(client, host="chat.example.org", origin=origin)[0] == 403


def test_any_origin_if_the_operator_says_so() -> None:
    guard = OriginGuard(Echo(), loopback=True, cors_origins=("*",))
    with live(As(guard, None)) as client:
        assert asked(client, host="localhost", origin="https://evil.example")[0] == 200
        assert asked(client, host="evil.example")[0] == 403


@pytest.mark.parametrize(
    "origin",
    [
        *("example.org", "https://", "https://example.org/path", "https://me@example.org"),
        *("https://example.org:x", "https://*.example.org/?a", "", "//example.org"),
    ],
)
def test_settings_that_are_no_origin(origin: str) -> None:
    with pytest.raises(ConfigError, match="MICO_SERVER_CORS_ORIGINS"):
        OriginGuard(Echo(), loopback=True, cors_origins=(origin,))


def guarded(keys: FakeKeys, *origins: str) -> ASGIApp:
    guard = OriginGuard(Echo(), loopback=True, cors_origins=origins)
    return CORSMiddleware(Auth(guard, keys, required=False), **cors_options(origins))


def test_a_friendly_page_with_a_key() -> None:
    """What a browser does for a page: it asks, then posts with the key, then shows the answer."""
    page = {"origin": "https://friend.example"}
    with live(guarded(alice(), "https://friend.example/")) as client:
        asks = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, content-type, x-stainless-os",
        }
        preflight = client.options("/v1/chat", headers={**page, **asks})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == page["origin"]
        assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
        good = client.post("/v1/chat", headers={**page, "authorization": "Bearer alice"})
        refused = client.post("/v1/chat", headers=page)
        assert [good.status_code, refused.status_code] == [200, 401]
        for response in (good, refused):  # the page may read both
            assert response.headers["access-control-allow-origin"] == page["origin"]
            assert "access-control-allow-credentials" not in response.headers
        evil = {"origin": "https://evil.example"}
        assert client.options("/v1/chat", headers={**evil, **asks}).status_code == 400
        answer = client.post("/v1/chat", headers={**evil, "authorization": "Bearer alice"})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
