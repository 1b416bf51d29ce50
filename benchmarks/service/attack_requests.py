"""The attacks of the benchmark: each is small to send, and meant to cost much."""

import base64
import io
import json
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeAlias
from urllib.parse import quote

import httpx
from PIL import Image, ImageDraw

from benchmarks.http_client import address_of, request

EXAMPLES = Path(__file__).parents[2] / "tests" / "support" / "media"
PIECE = 1 << 16
DRIBBLE_S = 15.0

Shot: TypeAlias = Callable[[float], str]
"""Sends until a time of ``time.perf_counter`` at the latest, and says how that ended."""


@dataclass(frozen=True)
class Target:
    """The URLs of a service and of a page, and the headers that say who asks."""

    url: str
    attacker: Mapping[str, str]
    neighbour: Mapping[str, str]
    page: str = ""

    def send(self, method: str, path: str, *, page: bool = False, **content: Any) -> Shot:
        """A request, ``content`` is httpx's; it ends with the status of its answer."""
        headers = content.pop("headers", self.attacker)
        data = request(method, path, headers=headers, **content)
        return self.raw(lambda: (data[at : at + PIECE] for at in range(0, len(data), PIECE)), page)

    def raw(self, pieces: Callable[[], Iterable[bytes]], page: bool = False) -> Shot:
        return lambda until: exchange(self.page if page else self.url, pieces(), until)

    def ask(self, content: Any = "Say yes.", **fields: Any) -> Shot:
        asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, **fields}
        return self.send("POST", "/v1/chat/completions", json={"model": "mini", **asked})

    def chat(self, **fields: Any) -> Shot:
        return self.send("POST", "/v1/chat", json={"message": "Hi", "max_tokens": 1, **fields})

    def client(self, headers: Mapping[str, str]) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)


Shots: TypeAlias = Callable[[Target], Sequence[Shot]]


def exchange(url: str, pieces: Iterable[bytes], until: float) -> str:
    """The status that answers the pieces, of which no more are sent once an answer comes."""
    try:
        with socket.create_connection(address_of(url), timeout=5.0) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                if select.select([connection], [], [], 0)[0]:
                    break
                connection.settimeout(max(0.001, until - time.perf_counter()))
                connection.sendall(piece)
            connection.settimeout(max(0.001, until - time.perf_counter()))
            return connection.recv(PIECE).split(b" ")[1].decode()
    except TimeoutError:
        return "no answer"
    except (OSError, IndexError):
        return "closed"


def _dribbling(target: Target, first: bytes, n: int) -> Shot:
    """So many connections that send a byte in each half second, until the service closes them."""

    def shot(until: float) -> str:
        until, open_ = min(until, time.perf_counter() + DRIBBLE_S), list[socket.socket]()
        with ExitStack() as stack:
            for _ in range(n):
                with suppress(OSError):
                    one = socket.create_connection(address_of(target.url), timeout=0.2)
                    open_.append(stack.enter_context(one))
                    one.sendall(first)
                    one.setblocking(False)
            while open_ and time.perf_counter() < until:
                time.sleep(0.5)
                open_ = [one for one in open_ if _goes_on(one)]
        return f"{n - len(open_)} of {n} closed"

    return shot


