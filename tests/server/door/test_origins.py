"""Other sites' pages, as browsers send their requests, in front of a real socket."""

from typing import Any

import httpx
import pytest
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from mico_chat.errors import ConfigError
from mico_server.http.auth import Auth, OriginGuard, cors_options
from mico_server.store.keys import KeyStore
from tests.server.door.test_auth import FakeKeys, alice
from tests.server.support.running import Echo, error_of, exchange, live


def asked(
    client: httpx.Client, path: str = "/v1/chat", method: str = "POST", **headers: Any
) -> httpx.Response:
    lines = [f"{method} {path} HTTP/1.1", "Connection: close", "Content-Length: 0"]
    for name, values in headers.items():
        for value in values if isinstance(values, list) else [values]:
            lines.append(f"{name}: {value.replace('{port}', str(client.base_url.port))}")
    return exchange(client, "\r\n".join([*lines, "", ""]).encode())


def guarded(*origins: str, keys: KeyStore | None = None, loopback: bool = True) -> ASGIApp:
    guard = OriginGuard(Echo(), loopback=loopback, cors_origins=origins)
    return Auth(guard, keys or FakeKeys(), required=False)


@pytest.fixture(scope="module")
def client() -> Any:
    with live(guarded("https://Friend.example/")) as started:
        yield started


def test_hosts_of_this_machine(client: httpx.Client) -> None:
    for host in (
        *("localhost:{port}", "LOCALHOST:{port}", "localhost.:{port}", "127.0.0.1"),
        *("[::1]:{port}", "[::ffff:127.0.0.1]", "friend.example"),
    ):
        assert asked(client, host=host).status_code == 200, host


def test_hosts_that_are_made_to_lead_here(client: httpx.Client) -> None:
    """DNS rebinding: the browser believes it is still at the other site, and sends no Origin."""
    for host in (
        *("evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "[::]"),
        *("evil.example@127.0.0.1", "127.0.0.1@evil.example", "192.168.1.2", "0.0.0.0"),
        *("", ":{port}", "[::1", "localhost:x", "friend.example.evil", "2130706433"),
        *("127.0.0.1/evil.example", "evil.example/127.0.0.1", "localhost,evil.example"),
    ):
        answer = asked(client, host=host)
        assert (answer.status_code, error_of(answer)["code"]) == (403, "forbidden_host"), host
        assert "MICO_SERVER_CORS_ORIGINS" in answer.text
        assert "mico-chat keys create" in answer.text
    assert asked(client, method="GET", host="evil.example").status_code == 403


def test_a_host_is_named_once(client: httpx.Client) -> None:
    for hosts in (["localhost", "evil.example"], ["evil.example", "localhost"], []):
        assert asked(client, host=hosts).status_code >= 400


def test_origins_that_may_call(client: httpx.Client) -> None:
    for origin, host in (
        ("http://LOCALHOST:{port}", "localhost:{port}"),
        ("http://[::1]:{port}", "[::1]:{port}"),
        ("http://localhost", "localhost:80"),
        ("https://localhost", "localhost"),  # behind a proxy that ends TLS
        ("https://localhost:443", "localhost"),
        ("HTTPS://friend.EXAMPLE", "localhost:{port}"),
    ):
        assert asked(client, host=host, origin=origin).status_code == 200, origin


FOREIGN = [
    *("https://evil.example", "http://evil.example:{port}", "null", "", "file://", "about:blank"),
    *("http://localhost", "http://localhost:1", "http://127.0.0.1:{port}", "http://localhost.evil"),
    *("https://localhost:{port}@evil.example", "http://x@localhost:{port}", "http://[::1"),
    *("https://friend.example.evil", "http://friend.example", "https://friend.example:8443"),
    *("https://a.friend.example", "chrome-extension://abcdef", "localhost:{port}", "*"),
]


def test_origins_that_may_not(client: httpx.Client) -> None:
    for origin in FOREIGN:
        answer = asked(client, host="localhost:{port}", origin=origin)
        assert (answer.status_code, error_of(answer)["code"]) == (403, "forbidden_origin"), origin
        assert "MICO_SERVER_CORS_ORIGINS" in answer.text
        assert "access-control-allow-origin" not in answer.headers


def test_one_good_origin_does_not_help_another(client: httpx.Client) -> None:
    origins = ["https://friend.example", "https://evil.example"]
    for sent in (origins, origins[::-1]):
        assert asked(client, host="localhost:{port}", origin=sent).status_code == 403


def test_health_is_told_to_any_host(client: httpx.Client) -> None:
    assert asked(client, path="/health/live", method="GET", host="balancer").status_code == 200


@pytest.mark.parametrize(
    ("loopback", "keys", "sent"),
    [
        (True, alice(), {"authorization": "Bearer alice"}),
        (False, FakeKeys(), {}),
        (False, alice(), {"authorization": "Bearer alice"}),
    ],
)
def test_with_a_key_or_elsewhere_any_host_but_not_any_origin(
    loopback: bool, keys: FakeKeys, sent: dict[str, str]
) -> None:
    own = "https://chat.example.org"
    with live(guarded(keys=keys, loopback=loopback)) as client:
        for host, origins, status in (
            ("chat.example.org", [], 200),
            ("chat.example.org", [own], 200),
            ("chat.example.org:443", [own], 200),
            *(
                ("chat.example.org", [origin], 403)
                for origin in ("https://evil.example", "null", f"{own}:8443", f"{own}.evil")
            ),
        ):
            assert asked(client, host=host, origin=origins, **sent).status_code == status, origins


def test_any_origin_if_the_operator_says_so() -> None:
    with live(guarded("*")) as client:
        evil = "https://evil.example"
        assert asked(client, host="localhost", origin=evil).status_code == 200
        assert asked(client, host="evil.example").status_code == 403


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


def test_a_friendly_page_with_a_key() -> None:
    """What a browser does for a page: it asks, then posts with the key, then shows the answer."""
    page = {"origin": "https://friend.example"}
    origins = ("https://friend.example/",)
    app = CORSMiddleware(guarded(*origins, keys=alice()), **cors_options(origins))
    with live(app) as client:
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
