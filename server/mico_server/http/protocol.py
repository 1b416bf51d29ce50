"""What a connection may cost before anybody knows who asks: uvicorn's protocol, with bounds.

uvicorn's parser keeps a head of any length for any time. Here the bytes are counted before the
parser sees them, and a connection that is not being answered has a deadline.
"""

import asyncio
import ipaddress
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from mico_chat import system
from mico_server.http.errors import error_response
from mico_server.settings import ServerSettings

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10
"""Most bytes of a request line and its headers, or between two pieces of a body: more than the
servers in front of this one let through (8 to 60 KiB)."""

MAX_HEADERS = 256
"""Most headers of a request, its trailers included: 64 KiB of short ones take megabytes."""

MAX_HEAD_PIECES = 1000
"""Most reads of a request line and its headers: one for each byte costs more than the bytes."""

MAX_PIPELINED = 16
"""Most requests that wait on a connection for the answer to the one before; clients send none."""

SOCKET_PATH = b"/v1/realtime"
"""Elsewhere a request for a WebSocket is answered as if it had not asked for one."""

OTHER_FILES = 512
"""A service opens so many files beside its connections: media, the database, the decoders'
pipes."""


@dataclass
class Connections:
    """The open connections of a service, all of them and those of each address."""

    most: int
    most_of_one: int
    of: Counter[str] = field(default_factory=Counter)
    refused: int = 0

    def enter(self, address: str) -> str | None:
        """Count a connection, or say why it is refused."""
        n, n_of_one = self.of.total(), self.of[address]
        if n >= self.most:
            return f"{n} connections are open, the most at once (MICO_SERVER_MAX_CONNECTIONS)"
        if n_of_one >= self.most_of_one:
            setting = "MICO_SERVER_MAX_CONNECTIONS_PER_ADDRESS"
            return f"{n_of_one} connections of this address are open, the most at once ({setting})"
        self.of[address] += 1
        return None

    def leave(self, address: str) -> None:
        self.of[address] -= 1
        if not self.of[address]:
            del self.of[address]


class BoundedProtocol(HttpToolsProtocol):
    """A connection. It ends ``head_timeout_s`` after it, or a request on it, began, unless the head
    has come whole by then; and ``idle_s`` after its last answer, unless another request began.
    """

    def __init__(
        self,
        *args: Any,
        connections: Connections,
        head_timeout_s: float,
        idle_s: int,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        # Another protocol takes the connection from this one, so it has to count it, too.
        self.ws_protocol_class = cast(type[asyncio.Protocol], partial(BoundedSocket, self._left))
        self._counted, self._head_timeout_s = connections, head_timeout_s
        self._idle_s = self.timeout_keep_alive = idle_s
        self._arriving = True
        self._address: str | None = None
        self._room, self._pieces = MAX_HEAD_BYTES, MAX_HEAD_PIECES
        self._deadline: asyncio.TimerHandle | None = None
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = _neighbourhood(self.client[0] if self.client else "")
        if reason := self._counted.enter(address):
            self._counted.refused += 1
            if self._counted.refused.bit_count() == 1:  # the 1st, 2nd, 4th, 8th: no flood of lines
                logger.warning("refused connection %d: %s", self._counted.refused, reason)
            self._refuse(503, f"{reason}; try again soon", "too_many_connections")
            return
        self._address = address
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._left()
        super().connection_lost(exc)

    def _left(self) -> None:
        if self._address is not None:
            self._counted.leave(self._address)
            self._address = None
        self._stop_waiting()

    def _should_upgrade(self) -> bool:
        return self.url.partition(b"?")[0] == SOCKET_PATH and super()._should_upgrade()

    def data_received(self, data: bytes) -> None:
        self._pieces -= 1
        if self._pieces < 0 and not self.transport.is_closing():
            self._refuse(431, f"headers in more than {MAX_HEAD_PIECES} pieces", "headers_too_large")
        while data and not self.transport.is_closing():
            piece, data = data[: self._room], data[self._room :]
            self._room -= len(piece)
            super().data_received(piece)
            if not self._room and not self.transport.is_closing():
                self._refuse(431, f"{MAX_HEAD_BYTES} bytes of headers or more", "headers_too_large")

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests")  # to the parser, which gives up
        super().on_message_begin()
        self._note(arriving=True)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._note(arriving=False)

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= MAX_HEADERS:
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._room, self._pieces = MAX_HEAD_BYTES, MAX_HEAD_PIECES
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._room, self._pieces = MAX_HEAD_BYTES, MAX_HEAD_PIECES
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # no other request has been waiting
            self._wait()

    def send_400_response(self, msg: str) -> None:
        if self.headers is not None and len(self.headers) >= MAX_HEADERS:
            self._refuse(431, f"more than {MAX_HEADERS} headers", "headers_too_large")
        else:
            self._refuse(400, msg, "bad_request")

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: the request is answered as if it had not asked for another protocol."""

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Close, with an answer unless another one is under way."""
        if self.cycle is None or self.cycle.response_complete:
            headers = {"connection": "close"} | ({"retry-after": "1"} if status == 503 else {})
            response = error_response(status, message, code, headers=headers)
            lines = [b"%s: %s\r\n" % header for header in response.raw_headers]
            self.transport.write(STATUS_LINE[status] + b"".join(lines) + b"\r\n" + response.body)
        self.transport.close()

    def _note(self, *, arriving: bool) -> None:
        """Note that a request begins or has come whole, and set a running deadline anew."""
        before, self._arriving = self._arriving, arriving
        if self._deadline is not None and arriving != before:
            self._wait()

    def _wait(self) -> None:
        self._stop_waiting()
        self._unsent = self.transport.get_write_buffer_size()
        busy = self._arriving or self._unsent
        seconds = self._head_timeout_s if busy else self._idle_s
        self._deadline = self.loop.call_later(seconds, self._late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        if self.transport.get_write_buffer_size() < self._unsent:
            self._wait()  # the client still takes its answer, or has just taken it
        else:
            self.transport.abort()


class BoundedSocket(WebSocketsSansIOProtocol):
    """A WebSocket; ``left`` is called when its connection ends."""

    def __init__(self, left: Callable[[], None], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._left = left

    def connection_lost(self, exc: Exception | None) -> None:
        self._left()
        super().connection_lost(exc)

    async def run_asgi(self) -> None:
        await super().run_asgi()
        self.loop.call_later(self.close_timeout, self.transport.abort)  # whoever reads nothing


def bounded_protocol(settings: ServerSettings) -> type[asyncio.Protocol]:
    """The protocol of one service, for uvicorn's ``Config``."""
    most, of_one = settings.max_connections, settings.max_connections_per_address
    made = partial(
        BoundedProtocol,
        connections=Connections(most, of_one),
        head_timeout_s=settings.head_timeout_s,
        idle_s=settings.idle_timeout_s,
    )
    return cast("type[asyncio.Protocol]", made)  # uvicorn only calls it


def _neighbourhood(host: str) -> str:
    """The address of a client. An IPv6 client has 2**64 of them, which count as one."""
    if ":" not in host:
        return host
    return str(ipaddress.ip_network((host.partition("%")[0], 64), strict=False))


def allow_open_files(n_connections: int) -> None:
    """Let this process open the files that so many connections need, as far as it may."""
    needed = n_connections + OTHER_FILES
    allowed = system.allow_open_files(needed)
    if allowed < needed:
        logger.warning(
            "%d connections need %d open files, but this process may open %d: raise its hard "
            "limit (ulimit -n), or lower MICO_SERVER_MAX_CONNECTIONS",
            *(n_connections, needed, allowed),
        )
