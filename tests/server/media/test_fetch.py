"""Fetching URLs: what a hostile one could reach, and that a good one works, over real sockets."""

import asyncio
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mico_chat.errors import ConfigError, LimitError, MediaError
from mico_server.fetch.fetcher import Fetcher, is_public

Answer = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]

pytestmark = pytest.mark.anyio

WHERE = "messages[0].content[1].image_url.url"


class Site:
    """A server that gives fixed answers and keeps the heads of what it was asked."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        self.answers = answers
        self.heads: list[str] = []
        self.connections = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            answer = self.answers.get(head.split(" ")[1], status(404))
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the fetcher has seen enough
        finally:
            writer.close()


@asynccontextmanager
async def site(
    answers: dict[str, Answer] | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Site]:
    served = Site(answers or {})
    server = await asyncio.start_server(served.serve, host, port, ssl=tls)
    served.port = server.sockets[0].getsockname()[1]
    try:
        yield served
    finally:
        server.close()


def ok(body: bytes, *headers: str) -> bytes:
    head = "\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers])
    return head.encode() + b"\r\n\r\n" + body


def status(code: int, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {code} X", "Content-Length: 0", *headers, "", ""]).encode()


def to(location: str, code: int = 302) -> bytes:
    return status(code, f"Location: {location}")


def resolver(names: Mapping[str, Sequence[str]]) -> Callable[[str, int], Awaitable[Sequence[str]]]:
    async def resolve(host: str, port: int) -> Sequence[str]:
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "secret words of the system")
        return names[host]

    return resolve


def fetcher(**changes: Any) -> Fetcher:
    """Like the service's, but for short limits; it may ask 127.0.0.1, and by name media.test."""
    settings: dict[str, Any] = {
        "timeout_s": 900.0,
        "max_bytes": 1000,
        "max_redirects": 3,
        "allowed": lambda address: address == "127.0.0.1",
        "resolve": resolver({"media.test": ["127.0.0.1"], "inside.test": ["127.0.0.2"]}),
    }
    return Fetcher(**settings | changes)


async def fails(fetching: Fetcher, url: str, folder: Path) -> MediaError:
    """The error of a URL, which must leave no file."""
    with pytest.raises(MediaError) as caught:
        await fetching.fetch(url, folder / "fetched", WHERE)
    assert not list(folder.iterdir())
    assert caught.value.name == WHERE
    assert str(caught.value).isprintable()
    return caught.value


INSIDE = [
    *("127.0.0.1", "127.0.0.1.", "127.1", "127.255.255.254", "localhost", "LOCALHOST."),
    *("2130706433", "017700000001", "0177.0.0.1", "0x7f.1", "0x7f000001", "127.0.0.0x1", "0"),
    *("[::1]", "[::ffff:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::1]"),
    *("[::]", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254"),
    *("[fe80::1]", "[fe80::1%25lo]", "[fd00:ec2::254]", "[fec0::1]", "[ff02::1]", "224.0.0.1"),
    *("255.255.255.255", "\uff11\uff12\uff17.0.0.1", "127\u30020\u30020\u30021", "inside.test"),
    *("no-such-name.test", "mixed.test", "nothing.test"),
]


async def test_a_name_is_resolved_once_and_asked_there(tmp_path: Path) -> None:
    """DNS rebinding: the second answer would lead inside."""
    asked: list[str] = []

    async def rebinding(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    async with (
        site({"/": ok(b"cat")}) as outside,
        site({"/": ok(b"secret")}, host="127.0.0.2", port=outside.port) as inside,
    ):
        fetching = fetcher(resolve=rebinding)
        await fetching.fetch(f"http://evil.test:{outside.port}/", tmp_path / "a", WHERE)
        assert (tmp_path / "a").read_bytes() == b"cat"
        assert asked == ["evil.test"]
        # Asked again it is inside, and refused.
        (tmp_path / "a").unlink()
        await fails(fetching, f"http://evil.test:{outside.port}/", tmp_path)
        assert inside.connections == 0


PUBLIC = [
    *("8.8.8.8", "93.184.215.14", "192.0.1.1", "172.32.0.1", "100.128.0.1", "198.20.0.1"),
    *("2606:4700::6810:84e5", "2a00:1450:4001::200e", "::ffff:8.8.8.8", "64:ff9b::808:808"),
]
NOT_PUBLIC_ONES = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254"),
    *("172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.9", "192.0.0.170", "192.0.2.1"),
    *("192.88.99.1", "192.168.0.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1"),
    *("239.255.255.250", "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1"),
    *("::ffff:10.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b:1::8.8.8.8"),
    *("100::1", "2001::1", "2001:0:a00:1:0:0:f5ff:fffe", "2001:db8::1", "2002:0a00:1::1"),
    *("2002:808:808::1", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1"),
    *("fe80::1%eth0", "2606:4700::1%eth0", "fec0::1", "ff02::1", "", "example.org", "8.8.8.8:80"),
]


def test_which_addresses_are_public() -> None:
    assert [address for address in PUBLIC if not is_public(address)] == []
    assert [address for address in NOT_PUBLIC_ONES if is_public(address)] == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://media.test/a", "the URL has the scheme 'ftp'; use http or https"),
        ("", "the URL has the scheme ''"),
        ("http:///a", "host is not a valid name"),
        ("http://media.test@127.0.0.1/", "user name or password"),
        ("http://media.test\\@127.0.0.1/", "backslashes"),
        ("http://media.test/a\r\nHost: x", "control characters"),
        ("http://media.test/\ud800", "control characters"),
        ("http://media.test:0/", "port 0"),
        ("http://media.test:65536/", "cannot be read"),
        ("http://[::1/", "cannot be read"),
        ("http://[v1.a]/", "without a public address"),
        ("http://media%2etest/", "host is not a valid name"),
        ("http://media..test/", "host is not a valid name"),
        (f"http://{'a' * 64}.test/", "host is not a valid name"),
        ("http://\u2100.test/", "cannot be read"),  # becomes a/c
        ("http://a\u0488.test/", "host is not a valid name"),
        ("http://media.test/" + "a" * 9000, "9018 characters; the most is 8192"),
    ],
)
async def test_urls_that_are_none(url: str, said: str, tmp_path: Path) -> None:
    error = await fails(fetcher(), url, tmp_path)
    assert said in error.reason
    assert len(error.reason) < 200


