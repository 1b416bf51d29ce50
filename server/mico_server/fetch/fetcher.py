"""Fetches media from clients' URLs, but only from public hosts.

Through the service a client must not reach a cloud's metadata or a database of the service's
network (server-side request forgery). So every host is resolved once, all of its addresses must be
public, and the connection goes to one of exactly these addresses: a second resolution could give
another address than the checked one (DNS rebinding). A redirect is a new URL, with the same checks.
Proxies of the environment are not used, because a proxy would resolve the name again. Any port of a
public host is allowed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urljoin, urlsplit

import httpcore
import idna

from mico_chat import __version__
from mico_chat.errors import ConfigError, LimitError
from mico_chat.media.file import MediaLimits
from mico_server.errors import FetchError
from mico_server.settings import ServerSettings

logger = logging.getLogger(__name__)

_REDIRECTS = frozenset({301, 302, 303, 307, 308})

NOT_PUBLIC = (
    "it leads to a host without a public address; the service fetches from public "
    "hosts only, so send the bytes instead"
)
"""One message for every refused address, so that it tells nothing about the service's network."""
_NO_ANSWER = "its host could not be reached or gave no proper answer; send the bytes instead"

_FAILURES = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    ssl.SSLError,
)


@dataclass(kw_only=True)
class Fetcher:
    """Fetches http and https URLs into files.

    One URL may take ``timeout_s`` seconds with its redirects. If ``hosts`` are named, all others
    are refused, in redirects too. ``resolve`` gives all addresses of a host name and port; it
    raises OSError if there are none. ``allowed`` says whether an address may be connected to.
    """

    timeout_s: float
    max_bytes: int
    max_redirects: int
    hosts: Collection[str] = ()
    resolve: Callable[[str, int], Awaitable[Sequence[str]]] | None = None
    allowed: Callable[[str], bool] | None = None
    ssl_context: ssl.SSLContext = field(default_factory=httpcore.default_ssl_context)

    @classmethod
    def of(cls, settings: ServerSettings) -> Self:
        return cls(
            timeout_s=settings.url_timeout_s,
            max_bytes=MediaLimits().max_bytes,
            max_redirects=settings.max_redirects,
            hosts=settings.url_hosts,
        )

    def __post_init__(self) -> None:
        self.hosts = frozenset(map(host_of, self.hosts))
        # Threads of its own: slow names must not hold up the loop's other work.
        self._threads = ThreadPoolExecutor(8, "mico-resolve")

    async def fetch(self, url: str, target: Path, where: str) -> None:
        """Write the content of a URL to ``target``; after an error there is no such file.

        ``where`` is the field of the request that has the URL, for messages.
        """
        try:
            async with asyncio.timeout(self.timeout_s) as deadline:
                await self._follow(url, target, where)
        except BaseException as error:
            target.unlink(missing_ok=True)
            if not (isinstance(error, TimeoutError) and deadline.expired()):
                raise
            raise FetchError(
                where,
                f"took longer than the limit of {self.timeout_s:g} s (MICO_SERVER_URL_TIMEOUT_S)",
            ) from error

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _follow(self, text: str, target: Path, where: str) -> None:
        url = checked_url(text, where)
        for _ in range(self.max_redirects + 1):
            location = await self._ask(url, target, where)
            if location is None:
                return
            following = checked_url(location, where, str(url))
            if url.scheme == "https" and following.scheme != "https":
                raise FetchError(where, "redirects from https to http, which anyone can read")
            url = following
        raise FetchError(
            where,
            f"redirects more than the limit of {self.max_redirects} times "
            "(MICO_SERVER_MAX_REDIRECTS)",
        )

    async def _ask(self, url: CheckedUrl, target: Path, where: str) -> str | None:
        if self.hosts and url.host not in self.hosts:
            raise FetchError(
                where,
                f"leads to the host {url.host[:100]!r}, which is not among the allowed hosts "
                "(MICO_SERVER_URL_HOSTS)",
            )
        backend = _PinnedAddresses(await self._addresses(url, where))
        scheme, host = url.scheme.encode(), url.host.encode()
        connection = httpcore.AsyncHTTPConnection(
            httpcore.Origin(scheme, host, url.port),
            ssl_context=self.ssl_context,
            network_backend=backend,
        )
        asked = httpcore.URL(scheme=scheme, host=host, port=url.port, target=url.target.encode())
        headers: dict[str | bytes, str | bytes] = {
            "host": url.authority,
            "accept": "*/*",
            "accept-encoding": "identity",
            "user-agent": f"mico-chat/{__version__}",
        }
        try:
            async with connection, connection.stream("GET", asked, headers=headers) as response:
                found = {  # the first of each header
                    name.decode("latin-1").lower(): value.decode("utf-8", "replace")
                    for name, value in reversed(response.headers)
                }
                if response.status in _REDIRECTS and "location" in found:
                    return found["location"]
                self._check(response.status, found, where)
                await self._save(response, target, where)
        except _FAILURES as error:
            logger.debug("%s: %s: %r", where, url.authority, error)
            raise FetchError(where, _NO_ANSWER) from error
        finally:
            await backend.aclose()
        return None

    def _check(self, status: int, headers: dict[str, str], where: str) -> None:
        if status != 200:
            raise FetchError(where, f"answered with status {status}, expected 200")
        encoding = headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise FetchError(
                where,
                f"answered with content-encoding {encoding[:40]!r}, but the service asked for "
                "an answer without encoding",
            )
        claimed = headers.get("content-length", "0")
        if claimed.isdigit() and int(claimed) > self.max_bytes:
            raise self._too_long(f"{int(claimed)} bytes", where)

    async def _save(self, response: httpcore.Response, target: Path, where: str) -> None:
        received = 0
        with target.open("wb") as file:
            async for chunk in response.aiter_stream():
                received += len(chunk)
                if received > self.max_bytes:
                    raise self._too_long(f"more than {self.max_bytes} bytes", where)
                await asyncio.to_thread(file.write, chunk)

    def _too_long(self, size: str, where: str) -> LimitError:
        return LimitError(
            where,
            f"{size}, over the limit of {self.max_bytes} "
            "(max_bytes; raise it with MICO_MEDIA_MAX_BYTES)",
            "max_bytes",
        )

    async def _addresses(self, url: CheckedUrl, where: str) -> Sequence[str]:
        if url.is_address:
            addresses: Sequence[str] = (url.host,)
        else:
            try:
                addresses = await (self.resolve or self._ask_system)(url.host, url.port)
            except OSError as error:
                logger.debug("%s: %s: %r", where, url.host, error)
                addresses = ()
        if not addresses or not all(map(self.allowed or is_public, addresses)):
            raise FetchError(where, NOT_PUBLIC)
        return addresses

    async def _ask_system(self, host: str, port: int) -> Sequence[str]:
        def ask() -> list[str]:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return [str(address[0]) for *_, address in found]

        return await asyncio.get_running_loop().run_in_executor(self._threads, ask)