def _goes_on(connection: socket.socket) -> bool:
    try:
        connection.send(b"a")
        return connection.recv(PIECE) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _batches(target: Target, ids: Sequence[str]) -> Shot:
    """The attacker's batch with these ids, then one of one line of the neighbour's."""

    def begun(client: httpx.Client, ids: Sequence[str]) -> str:
        body = {"model": "mini", "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
        line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
        data = "\n".join(json.dumps({**line, "custom_id": id_}) for id_ in ids).encode()
        sent = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", data)})
        asked = {"input_file_id": sent.json().get("id"), "endpoint": line["url"]}
        return str(client.post("/v1/batches", json=asked).json().get("id"))

    def shot(until: float) -> str:
        state = "not begun"
        with (
            suppress(httpx.HTTPError, KeyError),
            target.client(target.attacker) as mine,
            target.client(target.neighbour) as other,
        ):
            begun(mine, ids)
            path = f"/v1/batches/{begun(other, ['one'])}"
            while state != "completed" and time.perf_counter() < until:
                time.sleep(0.2)
                state = other.get(path).json()["status"]
        return f"the other's batch: {state}"

    return shot


def _uri(data: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"


def _varied(pattern: str, n: int) -> list[str]:
    """The tests' media; bytes behind a file's end make it a new one."""
    files = [file.read_bytes() for file in sorted(EXAMPLES.glob(pattern))]
    ends = (struct.pack(">I4sQ", 16, b"free", Random().getrandbits(63)) for _ in range(n))
    return [_uri(files[number % len(files)] + end) for number, end in enumerate(ends)]


def _words(random: Random, n: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(random.choices(letters, k=random.randint(3, 9))) for _ in range(n))


def _page() -> list[Any]:
    """A picture of sixty dense lines, as a content part."""
    sheet, random = Image.new("RGB", (1240, 1754), "white"), Random()
    draw = ImageDraw.Draw(sheet)
    for line in range(60):
        draw.text((40, 30 + 28 * line), _words(random, 18), "black", font_size=20)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return [{"type": "image_url", "image_url": {"url": _uri(file.getvalue())}}]


def warm(target: Target) -> Shot:
    """A question about each kind of medium, after which all parts of a service are loaded."""
    return target.chat(image=_varied("*.jpg", 1), video=_varied("*.mp4", 1))


def _made(target: Target) -> str:
    """The path of a new conversation."""
    with target.client(target.attacker) as client:
        made = client.post("/v1/chat", json={"message": "Hi", "max_tokens": 1}).json()
    return f"/v1/conversations/{made['conversation_id']}"


def _call(target: Target, host: str) -> Shot:
    """A call of the page's Python as another site's page makes it, without a preflight."""
    html = httpx.get(f"{target.page}/", timeout=30, trust_env=False).text
    (id_,) = re.findall(r'"id":(\d+),"type":"html"', html)
    data = {"data": {"profile": {"user": "b-0123456789abcdef01"}}, "fn_name": "health"}
    body = json.dumps({"session_hash": "a", "component_id": int(id_), **data}).encode()
    headers = {"host": host, "origin": "http://a.example", "content-type": "text/plain"}
    path = "/gradio_api/component_server/"
    return target.send("POST", path, content=body, headers=headers, page=True)


def _upload(target: Target) -> Iterator[bytes]:
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    type_ = "Content-Type: multipart/form-data; boundary=b\r\nTransfer-Encoding: chunked"
    yield f"POST /gradio_api/upload HTTP/1.1\r\nHost: {target.page[7:]}\r\n{type_}\r\n\r\n".encode()
    for piece in (part, *[bytes(1 << 20)] * 1024, b"\r\n--b--\r\n", b""):
        yield f"{len(piece):x}\r\n".encode() + piece + b"\r\n"


def _schema(schema: Any) -> Shots:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return lambda target: [target.ask(max_tokens=16, response_format=form)]


def _text(pattern: str) -> dict[str, str]:
    return {"type": "string", "pattern": pattern}


def _nested(n: int) -> dict[str, Any]:
    inner = _nested(n - 1) if n else {"type": "integer"}
    return {"anyOf": [inner, {"type": "array", "items": inner}]}


MARKS = "a" + "\u0315" * 64_000 + "\u0300" * 64_000
MIXED = "a" + "\u0315\u0300" * 64_000
SEARCH = f"/v1/conversations?query={quote(MIXED[:1_000])}"
REFUSED = b"POST /v1/chat HTTP/1.1\r\nHost: a.example\r\nContent-Length: 1000000\r\n\r\n"
HEAD = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nA: "
BYTES = [bytes([one]) for one in HEAD + b"a" * 60_000 + b"\r\n\r\n"]
COUNTS = {"type": "array", "minItems": 10**9, "items": {"type": "string", "maxLength": 10**9}}
CIRCLE = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
NULLABLE = {"anyOf": [_text("^" + "(a|)" * 160 + "$"), {"type": "null"}]}
BEHIND = {"type": "object", "properties": {"a": NULLABLE}, "required": ["a"]}

LARGE: dict[str, Callable[[Target], Shot]] = {
    "16 MB of digits": lambda t: t.ask("7" * 16_000_000),
    "a percent-encoded picture of 48 MB": lambda t: t.chat(image="data:," + "%00" * 16_000_000),
    "12 MB of {}": lambda t: t.ask(messages=[{}] * 4_000_000),
    "metadata of 9 MB": lambda t: t.ask(metadata={f"{n:06x}": "v" for n in range(600_000)}),
}

ATTACKS: dict[str, Shots] = {
    "unicode: 128,000 marks": lambda t: [t.chat(message=MARKS)],
    "unicode: mixed marks": lambda t: [t.chat(message=MIXED)],
    "unicode: marks as instructions": lambda t: [t.chat(system=MARKS)],
    "unicode: marks as a title": lambda t: [t.send("PATCH", _made(t), json={"title": MARKS})],
    "unicode: marks as a search": lambda t: [t.send("GET", SEARCH)] * 4,
    "stop: 16 of 3 MB": lambda t: [t.ask(stop=["a" * 3_000_000] * 16)],
    "stop: 16 of 100 KB": lambda t: [t.ask(stop=["a" * 100_000] * 16)],
    "stop: 16 of 1,000 a": lambda t: [t.ask("a" * 200, stop=["a" * 1_000] * 16, max_tokens=256)],
    "grammar: (a|) 160 times": _schema(_text("^" + "(a|)" * 160 + "$")),
    "grammar: (a|) 300 times": _schema(_text("^" + "(a|)" * 300 + "$")),
    "grammar: ((a+)+) 100 deep": _schema(_text("(" * 100 + "a" + "+)" * 100)),
    "grammar: an enum of 100,000": _schema({"enum": [f"v{n}" for n in range(100_000)]}),
    "grammar: a pattern or null behind a property": _schema(BEHIND),
    "grammar: minItems and maxLength 10**9": _schema(COUNTS),
    "grammar: anyOf 16 deep, each twice": _schema(_nested(16)),
    "grammar: $ref in a circle": _schema(CIRCLE),
    "connection: a header of 100 MB": lambda t: [t.raw(lambda: [HEAD, *[b"a" * PIECE] * 1600])],
    "connection: 400 that dribble a header": lambda t: [_dribbling(t, HEAD, 400)],
    "connection: 100 that dribble a refused body": lambda t: [_dribbling(t, REFUSED, 100)],
    "connection: 8 headers in single bytes": lambda t: [t.raw(lambda: BYTES)] * 8,
    "batch: half a surrogate as an id": lambda t: [_batches(t, ["\ud800"])],
    "batch: 200 lines": lambda t: [_batches(t, [f"line {n}" for n in range(200)])],
    **{
        f"memory: {what}, {n} at once": lambda t, n=n, make=make: [make(t)] * n  # type: ignore[misc]
        for what, make in LARGE.items()
        for n in (1, 4)
    },
    "fair: 8 dense pages": lambda t: [t.ask(_page()) for _ in range(8)],
    "fair: explain, 16 pictures": lambda t: [t.chat(image=_varied("*.jpg", 16), explain=True)],
    "fair: 16 long prompts": lambda t: [t.ask(_words(Random(n), 400)) for n in range(16)],
    "fair: 32 pictures": lambda t: [t.chat(image=_varied("*.jpg", 32))],
    "fair: 8 clips": lambda t: [t.chat(video=_varied("*.mp4", 8))],
    "page: a call from another site": lambda t: [_call(t, t.page[7:])],
    "page: a call to another host": lambda t: [_call(t, "a.example")],
    "page: 2 files of 1 GB": lambda t: [t.raw(lambda: _upload(t), page=True)] * 2,
}
"""What is sent, by groups. The shots of an attack are fired at the same time."""

WANTS = {"page": r"4\d\d|closed", "batch": ".*completed"}
"""How the shots of a group must end; the others may end in any way but a defect of the service."""
