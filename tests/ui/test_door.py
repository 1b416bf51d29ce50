"""What the page lets in: its own requests alone, and what they may bring and fetch."""

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message
from starlette.websockets import WebSocketDisconnect

from mico_chat.errors import ConfigError
from mico_ui import routes
from mico_ui.browser import door
from mico_ui.browser.app import create_app
from mico_ui.browser.cards import MediaDesk, Previewer
from mico_ui.browser.door import CALL, UPLOAD
from mico_ui.browser.page import Page
from mico_ui.browser.talk import IN_PROTOCOL
from mico_ui.browser.turns import ENDED, Answers, PageQuestion
from mico_ui.browser.visitor import Access, Visitor
from mico_ui.client import Client
from tests.server.support.running import new_key
from tests.ui.conftest import EXAMPLES
from tests.ui.test_page import ME

SITE = "http://127.0.0.1:7860"
TALKS = "ws://127.0.0.1:7860/talk"
AS_ME = {"origin": SITE, "x-mico-user": ME["user"]}
SECRET = b"nobody may read this"
FORM = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n%s\r\n--b--\r\n'
TYPE = {"content-type": "multipart/form-data; boundary=b"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def page(client: Client, **binding: Any) -> TestClient:
    async def made() -> Any:  # without a loop that runs, Gradio makes one and does not close it
        return create_app(client.api, **binding)

    return TestClient(asyncio.run(made()), SITE)


@pytest.fixture
def browser(client: Client, folder: Path) -> Iterator[TestClient]:
    with page(client) as browser:
        yield browser


def call(browser: TestClient, name: str, /, **sent: Any) -> Any:
    id_ = re.search(r"mico\.serverOf\((\d+)\), \{", browser.get("/").text)
    data = {"profile": ME, **sent.pop("data", {})}
    body = {"data": data, "fn_name": name, "session_hash": "a", "component_id": int(id_[1])}  # type: ignore[index]
    return browser.post(CALL, **{"json": body, **sent})


def upload(browser: TestClient, content: bytes = b"abc", user: str = "", key: str = "") -> Any:
    headers = {**AS_ME, "x-mico-key": quote(key), **({"x-mico-user": user} if user else {})}
    return browser.post(UPLOAD, files={"files": content}, headers=headers)


def stored(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def _nothing() -> Message:
    return {"type": "http.request"}


async def asked(
    app: ASGIApp, path: str, receive: Callable[[], Any] = _nothing, **headers: str
) -> tuple[int, bytes]:
    """The answer to a path as it is written, which HTTP clients would tidy up."""
    sent = [(k.encode(), v.encode()) for k, v in {"host": SITE[7:], **headers}.items()]
    scope: dict[str, Any] = {"type": "http", "method": "GET" if receive is _nothing else "POST"}
    scope |= {"path": unquote(path), "raw_path": path.encode(), "client": ("127.0.0.1", 1)}
    scope |= {"headers": sent, "query_string": b"", "root_path": "", "http_version": "1.1"}
    answers: list[Message] = []

    async def send(message: Message) -> None:
        answers.append(message)

    await app({**scope, "scheme": "http", "server": None}, receive, send)
    body = b"".join(message.get("body", b"") for message in answers)
    return (answers[0]["status"] if answers else 0), body


def test_only_the_pages_own_requests_are_answered(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    async def health(self: Page, visitor: Visitor) -> None:
        calls.append(visitor.user)

    monkeypatch.setattr(Page, "health", health)

    def check(browser: TestClient, rows: Iterable[tuple[str, str, str | None, int]]) -> None:
        for host, origin, kind, status in rows:
            headers = {"host": host, "origin": origin, "content-type": kind or "application/json"}
            if not origin:
                del headers["origin"]
            before = len(calls)
            found = call(browser, "health", headers=headers)
            assert (found.status_code, len(calls) - before) == (status, int(status == 200)), headers
            assert found.headers["content-security-policy"]
            assert status == 200 or found.json()["detail"]

    own, any_host = SITE[7:], "chat.example:80"
    foreign = [(own, origin, None, 403) for origin in ("http://a.example", "null", "file://", "x")]
    with page(client) as browser:
        check(browser, [(own, SITE, None, 200), (own, "", None, 200), *foreign])
        check(browser, [(own, "http://a.example", "text/plain", 403)])  # as any site can send
        check(browser, [(own, SITE, kind, 415) for kind in ("text/plain", "multipart/form-data")])
        check(browser, [(own, "http://127.0.0.1:8000", None, 403), ("a@localhost", "", None, 403)])
        check(browser, [("localhost:1", "http://localhost:1", None, 200)])
        check(browser, [(host, f"http://{host}", None, 403) for host in ("a.example", any_host)])
        assert browser.get("/", headers={"host": "a.example:7860"}).status_code == 403
        with pytest.raises(WebSocketDisconnect) as closed, browser.websocket_connect("/x"):
            pass
        assert closed.value.code == 1008
    with page(client, loopback=False) as browser:
        check(browser, [(any_host, "http://chat.example", None, 200), *foreign])
        check(browser, [("chat.example", "https://chat.example", None, 200)])  # TLS ends before it
    named = ["https://chat.example"]
    with page(client, origins=named) as browser:
        check(browser, [(host, named[0], None, 200) for host in (own, "chat.example")])
        check(browser, [("a.example", "", None, 403), *foreign])
    with pytest.raises(ConfigError, match=r"'chat\.example' is no origin.*--origin"):
        page(client, origins=["chat.example"])


def secret(browser: TestClient) -> list[str]:
    given = call(browser, "talk", headers=AS_ME).json()["value"]
    return ["realtime", f"{IN_PROTOCOL}{given}"]


def test_a_browser_talks_with_the_server(browser: TestClient) -> None:
    protocols = secret(browser)
    with browser.websocket_connect(TALKS, protocols, headers={"origin": SITE}) as socket:
        assert socket.accepted_subprotocol == "realtime"
        begun = socket.receive_json()
        assert (begun["type"], begun["session"]["model"]) == ("session.created", "fake")
        assert begun["session"]["audio"]["input"]["transcription"]
        socket.send_bytes(b"\xff")
        assert "bytes came" in socket.receive_json()["error"]["message"]
    for given, where, reason in (
        ([], "", "needs the secret"),
        ([*protocols, f"{IN_PROTOCOL}another"], "", "needs the secret"),
        (["realtime", f"{IN_PROTOCOL}wrong"], "", "not valid here"),
        (protocols, "?conversation=conv-0", "conv-0"),
        (protocols, "?store_media=perhaps", "store_media: 'perhaps'"),
    ):
        with browser.websocket_connect(
            f"{TALKS}{where}", given, headers={"origin": SITE}
        ) as socket:
            told = socket.receive_json()
            assert told["type"] == "error"
            assert reason in told["error"]["message"]
            with pytest.raises(WebSocketDisconnect) as closed:
                socket.receive_json()
            assert closed.value.code == 1008
    for origin in ("http://a.example", "null"):
        with (
            pytest.raises(WebSocketDisconnect) as closed,
            browser.websocket_connect(TALKS, protocols, headers={"origin": origin}),
        ):
            pass
        assert (closed.value.code, "may not use" in closed.value.reason) == (1008, True)
    elsewhere = TALKS.replace("talk", "queue")
    with (
        pytest.raises(WebSocketDisconnect) as closed,
        browser.websocket_connect(elsewhere, protocols, headers={"origin": SITE}),
    ):
        pass
    assert "no WebSocket at '/queue'" in closed.value.reason


def test_gradios_other_routes_are_closed(browser: TestClient) -> None:
    def walk(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
        for route in routes:
            inner = getattr(route, "original_router", None) or getattr(route, "app", None)
            if getattr(inner, "routes", None):
                yield from walk(inner.routes)  # type: ignore[union-attr]
            elif hasattr(route, "path"):
                yield from ((method, route.path) for method in sorted(route.methods))

    found = set(walk(browser.app.routes))  # type: ignore[attr-defined]
    kept = {"/", "/robots.txt", "/favicon.ico", "/ear.js", CALL, UPLOAD}
    closed = [(method, path) for method, path in found if path not in kept]
    assert len(closed) > 30
    for method, path in closed:
        path = re.sub(r"\{.*?\}", "1", path)
        assert browser.request(method, path).status_code == 404, (method, path)
    for path in kept - {CALL, UPLOAD}:
        assert browser.get(f"{path}?x=1").status_code == 200, path
        assert browser.post(path).status_code == 404, path


def test_the_whole_page_comes_in_one_small_piece(browser: TestClient) -> None:
    found = browser.get("/")
    n_bytes = int(found.headers["content-length"])
    assert (found.headers["content-encoding"], n_bytes < 60_000) == ("gzip", True)
    assert not re.findall(r'(?:src|href)="(?!#)|@import|url\(', found.text), "it needs another file"
    assert "unsafe-eval" not in found.headers["content-security-policy"]
    tag = {"if-none-match": found.headers["etag"]}
    again = browser.get("/", headers=tag)
    assert (again.status_code, again.content) == (304, b"")
    plain = browser.get("/", headers={"accept-encoding": "identity"})
    assert (plain.text, "content-encoding" in plain.headers) == (found.text, False)


def test_no_other_file_is_read(
    client: Client, browser: TestClient, folder: Path, tmp_path: Path
) -> None:
    """Upload, attach, look at the original: that file alone is readable, in 960 spellings of 10."""
    mine, theirs = [Path(upload(browser, content).json()[0]) for content in (SECRET, SECRET)]
    sheep = (EXAMPLES / "sheep.jpg").read_bytes()
    path = upload(browser, sheep).json()[0]
    card = call(browser, "attach", data={"file": {"path": path, "name": "s.jpg"}}).json()["value"]
    assert not Path(path).exists(), "the server has it"
    link = call(browser, "original", data={"id": card["id"]}).json()["value"]
    assert browser.get(f"/{link}").content == sheep
    assert browser.post(f"/{link}").status_code == 404
    (tmp_path / "secret").write_bytes(SECRET)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "unknown").write_bytes(SECRET)
    database = next((tmp_path / "data").glob("*.sqlite*"), tmp_path / "data")
    files = [tmp_path / "secret", folder / "link", folder / "unknown", mine, theirs, database]
    targets = [str(one) for one in (*files, "/etc/passwd", "/proc/self/environ")]
    targets += [f"{client.api}/health/live", (tmp_path / "secret").as_uri()]
    inside = unquote(link).partition("=")[2]  # a file that may be read
    spellings: list[Callable[[str], str]] = [
        lambda t: t,
        lambda t: quote(t, safe=""),
        lambda t: quote(quote(t, safe=""), safe=""),
        lambda t: "../" * 12 + t[1:],
        lambda t: f"{folder}{'/..' * 12}{t}",
        lambda t: f"{inside}{'/..' * 14}{t}",
        lambda t: f"{inside}{'/%2e%2e' * 14}{t}",
        lambda t: f"{inside}%00{t}",
        lambda t: f"//{t}",
        lambda t: f"{t}/.",
        lambda t: t.replace("/", "\\"),
        lambda t: f"{t}?x={inside}",
    ]
    starts = ["/gradio_api/file=", "/gradio_api/file/", "/file=", "/gradio_api/proxy="]
    starts += ["/assets/", "/static/", "/svelte/", "/gradio_api/custom_component/1/client/x/"]
    paths = [f"{a}{f(t)}" for a, f, t in product(starts, spellings, targets)]
    assert len(paths) == 960

    async def read() -> None:
        for path in paths:
            status, body = await asked(browser.app, path)
            assert status == 404, path
            assert SECRET not in body, path

    asyncio.run(read())


def test_an_upload_needs_the_key_that_the_server_needs(
    browser: TestClient, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = new_key(tmp_path / "data", "me")
    for wrong, said in (("", "missing"), ("mico-guess", "not valid"), ("\u20ac", "characters")):
        refused = upload(browser, key=wrong)
        assert refused.status_code in (401, 502)
        assert said in refused.text or refused.json()["problem"]["setting"] == "key"
    assert browser.post(UPLOAD, files={"files": b"x"}).status_code == 415  # whose is it?
    assert not folder.exists() or not stored(folder)
    asks: list[Any] = []
    models = routes.models
    monkeypatch.setattr(routes, "models", lambda: (asks.append(1), models())[1])  # type: ignore[func-returns-value]
    for _ in range(3):
        assert upload(browser, key=key).status_code == 200
    assert (len(asks), len(stored(folder))) == (1, 3), "a good key is good for a while"


def test_uploads_are_counted_as_they_arrive_and_none_is_left(
    browser: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "LEAST_BYTES", 0)
    monkeypatch.setitem(door.BODIES, UPLOAD, ("multipart/form-data", 3000))
    monkeypatch.setitem(door.MOST, "bytes", (5000, 7000))
    large, other = bytes(2000), "b-fedcba98765432100"
    pieces = iter([FORM % bytes(2800), bytes(10_000), b"rest"])

    async def piece() -> Message:
        body = next(pieces, b"")
        return {"type": "http.request", "body": body, "more_body": bool(body)}

    # Nothing claims its length; what had arrived is forgotten.
    assert asyncio.run(asked(browser.app, UPLOAD, piece, **AS_ME, **TYPE))[0] == 413
    assert list(pieces) == [], "a browser reads no answer before it has sent all"
    for bad in (b"", b"--b\r\n", FORM.replace(b"files", b"other") % b"x"):
        assert browser.post(UPLOAD, content=bad, headers={**AS_ME, **TYPE}).status_code == 400
    assert not stored(folder)
    mine = [upload(browser, large) for _ in range(3)]
    assert [one.status_code for one in mine] == [200, 200, 429]
    theirs = [upload(browser, large, other).status_code for _ in range(2)]
    assert theirs == [200, 429], "all together"
    assert "all visitors" in upload(browser, large, other).json()["detail"]
    assert len(stored(folder)) == 3
    call(browser, "attach", data={"file": {"path": mine[0].json()[0], "name": "x"}})
    assert len(stored(folder)) == 2, "one that no kind fits goes too"
    assert upload(browser, large).status_code == 200


def test_uploads_at_once_and_a_browser_that_goes_away(
    browser: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(door.MOST, "uploads at once", (1, 2))

    async def begin() -> None:
        there, gone = asyncio.Event(), asyncio.Event()

        async def stuck() -> Message:
            if there.is_set():
                await gone.wait()
                return {"type": "http.disconnect"}
            there.set()
            return {"type": "http.request", "body": (FORM % b"abc")[:-9], "more_body": True}

        async def whole() -> Message:
            return {"type": "http.request", "body": FORM % b"abc"}

        first = asyncio.create_task(asked(browser.app, UPLOAD, stuck, **AS_ME, **TYPE))
        await there.wait()
        status, body = await asked(browser.app, UPLOAD, whole, **AS_ME, **TYPE)
        assert (status, b"one visitor may have 1 uploads at once" in body) == (429, True)
        gone.set()
        assert await first == (0, b"")
        assert not stored(folder)
        assert (await asked(browser.app, UPLOAD, whole, **AS_ME, **TYPE))[0] == 200

    asyncio.run(begin())


def test_another_key_neither_follows_nor_stops_an_answer(
    client: Client, halfway: Any, tmp_path: Path
) -> None:
    halfway.clear()
    id_ = f"conv-{7:024x}"
    me = Visitor.of({**ME, "key": "mine"})
    others = [Visitor.of(ME), Visitor.of({**ME, "key": "other"}), Visitor.of(ME, Access("ours"))]
    assert "mine" not in str(me.owner)
    assert len({one.owner for one in (me, *others)}) == 4

    async def watched() -> str:
        answers = Answers(MediaDesk(client.api, Previewer(), tmp_path))
        question = PageQuestion(ask="a", message="one two", conversation_id=id_, create=True)
        await answers.ask(me, question)
        for other in others:
            assert (await answers.follow(other, "a", -1)).state == "gone"
            assert answers.answering(other, id_) is None
            await answers.stop(other, "a")
        assert answers.answering(me, id_) is not None
        halfway.set()
        view = await answers.follow(me, "a", -1)
        while view.state not in ENDED:
            view = await answers.follow(me, "a", view.version)
        return view.state

    assert asyncio.run(watched()) == "done"
