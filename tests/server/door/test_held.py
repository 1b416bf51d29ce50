"""What attackers tried and the service held, as counted lists: none of it may give way again.

Each test asserts how much it tried, so that a list cannot become short unseen.
"""

import ipaddress
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from http.client import HTTPConnection
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import httpcore
import httpx
import pytest
from fastapi.routing import iter_route_contexts

from mico_chat.errors import MediaError
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.media.kinds import KINDS
from mico_server.app import create_app
from mico_server.fetch.fetcher import NOT_PUBLIC
from mico_server.host import ModelSource
from mico_server.settings import ServerSettings
from mico_ui.browser.app import WEB
from mico_ui.browser.cards import MediaDesk, Previewer
from mico_ui.browser.markup import html_of
from mico_ui.browser.page import EXAMPLES_FOLDER, Page
from tests.server.conftest import Start
from tests.server.dialects.test_batches import CHAT, jsonl, line
from tests.server.door.test_auth import OURS, bearer
from tests.server.media.test_fetch import INSIDE, NOT_PUBLIC_ONES, WHERE, fetcher, resolver
from tests.server.support.bombs import BOMBS
from tests.server.support.hostile_seeds import good_files
from tests.server.support.running import live, new_key, wait_until_ready
from tests.server.support.sent import part as part_of
from tests.support.fakes import WALL, FakeAssistant
from tests.support.waiting import PATIENCE_S, until
from tests.ui.conftest import served
from tests.ui.test_page import ME, ask, call

OPEN = ("/health/live", "/health/ready")
ADMIN_TOO = {("GET", "/v1/batches"), ("GET", "/v1/batches/x"), ("POST", "/v1/batches/x/cancel")}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW"]


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[tuple[HTTPConnection, list[tuple[str, str]]]]:
    """A connection to a service that asks everybody for a key, and its methods and paths."""
    settings = ServerSettings(data_dir=tmp_path, require_keys=True)
    app = create_app([ModelSource("fake", FakeAssistant)], settings, local_secret=OURS)
    routes = [
        (method, re.sub(r"{[^}]+}", "x", found.path or ""))
        for found in iter_route_contexts(app.routes)
        for method in sorted(found.methods or {"GET"})  # a folder of files has none
    ]
    with live(app, lifespan="on") as client:
        wait_until_ready(client)
        connection = HTTPConnection(client.base_url.host, client.base_url.port, timeout=PATIENCE_S)
        yield connection, routes
        connection.close()


def status(server: HTTPConnection, method: str, path: str, *headers: tuple[str, str]) -> int:
    server.putrequest(method, path)
    for name, value in headers:
        server.putheader(name, value)
    server.endheaders()
    answer = server.getresponse()
    answer.read()
    return answer.status


def test_no_credential_but_a_key_opens_a_route(closed: Any, tmp_path: Path) -> None:
    server, routes = closed
    chat, metrics, admin, revoked = (
        new_key(tmp_path, name, scopes=[name.replace("revoked", "chat")])
        for name in ("chat", "metrics", "admin", "revoked")
    )
    with httpx.Client(base_url=f"http://{server.host}:{server.port}", trust_env=False) as root:
        root.headers.update(bearer(admin))
        root.delete(f"/v1/keys/{root.get('/v1/keys').json()['data'][-1]['id']}")
    wrong = ["", "Bearer", "Bearer  ", "Bearer wrong", "Basic YWxpY2U6", "Bearer a\0b"]
    wrong += ["Bearer \xe4\xff", f"Bearer {'a' * 60_000}", f"Bearer {OURS}", f"Bearer {revoked}"]
    wrong += [chat, f"Bearer\t{chat}", f"Bearer {chat}x", f"Bearer {chat[:-1]}", f'Bearer "{chat}"']
    wrong += [f"Bearer {chat.swapcase()}", f"Bearer {chat}, Bearer {chat}", f"Token {chat}"]
    given: list[tuple[tuple[tuple[str, str], ...], str, str | None]]
    given = [((("authorization", value),), "", None) for value in wrong]
    given += [((), "", None), ((), f"?api_key={chat}&access_token={chat}&key={chat}", None)]
    given += [((("api-key", chat), ("cookie", f"authorization=Bearer {chat}")), "", None)]
    given += [((("x-api-key", chat),), "", "chat"), ((("x-api-key", f"{chat}x"),), "", None)]
    given += [((("authorization", f"Bearer {chat}"),) * 2, "", None)]
    right = {f"bearer {chat}": "chat", f"Bearer {metrics}": "metrics", f"BEARER {admin}": "admin"}
    given += [((("authorization", value),), "", scope) for value, scope in right.items()]
    n, bad = 0, []
    own = {"/metrics": "metrics", "/v1/keys": "admin"}
    own |= {f"/v1/{do}_lora_adapter": "admin" for do in ("load", "unload")}
    for method, path in routes:
        needs = own.get(path.removesuffix("/x"), "chat")
        opening = {needs, "admin"} if (method, path) in ADMIN_TOO else {needs}
        for headers, query, scope in given:
            n += 1
            found = status(server, method, path + query, *headers)
            unreadable = any("\0" in value or len(value) > 9_999 for _, value in headers)
            if unreadable and found in (400, 431):
                continue  # the parser of HTTP, before any route
            if path in OPEN:
                holds = found == 200
            elif scope in opening:
                holds = found not in (401, 403) and found < 500
            else:
                holds = found == (403 if scope else 401)
            if not holds:
                bad.append((method, path, query, headers, found))
    assert bad == []
    assert (len(given) >= 19, n >= 798) == (True, True), (len(given), n)