async def test_a_good_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    async with site() as outside:
        outside.answers["/a%20cat/k%C3%A4tzchen%2F.jpg?size=1&q=%C3%A4"] = ok(b"cat")
        url = f"HTTP://Media.TEST.:{outside.port}/a cat/kätzchen%2F.jpg?size=1&q=ä#part"
        await fetcher().fetch(url, tmp_path / "cat", WHERE)
        assert (tmp_path / "cat").read_bytes() == b"cat"
        head = outside.heads[0].lower()
        assert f"\r\nhost: media.test:{outside.port}\r\n" in head
        assert "\r\naccept-encoding: identity\r\n" in head
        assert "authorization" not in head
        assert "cookie" not in head


async def test_redirects_are_followed_and_the_next_address_is_tried(tmp_path: Path) -> None:
    async with site({"/b/c": to("../d?e=1", 308), "/d?e=1": ok(b"cat")}) as outside:
        outside.answers["/a"] = to(f"http://127.0.0.1:{outside.port}/b/c", 301)
        names = resolver({"media.test": ["127.0.0.3", "127.0.0.1"]})
        fetching = fetcher(resolve=names, allowed=lambda address: True)
        await fetching.fetch(f"http://media.test:{outside.port}/a", tmp_path / "a", WHERE)
        assert (tmp_path / "a").read_bytes() == b"cat"


async def _chunked(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"64\r\n" + b"x" * 100 + b"\r\n")
        await writer.drain()


async def _until_closed(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001)
    await writer.drain()


