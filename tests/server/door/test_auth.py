"""Keys at the door, over real HTTP in front of an application that tells who came in."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from mico_chat.errors import ConfigError
from mico_server.errors import NotReadyError
from mico_server.http.auth import Auth, check_binding
from mico_server.store.keys import Key, KeyStore
from mico_server.store.tables import now
from tests.server.support.running import Echo, error_of, exchange, live

LOCAL = {"tenant": "local", "key_id": None, "rate_limit": None, "scopes": ["chat", "metrics"]}
ALICE = {"tenant": "team", "key_id": "key-alice", "rate_limit": "2/minute", "scopes": ["chat"]}
OURS = "ours-" + "x" * 43


def fake_key(id_: str, tenant: str, rate_limit: str | None = None, *scopes: str) -> Key:
    return Key(id_, "name", tenant, rate_limit, frozenset(scopes or ("chat",)), now(), None)


class FakeKeys(KeyStore):
    def __init__(self, **keys: Key) -> None:
        self.keys = keys
        self.asked: list[str] = []

    async def find(self, secret: str) -> Key | None:
        self.asked.append(secret)
        return self.keys.get(secret)

    async def any(self) -> bool:
        self.asked.append("any")
        return bool(self.keys)


def alice(*scopes: str) -> FakeKeys:
    return FakeKeys(alice=fake_key("key-alice", "team", "2/minute", *scopes))


Start = Callable[..., httpx.Client]


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def start(echo: Echo) -> Iterator[Start]:
    with ExitStack() as stack:
        yield lambda keys, **options: stack.enter_context(live(Auth(echo, keys, **options)))


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def caller(response: httpx.Response) -> Any:
    assert response.status_code == 200
    return response.json()["caller"]


def test_a_key_may_come_as_x_api_key(start: Start, echo: Echo) -> None:
    client = start(alice(), required=True)
    assert client.get("/a", headers={"x-api-key": "alice"}).status_code == 200
    for wrong in ("nobody", ""):
        assert client.get("/a", headers={"x-api-key": wrong}).status_code == 401
    both = {"x-api-key": "alice", "authorization": "Bearer nobody"}
    assert client.get("/a", headers=both).status_code == 401


@pytest.mark.parametrize(
    ("code", "values", "said"),
    [
        ("missing_api_key", [[], [""]], "none was sent"),
        (
            "invalid_api_key",
            [
                *(["Bearer"], ["Bearer wrong"], ["Bearer alice bob"], ["Bearer Alice"]),
                *(["Basic YWxpY2U6"], ["Bearer wrong", "Bearer alice"], [f"Bearer {OURS}"]),
            ],
            "is not valid",
        ),
    ],
)
def test_wrong_keys_are_all_refused_alike_but_told_from_none(
    start: Start, echo: Echo, code: str, values: list[list[str]], said: str
) -> None:
    client = start(alice(), required=True)
    answers = set()
    for given in values:
        headers = [("authorization", value) for value in given]
        response = client.post("/v1/chat", content=b"x" * 5000, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        answers.add(response.content)
        error = error_of(response)
        assert (error["code"], error["type"]) == (code, "invalid_request_error")
        assert "mico-chat keys create" in error["message"]
        assert said in error["message"]
    assert len(answers) == 1
    assert echo.requests == 0


def test_a_good_key(start: Start) -> None:
    client = start(alice(), required=True)
    for scheme in ("Bearer", "BEARER", "Bearer "):
        headers = {"authorization": f"{scheme} alice"}
        response = client.post("/v1/chat", content=b"x" * 5000, headers=headers)
        assert caller(response) == ALICE
        assert response.json()["body"] == 5000


def test_one_look_up_a_request_and_none_is_remembered(start: Start) -> None:
    keys = alice()
    client = start(keys, required=False)
    caller(client.get("/a", headers=bearer("alice")))
    keys.asked.clear()
    assert caller(client.get("/a", headers=bearer("alice"))) == ALICE
    assert keys.asked == ["alice"]
    keys.keys = {"bob": keys.keys["alice"]}  # revoked
    assert client.get("/a", headers=bearer("alice")).status_code == 401


def test_health_alone_needs_no_key(start: Start, echo: Echo) -> None:
    client = start(alice(), required=True)
    for path in (
        *("/", "/metrics", "/docs", "/openapi.json", "/v1/models", "/health", "/health/live/"),
        *("/health/live/../../v1/models", "//health/live", "/HEALTH/LIVE", "/health/live%2f"),
        *("/health/live;a", "/v1/models?/health/live"),
    ):
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert exchange(client, head.encode()).status_code == 401, path
    assert echo.requests == 0
    for path in ("/health/live", "/health/ready"):
        assert caller(client.get(path)) is None
        assert caller(client.get(path, headers=bearer("wrong"))) is None


def test_a_preflight_has_no_key(start: Start) -> None:
    client = start(alice(), required=True)
    asks = {"access-control-request-method": "POST", "origin": "https://example.org"}
    assert caller(client.options("/v1/chat", headers=asks)) is None
    assert client.options("/v1/chat").status_code == 401
    assert client.post("/v1/chat", headers=asks).status_code == 401


def test_open_until_the_first_key_is_made(start: Start) -> None:
    keys = FakeKeys()
    client = start(keys, required=False)
    assert caller(client.get("/a")) == LOCAL
    # Clients that cannot do without a key send one that means nothing.
    for given in ("Bearer none", "Bearer", "Basic x"):
        assert caller(client.get("/a", headers={"authorization": given})) == LOCAL
    keys.keys["alice"] = fake_key("key-alice", "team", "2/minute")
    assert client.get("/a").status_code == 401
    assert caller(client.get("/a", headers=bearer("alice"))) == ALICE
    keys.keys.clear()  # the last one is revoked
    assert caller(client.get("/a")) == LOCAL
    assert caller(client.get("/a", headers=bearer("alice"))) == LOCAL
    required = start(keys, required=True)
    for headers in ({}, bearer("alice")):
        assert required.get("/a", headers=headers).status_code == 401


def test_the_program_that_started_the_service_needs_no_key(start: Start) -> None:
    client = start(alice(), required=False, local_secret=OURS)
    assert caller(client.get("/a", headers=bearer(OURS))) == LOCAL
    user = {**bearer(OURS), "x-mico-user": "anna"}
    assert caller(client.get("/a", headers=user))["tenant"] == "local/anna"
    assert caller(client.get("/a", headers=bearer("alice"))) == ALICE
    for wrong in (OURS[:-1], OURS + "x", OURS.upper()):
        assert client.get("/a", headers=bearer(wrong)).status_code == 401
    assert client.get("/v1/keys", headers=bearer(OURS)).status_code == 403
    required = start(alice(), required=True, local_secret=OURS)
    assert required.get("/a", headers=bearer(OURS)).status_code == 401


@pytest.mark.parametrize("keys", [FakeKeys(), alice()])
@pytest.mark.parametrize("insecure", [False, True])
def test_who_asks_for_others_can_ask_for_a_key(
    start: Start, keys: FakeKeys, insecure: bool
) -> None:
    """A page that other machines reach, in front of a service that only this one does."""
    client = start(keys, required=False, insecure=insecure, local_secret=OURS)
    passed_on = {"x-mico-require-key": "1"}
    for given in ({}, bearer("made-up"), bearer(OURS)):
        assert client.get("/a", headers={**passed_on, **given}).status_code == 401
    if keys.keys:
        assert caller(client.get("/a", headers={**passed_on, **bearer("alice")})) == ALICE


PATHS = {
    "chat": ["/", "/v1/chat", "/v1/models", "/docs", "/openapi.json", "/v1/media/a"],
    "metrics": ["/metrics", "/metrics/", "/metrics%0a"],
    "admin": ["/v1/keys", "/v1/keys/", "/v1/keys/key-1", "/v1/keys%0A", "/v1/%6beys"],
}


@pytest.mark.parametrize("scope", sorted(PATHS))
def test_a_key_opens_what_its_scopes_name(start: Start, scope: str) -> None:
    keys = FakeKeys(
        one=fake_key("key-one", "team", None, scope),
        all=fake_key("key-all", "team", None, *PATHS),
    )
    client = start(keys, required=True)
    for needed, paths in PATHS.items():
        for path in paths:
            assert client.get(path, headers=bearer("all")).status_code == 200
            response = client.get(path, headers=bearer("one"))
            assert response.status_code == (200 if needed == scope else 403), path
            if needed != scope:
                error = error_of(response)
                assert error["code"] == "insufficient_scope"
                assert f"needs a key of the scope '{needed}'" in error["message"]
                assert f"keys create NAME --scope {needed}" in error["message"]
                assert f'scope="{needed}"' in response.headers["www-authenticate"]


@pytest.mark.parametrize(
    ("asked", "opening"),
    [
        *((f"GET /v1/batches{rest}", {"chat", "admin"}) for rest in ("", "/batch-1", "?limit=1")),
        ("POST /v1/batches/batch-1/cancel", {"chat", "admin"}),
        *(
            (f"POST /v1/batches{rest}", {"chat"})
            for rest in ("", "/", "/a", "/a/b/cancel", "/a/cancel/")
        ),
        *((f"GET /v1/{rest}", {"chat"}) for rest in ("batchesx", "batches/a/b", "files/batches")),
        ("GET //v1/batches", {"chat"}),
        ("DELETE /v1/batches/batch-1", {"chat"}),
    ],
)
def test_admins_see_and_cancel_batches(start: Start, asked: str, opening: set[str]) -> None:
    keys = FakeKeys(**{scope: fake_key("key", "team", None, scope) for scope in PATHS})
    client = start(keys, required=True)
    method, path = asked.split()
    for scope in PATHS:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        response = exchange(client, f"{head}Authorization: Bearer {scope}\r\n\r\n".encode())
        assert response.status_code == (200 if scope in opening else 403), scope


def test_insecure_takes_anyone_but_no_wrong_key(start: Start) -> None:
    client = start(alice(), required=False, insecure=True)
    assert caller(client.get("/a")) == LOCAL
    assert caller(client.get("/a", headers=bearer("alice"))) == ALICE
    assert client.get("/a", headers=bearer("wrong")).status_code == 401


def test_required_and_insecure_contradict_each_other() -> None:
    with pytest.raises(ConfigError):
        Auth(Echo(), FakeKeys(), required=True, insecure=True)


def test_keys_that_cannot_be_looked_up_let_nobody_in(start: Start, echo: Echo) -> None:
    class Broken(FakeKeys):
        async def find(self, secret: str) -> Key | None:
            raise NotReadyError("the database does not answer; try again soon")

    client = start(Broken(), required=True)
    response = client.get("/a", headers=bearer("alice"))
    assert (response.status_code, error_of(response)["code"]) == (503, "not_ready_error")
    assert echo.requests == 0


def test_a_long_body_is_not_waited_for(start: Start) -> None:
    client = start(alice(), required=True)
    head = b"POST /v1/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n"
    response = exchange(client, head)  # nothing of the body is ever sent
    assert (response.status_code, response.headers["connection"]) == (401, "close")


def test_only_loopback_needs_no_key() -> None:
    for host in ("localhost", "LocalHost", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        check_binding(host, insecure=False, has_keys=False)
    for host in ("0.0.0.0", "::", "", "192.168.1.2", "gpu-box", "localhost.example.org", "127.1"):
        with pytest.raises(ConfigError, match=r"mico-chat keys create .*--insecure"):
            check_binding(host, insecure=False, has_keys=False)
        check_binding(host, insecure=True, has_keys=False)
        check_binding(host, insecure=False, has_keys=True)


def test_a_person_has_one_tenant_and_of_people_unknown_each_browser(start: Start) -> None:
    adopted: list[str] = []

    async def adopt(tenant: str) -> None:
        adopted.append(tenant)

    b, home, remote = {"x-mico-browser": "b-1"}, {"x-mico-home": "1"}, {"x-mico-user": "anna"}
    here = start(alice(), required=False, local_secret=OURS, loopback=True, adopt=adopt)
    there = start(FakeKeys(), required=False, adopt=adopt)
    cases: list[tuple[httpx.Client, dict[str, str], str]] = [
        (here, {**bearer("alice"), **b}, "team"),
        (here, {**bearer("alice"), **b, **home}, "team"),
        (here, {**bearer(OURS), **b, **home}, "local"),
        (here, {**bearer(OURS), **home}, "local"),
        (here, {**bearer(OURS), **b}, "local/page-b-1"),
        (here, {**bearer(OURS), **b, **home, **remote}, "local/anna"),
        (there, {**b, **home}, "local/page-b-1"),  # other machines reach this service
        (there, {**bearer("made-up"), **b}, "local/page-b-1"),
        (there, home, "local"),
    ]
    for client, headers, tenant in cases:
        assert caller(client.get("/a", headers=headers))["tenant"] == tenant, headers
    once = ["team", "local", "local/page-b-1"]  # by each of the services
    assert adopted == [*once, "local/page-b-1"]
    for wrong in ("", "a/b", "x" * 65):
        refused = here.get("/a", headers={**bearer(OURS), "x-mico-browser": wrong})
        assert (refused.status_code, error_of(refused)["param"]) == (400, "x-mico-browser")
