"""Media from other people's URLs, without lending them this machine's place in its network.

A request names a URL and the service asks it: unguarded, that reaches whatever the service can
reach, a cloud's metadata or a database, which the client cannot (server-side request forgery). So
every host is resolved once, all of its addresses must be public, and the connection goes to one of
just these: a name cannot be checked at one address and asked at another (DNS rebinding). A
redirect is a new URL, with the same checks. Proxies of the environment are not used, for a proxy
would resolve the name anew.

Any port of a public host may be asked. What is refused for its address is refused in the same
words whatever the address is and whether or not there is one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpcore

from mico_chat import __version__
from mico_chat.errors import LimitError
from mico_server.addresses import is_public
from mico_server.place import NOT_PUBLIC, FetchError, Place, host_of, place_of

logger = logging.getLogger(__name__)

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""All addresses of a host name and port; OSError where there are none."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RESOLVING_THREADS = 8
_CONNECT_S = 5.0
"""For each of a host's addresses: the next one may be in better health."""

_NO_ANSWER = "its host could not be reached or gave no proper answer; send the bytes instead"

_FAILURES = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    ssl.SSLError,
)


class Fetcher:
    """Fetches http and https URLs into files.

    Args:
        timeout_s: seconds one URL may take, its redirects included.
        max_bytes: of a medium.
        max_redirects: that are followed for one URL.
        hosts: the only ones that are asked, if there are any; redirects to others are refused.
        resolve: how names become addresses; the system's way by default.
        allowed: whether an address may be connected to.
        ssl_context: how hosts prove who they are; by default with a certificate of a public
            authority or of one the system trusts.

    Raises:
        ConfigError: for one of ``hosts`` that is none.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        max_bytes: int,
        max_redirects: int,
        hosts: Collection[str] = (),
        resolve: Resolve | None = None,
        allowed: Callable[[str], bool] = is_public,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.timeout_s = timeout_s
        self.max_bytes = max_bytes
        self.max_redirects = max_redirects
        self.hosts = frozenset(map(host_of, hosts))
        # Threads of its own: names that resolve slowly must not hold up the loop's other work.
        self._threads = ThreadPoolExecutor(_RESOLVING_THREADS, "mico-resolve")
        self._resolve = resolve or self._ask_system
        self._allowed = allowed
        self._ssl_context = ssl_context or httpcore.default_ssl_context()

    async def fetch(self, url: str, target: Path, where: str) -> None:
        """Write what a URL gives to ``target``; after an error there is no such file.

        ``where`` is the URL's place in the request, for messages.

        Raises:
            FetchError: for a URL that is not fetched, or gives something else than 200 and bytes.
            LimitError: for more than ``max_bytes``.
        """
        done = False
        try:
            async with asyncio.timeout(self.timeout_s) as deadline:
                await self._follow(url, target, where)
            done = True
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise FetchError(
                where,
                f"took longer than the limit of {self.timeout_s:g} s (MICO_SERVER_URL_TIMEOUT_S)",
            ) from error
        finally:
            if not done:
                target.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the threads; names that are still being resolved are given up."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _follow(self, url: str, target: Path, where: str) -> None:
        place = place_of(url, where)
        for _ in range(self.max_redirects + 1):
            location = await self._ask(place, target, where)
            if location is None:
                return
            following = place_of(location, where, place.url)
            if place.scheme == "https" and following.scheme != "https":
                raise FetchError(where, "redirects from https to http, which anyone can read")
            place = following
        raise FetchError(
            where,
            f"redirects more than the limit of {self.max_redirects} times "
            "(MICO_SERVER_MAX_REDIRECTS)",
        )

    async def _ask(self, place: Place, target: Path, where: str) -> str | None:
        """Write what one place gives to ``target``, or return where it redirects to."""
        if self.hosts and place.host not in self.hosts:
            raise FetchError(
                where,
                f"leads to the host {place.host[:100]!r}, which is not among the allowed hosts "
                "(MICO_SERVER_URL_HOSTS)",
            )
        backend = _Pinned(await self._addresses(place, where))
        connection = httpcore.AsyncHTTPConnection(
            httpcore.Origin(place.scheme.encode(), place.host.encode(), place.port),
            ssl_context=self._ssl_context,
            network_backend=backend,
        )
        url = httpcore.URL(
            scheme=place.scheme.encode(),
            host=place.host.encode(),
            port=place.port,
            target=place.target.encode(),
        )
        headers: dict[str | bytes, str | bytes] = {
            "host": place.authority,
            "accept": "*/*",
            "accept-encoding": "identity",
            "user-agent": f"mico-chat/{__version__}",
        }
        try:
            async with connection, connection.stream("GET", url, headers=headers) as response:
                found = _headers(response)
                if response.status in _REDIRECTS and "location" in found:
                    return found["location"]
                self._check(response.status, found, where)
                await self._save(response, target, where)
        except _FAILURES as error:
            logger.debug("%s: %s: %r", where, place.authority, error)
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

    async def _addresses(self, place: Place, where: str) -> Sequence[str]:
        """Where to connect for a host: resolved once, and all of it allowed."""
        if place.is_address:
            addresses: Sequence[str] = (place.host,)
        else:
            try:
                addresses = await self._resolve(place.host, place.port)
            except OSError as error:
                logger.debug("%s: %s: %r", where, place.host, error)
                addresses = ()
        if not addresses or not all(map(self._allowed, addresses)):
            raise FetchError(where, NOT_PUBLIC)
        return addresses

    async def _ask_system(self, host: str, port: int) -> Sequence[str]:
        def ask() -> list[str]:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return [str(address[0]) for *_, address in found]

        return await asyncio.get_running_loop().run_in_executor(self._threads, ask)


def _headers(response: httpcore.Response) -> dict[str, str]:
    """The first of each header, names in lower case."""
    headers: dict[str, str] = {}
    for name, value in response.headers:
        headers.setdefault(name.decode("latin-1").lower(), value.decode("utf-8", "replace"))
    return headers


class _Pinned(httpcore.AsyncNetworkBackend):
    """Connects to given addresses, whatever the host's name; TLS still checks the name."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._backend = httpcore.AnyIOBackend()
        self._stream: httpcore.AsyncNetworkStream | None = None

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address that takes the connection."""
        failure: Exception = httpcore.ConnectError("no address")
        for address in self._addresses:
            try:
                self._stream = await self._backend.connect_tcp(address, port, _CONNECT_S)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return self._stream
        raise failure

    async def aclose(self) -> None:
        """Close the connection, one that was given up half-way too."""
        if self._stream is not None:
            await self._stream.aclose()