async def _silent(writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def _slow_body(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


NO_MEDIUM = "no proper answer"


@pytest.mark.parametrize(
    ("answer", "status_", "said"),
    [
        (ok(b"x" * 1001), 413, "1001 bytes, over the limit of 1000 (max_bytes; raise it with"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", 413, "99999999999 bytes"),
        (_chunked, 413, "more than 1000 bytes"),
        (_until_closed, 413, "more than 1000 bytes"),
        (_silent, 422, "took longer than the limit of 0.5 s (MICO_SERVER_URL_TIMEOUT_S)"),
        (_slow_body, 422, "took longer than the limit of 0.5 s (MICO_SERVER_URL_TIMEOUT_S)"),
        (status(404), 422, "answered with status 404, expected 200"),
        (status(302), 422, "answered with status 302, expected 200"),  # leads nowhere
        (to("/"), 422, "redirects more than the limit of 2 times (MICO_SERVER_MAX_REDIRECTS)"),
        (ok(b"x", "Content-Encoding: gzip"), 422, "content-encoding 'gzip', but the service asked"),
        (ok(b"x", "Content-Encoding: identity, br"), 422, "content-encoding 'identity, br'"),
        (ok(b"x", "Transfer-Encoding: gzip"), 422, NO_MEDIUM),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", 422, NO_MEDIUM),
        (b"SSH-2.0-OpenSSH_9.6 secret\r\n", 422, NO_MEDIUM),
        (b"HTTP/1.1 200 OK\r\nA: " + b"x" * 200_000, 422, NO_MEDIUM),
        (b"", 422, NO_MEDIUM),
    ],
)
async def test_answers_that_are_refused(
    answer: Answer, status_: int, said: str, tmp_path: Path
) -> None:
    async with site({"/": answer}) as outside:
        fetching = fetcher(timeout_s=0.5 if "longer" in said else 900.0, max_redirects=2)
        error = await fails(fetching, f"http://media.test:{outside.port}/", tmp_path)
        assert error.status == status_
        assert isinstance(error, LimitError) == (status_ == 413)
        assert said in error.reason
        assert "secret" not in error.reason
        assert len(outside.heads) == (3 if "redirects" in said else 1)


async def test_only_listed_hosts(tmp_path: Path) -> None:
    resolved: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        resolved.append(host)
        return ["127.0.0.1"]

    async with site({"/": ok(b"cat")}) as outside:
        outside.answers["/away"] = to(f"http://other.test:{outside.port}/")
        fetching = fetcher(hosts=("Media.test.", "b\u00fccher.test"), resolve=resolve)
        for host in ("media.TEST", "media.test.", "B\u00dcCHER.test", "xn--bcher-kva.test"):
            await fetching.fetch(f"http://{host}:{outside.port}/", tmp_path / "a", WHERE)
            (tmp_path / "a").unlink()
        assert set(resolved) == {"media.test", "xn--bcher-kva.test"}
        away = (
            *("http://other.test:{}/", "http://a.media.test:{}/", "http://media.test.evil:{}/"),
            *("http://127.0.0.1:{}/", "http://media.test:{}/away"),
        )
        for url in away:
            error = await fails(fetching, url.format(outside.port), tmp_path)
            assert "MICO_SERVER_URL_HOSTS" in error.reason
        assert set(resolved) == {"media.test", "xn--bcher-kva.test"}


@pytest.mark.parametrize("host", ["", "http://media.test", "media.test:80", "*.media.test", "a b"])
def test_a_list_of_hosts_that_makes_no_sense(host: str) -> None:
    with pytest.raises(ConfigError, match="MICO_SERVER_URL_HOSTS"):
        fetcher(hosts=(host,))


async def test_a_fetch_that_is_given_up_leaves_no_file(tmp_path: Path) -> None:
    async with site({"/": _slow_body}) as outside:
        url = f"http://media.test:{outside.port}/"
        task = asyncio.create_task(fetcher().fetch(url, tmp_path / "a", WHERE))
        while not (tmp_path / "a").exists():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not list(tmp_path.iterdir())


async def test_a_handshake_that_hangs_leaves_no_connection(tmp_path: Path) -> None:
    closed = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # all there ever is
        closed.set()
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        fetching = fetcher(timeout_s=0.3)
        error = await fails(fetching, f"https://media.test:{port}/", tmp_path)
        assert "took longer" in error.reason
        await closed.wait()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    key, cert, both = (folder / name for name in ("key.pem", "cert.pem", "both.pem"))
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-keyout", str(key), "-out", str(cert)),
            *("-subj", "/CN=media.test", "-addext", "subjectAltName=DNS:media.test"),
        ],
        check=True,
        capture_output=True,
    )
    both.write_bytes(key.read_bytes() + cert.read_bytes())
    return both


async def test_tls_proves_the_urls_host(certificate: Path, tmp_path: Path) -> None:
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=str(certificate))
    names = resolver({"media.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]})

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)  # the server's side of refused handshakes
    async with site({"/": ok(b"cat")}, tls=serving) as outside:
        fetching = fetcher(resolve=names, ssl_context=trusting)
        await fetching.fetch(f"https://media.test:{outside.port}/", tmp_path / "a", WHERE)
        assert (tmp_path / "a").read_bytes() == b"cat"
        (tmp_path / "a").unlink()
        for host in ("other.test", "127.0.0.1"):
            error = await fails(fetching, f"https://{host}:{outside.port}/", tmp_path)
            assert "no proper answer" in error.reason
        stranger = fetcher(resolve=names)
        await fails(stranger, f"https://media.test:{outside.port}/", tmp_path)
        assert len(outside.heads) == 1
        outside.answers["/down"] = to(f"http://media.test:{outside.port}/")
        error = await fails(fetching, f"https://media.test:{outside.port}/down", tmp_path)
        assert "from https to http" in error.reason