def test_no_spelling_of_a_path_opens_it_without_a_key(closed: Any) -> None:
    server, routes = closed
    n, bad = 0, []
    for path in sorted({path for _, path in routes}):
        slash = path.replace("/", "%2f")
        spelt = [path, path.upper(), path.title(), f"/{path}", f"{path}/", f"{path}//", f"/.{path}"]
        spelt += [f"/x/..{path}", f"/health/live/../..{path}", f"/health/live/..%2f..{slash}"]
        spelt += [f"/{slash}", f"{path};a=b", f"{path}%00", f"{path}%0a", f"{path}?/health/live"]
        spelt += [f"{path}%ef%bc%8f", path.replace("h", "%68"), f"http://localhost{path}"]
        for one in spelt:
            for method in METHODS:
                n += 1
                found = status(server, method, one)
                is_open = unquote(one.removeprefix("http://localhost").split("?")[0]) in OPEN
                if found >= 500 or (found < 300 and not is_open):
                    bad.append((method, one, found))
    assert bad == []
    assert n >= 4_068


def asks_for_medium(kind: str, id_: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    path, url = f"/v1/media/{id_}", f"media:{id_}"
    yield from (("GET", path, {}), ("GET", f"{path}/content", {}), ("DELETE", path, {}))
    yield from (("POST", f"{path}/depth", {}), ("GET", f"/v1/media?after={id_}", {}))
    part: Any = part_of(kind, url)
    asked = {"model": "fake", "messages": [{"role": "user", "content": [part]}]}
    for route in ("/v1/chat", "/v1/estimate"):
        yield "POST", route, {"data": {"message": "?", kind: url}}
        yield "POST", route, {"json": {"message": "?", kind: [url]}}
    yield from (("POST", route, {"json": asked}) for route in (CHAT, "/v1/estimate"))
    shown = {"type": "input_image", "image_url": url} if kind == "image" else part
    said = [{"role": "user", "content": [shown]}]
    yield "POST", "/v1/responses", {"json": {"model": "fake", "input": said}}
    yield "POST", "/v1/embeddings", {"json": {"model": "fake", "input": [part]}}
    for queries, documents in (([part], ["a"]), (["a"], [part])):
        compared = {"model": "fake", "queries": queries, "documents": documents}
        yield "POST", "/v1/score", {"json": compared}


def asks_for_conversation(id_: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    path, asked = f"/v1/conversations/{id_}", {"message": "?", "conversation_id": id_}
    yield from (("GET", path, {}), ("DELETE", path, {}), ("PATCH", path, {"json": {"title": "b"}}))
    yield from (("DELETE", f"{path}/turns/1", {}), ("POST", f"{path}/turns/1/explanation", {}))
    yield "GET", f"/v1/conversations?before={id_}", {}
    yield from (("POST", "/v1/chat", {form: asked}) for form in ("data", "json"))
    yield "POST", "/v1/chat", {"json": {**asked, "create": True}}
    yield "POST", "/v1/estimate", {"json": asked}


def asks_for_file(id_: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    path = f"/v1/files/{id_}"
    yield from (("GET", path, {}), ("GET", f"{path}/content", {}), ("DELETE", path, {}))
    yield "GET", f"/v1/files?after={id_}", {}
    yield "POST", "/v1/batches", {"json": {"input_file_id": id_, "endpoint": CHAT}}


def test_another_tenant_finds_nothing_and_changes_nothing(start: Start, tmp_path: Path) -> None:
    assistant = FakeAssistant()
    assistant.similarity = SimpleNamespace(dim=4, score=None)  # type: ignore[assignment]
    assistant.encoder.depths = WALL
    http = start(assistant)
    alice, bob = (bearer(new_key(tmp_path / "data", name)) for name in ("alice", "bob"))

    def made(path: str, **sent: Any) -> dict[str, Any]:
        answer: dict[str, Any] = http.post(path, headers=alice, **sent).raise_for_status().json()
        return answer

    media = {kind: made("/v1/media", files={kind: (f"a.{kind}", b"a")})["id"] for kind in KINDS}
    media["depth"] = made(f"/v1/media/{media['image']}/depth")["id"]
    asked = {"message": "What?", "explain": True}
    talk = made("/v1/chat", data=asked, files={"image": ("b.png", b"b")})["conversation_id"]
    lines = {"file": ("a.jsonl", jsonl([line("one")]))}
    file = made("/v1/files", data={"purpose": "batch"}, files=lines)["id"]
    batch = made("/v1/batches", json={"input_file_id": file, "endpoint": CHAT})["id"]

    def ended() -> Any:
        found = http.get(f"/v1/batches/{batch}", headers=alice).json()
        return found["status"] == "completed" and found["output_file_id"]

    output = until(ended)
    (turn,) = http.get(f"/v1/conversations/{talk}", headers=alice).json()["turns"]

    seen = [f"/v1/{name}" for name in ("conversations", "media", "files", "batches")]
    seen += [f"/v1/conversations/{talk}", *(f"/v1/files/{id_}/content" for id_ in (file, output))]
    seen += [f"/v1/media/{id_}/content" for id_ in (*media.values(), turn["media"][0]["id"])]
    before = [http.get(path, headers=alice).raise_for_status().content for path in seen]

    asks = [one for kind, id_ in media.items() for one in asks_for_medium(kind, id_)]
    asks += [*asks_for_medium("image", turn["media"][0]["id"]), *asks_for_conversation(talk)]
    asks += [*asks_for_file(file), *asks_for_file(output), ("GET", f"/v1/batches/{batch}", {})]
    asks += [("POST", f"/v1/batches/{batch}/cancel", {}), ("GET", f"/v1/batches?after={batch}", {})]
    strangers = (bob, {**alice, "x-mico-user": "eve"})
    found = [
        (method, path, sent, http.request(method, path, headers=stranger, **sent).status_code)
        for stranger in strangers
        for method, path, sent in asks
    ]
    assert [one for one in found if one[-1] != 404] == []
    assert len(found) >= 111
    assert [http.get(path, headers=alice).content for path in seen] == before
    assert len(set(assistant.tenants)) == 1, "no stranger's question came to the model"


def urls_inside() -> Iterator[str]:
    """URLs that lead to a private address, in every spelling that some program reads as it."""
    yield from (f"http://{host}/" for host in INSIDE)
    for address in filter(None, NOT_PUBLIC_ONES[:-2]):
        ip = ipaddress.ip_address(address)
        if isinstance(ip, ipaddress.IPv6Address):
            yield f"http://[{address}]/"
            continue
        a, b, c, d = ip.packed
        number, words = int(ip), f"{a:02x}{b:02x}:{c:02x}{d:02x}"
        hosts = [address, f"{address}.", f"{number}", f"{number:#x}", f"0{number:o}"]
        hosts += [f"0{a:o}.0{b:o}.0{c:o}.0{d:o}", f"{a:#x}.{b:#x}.{c:#x}.{d:#x}"]
        hosts += [f"{a}.{number % 2**24}", f"{a}.{b}.{number % 2**16}", f"{address}.nip.test"]
        hosts += [f"[::ffff:{address}]", f"[::ffff:{words}]", f"[64:ff9b::{words}]"]
        hosts += [f"[::{words}]", f"[2002:{words}::1]", f"user:word@{address}", f"{address}:22"]
        yield from (f"http://{host}/" for host in hosts)
        yield from (f"{scheme}://{address}/" for scheme in ("https", "ftp", "gopher", "file"))


@pytest.mark.anyio
async def test_no_url_leads_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at once nor by a redirect is any address asked that is not public."""
    urls, asked, location = [*urls_inside()], list[str](), ""
    names = {f"{one}.nip.test": [one] for one in NOT_PUBLIC_ONES}
    names |= {"site.test": ["93.184.215.14"], "mixed.test": ["93.184.215.14", "127.0.0.1"]}
    names |= {"localhost": ["::1", "127.0.0.1"], "inside.test": ["10.1.2.3"], "nothing.test": []}

    async def connect(_: Any, host: str, port: int, **options: Any) -> httpcore.AsyncMockStream:
        asked.append(host)
        head = f"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: {location}\r\n\r\n"
        return httpcore.AsyncMockStream([head.encode()])

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect)
    fetching = fetcher(allowed=None, resolve=resolver(names))
    for url in urls:
        location = url
        for first in (url, "http://site.test/"):
            with pytest.raises(MediaError) as refused:
                await fetching.fetch(first, tmp_path / "fetched", WHERE)
            # The same words for all: an address, a port, even a name must not be found out.
            alike = url.startswith("http://") and "@" not in url and "%" not in url
            assert not alike or refused.value.reason == NOT_PUBLIC
    assert set(asked) == {"93.184.215.14"}
    assert (len(asked), len(urls) >= 344) == (len(urls), True), len(urls)


def test_bombs_cost_their_sender_alone() -> None:
    made = dict.fromkeys((bomb, bomb.make(Random(n))) for n in range(2) for bomb in BOMBS)
    good, bad = good_files()[0], []
    with MediaDecoder() as decoder:
        for bomb, data in made:
            try:
                decoder.decode(MediaFile(bomb.kind, data, bomb.name))
                bad += [bomb.name] * bomb.must_fail
            except MediaError as error:
                bad += [] if 400 <= error.status < 500 else [bomb.name]
        decoder.decode(MediaFile(good.kind, good.data, "good"))
    assert bad == []
    assert len(made) >= 36


PAYLOADS = r"""
<script>alert(1)</script>
<img src=x onerror=alert(1)>
<svg onload=alert(1)>
"><script>alert(1)</script>
'"><img src=x onerror=alert(1)>
</code></pre><script>alert(1)</script>
<a href="javascript:alert(1)">a</a>
[a](javascript:alert(1))
[a](JaVaScRiPt:alert(1))
[a](java&#115;cript:alert(1))
[a](<javascript:alert(1)>)
[a](data:text/html;base64,PHNjcmlwdD4=)
[a](vbscript:msgbox(1))
[a](https://a.example" onmouseover="alert(1))
![a](x" onerror="alert(1))
![a](https://a.example/a.png)
<javascript:alert(1)>
<iframe srcdoc="<script>alert(1)</script>"></iframe>
<style>@import 'https://a.example';</style>
<form action=https://a.example><button>a</button></form>
<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>
```"><script>alert(1)</script>
`<img src=x onerror=alert(1)>`
&lt;script&gt;alert(1)&lt;/script&gt;<!--><script>-->
| <b onclick=alert(1)>a</b> | ${alert(1)} {{alert(1)}} |
""".strip().split("\n")


class Markup(HTMLParser):
    """Collects what Markdown alone does not make."""

    TAGS = re.compile("p|br|h[1-3]|ul|ol|li|a|code|pre|em|strong|blockquote|hr|s|span")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.bad = list[Any]()
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            web = name == "href" and re.match(r"https?://", value or "")
            self.bad += [] if name == "class" or web else [(tag, name, value)]
        self.bad += [] if self.TAGS.fullmatch(tag) else [tag]


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    n, bad = 0, list[Any]()
    previewer, cat = Previewer(), (EXAMPLES_FOLDER / "cat.jpg").read_bytes()
    with served(tmp_path, FakeAssistant()) as client:
        page = Page(MediaDesk(client.api, previewer, tmp_path))
        for payload in PAYLOADS:
            n += 1
            me = {**ME, "system": payload}
            (tmp_path / "a.jpg").write_bytes(cat)
            file = {"path": str(tmp_path / "a.jpg"), "name": payload}
            card = call(page, "attach", me, file=file)
            shown = [{"id": card["id"], "kind": "image"}]
            done = ask(page, payload, me, media=shown)[-1]
            id_ = done["conversation_id"]
            call(page, "change", me, id=id_, changes={"title": payload})
            opened = call(page, "open", me, id=id_)
            assert (opened["title"], opened["system"]) == (payload, payload)
            assert payload in done["answer"]
            saved = [call(page, "export", me, id=id_, form=form) for form in ("markdown", "json")]
            assert json.loads(saved[1]["text"])["title"] == payload
            kinds = [(one["type"], re.sub(r"[\w-]", "", one["name"])) for one in saved]
            assert kinds == [("text/markdown", "."), ("application/json", ".")]
            drawn = [done["html"], opened["turns"][0]["html"], html_of(saved[0]["text"])]
            bad += [(payload, Markup(html).bad) for html in drawn if Markup(html).bad]
            sources = [one["src"] for one in (*card["pictures"], *done["media"][0]["pictures"])]
            bad += [one for one in sources if not one.startswith("data:image/webp;base64,")]
    previewer.close()
    assert bad == []
    assert n >= 25
    # The browser makes markup of one value, an answer's; all else of a view is set as text.
    scripts = "".join(file.read_text() for file in sorted(WEB.glob("*.js")))
    sinks = r"\w*\.(?:innerHTML|outerHTML|srcdoc)\s*=.*|insertAdjacentHTML|document\.write|eval\("
    assert [one.split(";")[0] for one in re.findall(sinks, scripts)] == [
        "text.innerHTML = view.html"
    ]