class _PinnedAddresses(httpcore.AsyncNetworkBackend):
    """Connects to given addresses, whatever the host's name; TLS still checks the name."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._backend = httpcore.AnyIOBackend()
        self._stream: httpcore.AsyncNetworkStream | None = None

    async def connect_tcp(
        self, host: str, port: int, *_: Any, **options: Any
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception = httpcore.ConnectError("no address")
        for address in self._addresses:
            try:
                self._stream = await self._backend.connect_tcp(address, port, timeout=5.0)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return self._stream
        raise failure

    async def aclose(self) -> None:
        if self._stream is not None:
            await self._stream.aclose()


# --- A URL is taken apart once, so that the checked host is the one that is asked ---

MAX_URL = 8192
_PORTS = {"http": 80, "https": 443}
_KEPT = "/?%:@!$&'()*+,;=~[]|"
_LABEL = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


@dataclass(frozen=True)
class CheckedUrl:
    scheme: str
    host: str
    is_address: bool
    port: int
    target: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"


def checked_url(url: str, where: str, base: str = "") -> CheckedUrl:
    """The parts of a URL, perhaps relative to ``base``; ``where`` is its field in the request.

    Everything that programs read differently is refused: user names, backslashes, control
    characters, unusual forms of addresses.
    """
    if len(url) > MAX_URL:
        raise FetchError(where, f"the URL has {len(url)} characters; the most is {MAX_URL}")
    if not url.isprintable() or "\\" in url:
        raise FetchError(where, "the URL has control characters or backslashes in it")
    try:
        parts = urlsplit(urljoin(base, url))
        port = parts.port
    except ValueError as error:
        raise FetchError(where, "this is not a URL: its host or port cannot be read") from error
    if parts.scheme not in _PORTS:
        raise FetchError(where, f"the URL has the scheme {parts.scheme[:40]!r}; use http or https")
    if "@" in parts.netloc:
        raise FetchError(where, "the URL has a user name or password in it; leave them out")
    if port == 0:
        raise FetchError(where, "this is not a URL: port 0 does not exist")
    host, is_address = _host(parts.hostname or "", "[" in parts.netloc, where)
    path, query = quote(parts.path or "/", safe=_KEPT), quote(parts.query, safe=_KEPT)
    return CheckedUrl(
        scheme=parts.scheme,
        host=host,
        is_address=is_address,
        port=port or _PORTS[parts.scheme],
        target=f"{path}?{query}" if query else path,
    )


def _host(host: str, bracketed: bool, where: str) -> tuple[str, bool]:
    if bracketed:
        return _address(host, ipaddress.IPv6Address, where)
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True).decode()
        except idna.IDNAError as error:
            raise FetchError(where, "this is not a URL: its host is not a valid name") from error
    host = host.removesuffix(".")
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        # Some programs read 0177.1 or 2130706433 as addresses; this one only the usual form.
        return _address(host, ipaddress.IPv4Address, where)
    if len(host) > 253 or not _NAME.fullmatch(host):
        raise FetchError(where, "this is not a URL: its host is not a valid name")
    return host, False


def _address(host: str, parse: Callable[[str], object], where: str) -> tuple[str, bool]:
    try:
        return str(parse(host)), True
    except ValueError as error:
        raise FetchError(where, NOT_PUBLIC) from error


def host_of(host: str) -> str:
    """A host of the operator's list, written as the hosts of URLs are written here."""
    try:
        return _host(host.lower(), ":" in host, "")[0]
    except FetchError as error:
        raise ConfigError(
            f"{host!r} is not the name of a host (MICO_SERVER_URL_HOSTS); write one like "
            "'media.example.org'"
        ) from error


# Networks that ipaddress calls global, in some releases at least, though no public machine is in
# them: IETF protocol assignments, relays from IPv6 to IPv4, multicast.
_NOT_PUBLIC_V4 = [
    ipaddress.IPv4Network(net) for net in ("192.0.0.0/24", "192.88.99.0/24", "224.0.0.0/4")
]
# Global unicast is 2000::/3, without tunnels (Teredo and others in 2001::/23, 6to4 in 2002::/16)
# and examples. Loopback, link-local, site-local and unique local are outside of it.
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = [
    ipaddress.IPv6Network(net) for net in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
]
# IPv4 inside of IPv6, where the address in the last four bytes counts: mapped, and NAT64.
_V4_IN_V6 = [ipaddress.IPv6Network(net) for net in ("::ffff:0:0/96", "64:ff9b::/96")]


def is_public(address: str) -> bool:
    """Whether an IP address is a public machine's; False for text that is not an address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:  # it names a network of this machine
            return False
        if not any(ip in network for network in _V4_IN_V6):
            return ip in _UNICAST_V6 and not any(ip in network for network in _NOT_PUBLIC_V6)
        ip = ipaddress.IPv4Address(ip.packed[-4:])
    return ip.is_global and not any(ip in network for network in _NOT_PUBLIC_V4)
