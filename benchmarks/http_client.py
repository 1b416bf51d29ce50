"""HTTP/1.1 over asyncio's streams: a client so lean that the time is the server's.

The client may leave without a word, or by a reset. It reads the bodies that this project's server
sends: with a length, or in chunks.
"""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Self

import httpx


@dataclass(frozen=True)
class Head:
    """Status and headers of an answer; the headers' names are lower case."""

    status: int
    headers: dict[str, str]


class Connection:
    """One connection. Requests go over it one after the other; ``close`` leaves at any moment.

    Every read raises ConnectionError if the connection ends before.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, address: tuple[str, int]) -> Self:
        return cls(*await asyncio.open_connection(*address))

    def close(self, *, abort: bool = False) -> None:
        """Close; with ``abort`` by a reset, which the other side meets as an error."""
        if abort:
            end = struct.pack("ii", 1, 0)
            connected = self._writer.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, end)
            self._writer.transport.abort()
        self._writer.close()

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def head(self) -> Head:
        text = (await _whole(self._reader.readuntil(b"\r\n\r\n"))).decode("latin-1")
        first, *lines = text.rstrip().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        return Head(int(first.split(" ")[1]), {k.lower(): v for k, v in headers.items()})

    async def body(self, head: Head) -> bytes:
        return b"".join([piece async for piece in self.pieces(head)])

    async def pieces(self, head: Head) -> AsyncGenerator[bytes, None]:
        if "transfer-encoding" not in head.headers:
            size = int(head.headers.get("content-length", "0"))
            yield await _whole(self._reader.readexactly(size))
            return
        while size := int(await _whole(self._reader.readuntil(b"\r\n")), 16):
            yield (await _whole(self._reader.readexactly(size + 2)))[:-2]
        await _whole(self._reader.readexactly(2))

    async def events(self, head: Head) -> AsyncIterator[tuple[str, bytes]]:
        """Read server-sent events: the name of each ("" where it has none) and its data."""
        rest = b""
        async for piece in self.pieces(head):
            *whole, rest = (rest + piece).split(b"\n\n")
            for text in whole:
                name, _, data = text.rpartition(b"data: ")
                yield name.removeprefix(b"event: ").decode().strip(), data
        if rest:
            raise ConnectionError(f"a body that ends within an event: {rest[:80]!r}")

    async def rest(self) -> bytes:
        """Read a body in chunks to its end, as it is on the wire: nothing costs less."""
        found = b""
        while not found.endswith(b"\r\n0\r\n\r\n"):
            piece = await self._reader.read(1 << 16)
            if not piece:
                raise ConnectionError("the server closed the connection")
            found += piece
        return found


async def _whole(read: Awaitable[bytes]) -> bytes:
    try:
        return await read
    except asyncio.IncompleteReadError as error:
        raise ConnectionError("the server closed the connection") from error


def request(method: str, path: str, **content: Any) -> bytes:
    """The bytes of a request; ``content`` is httpx's: ``json``, ``files``, ``headers``."""
    made = httpx.Request(method, f"http://127.0.0.1{path}", **content)
    lines = [
        f"{method} {path} HTTP/1.1",
        *(f"{name}: {made.headers[name]}" for name in made.headers),
    ]
    return "\r\n".join([*lines, "\r\n"]).encode() + made.read()


def form_request(
    path: str,
    fields: Mapping[str, Any],
    files: Sequence[tuple[str, tuple[str, bytes]]] = (),
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """The bytes of a POST of a multipart form; values that are no text are written as JSON.

    ``files`` are httpx's: for each file its field, and its name and content.
    """
    parts: list[Any] = [
        (name, (None, value if isinstance(value, str) else json.dumps(value)))
        for name, value in fields.items()
    ]
    return request("POST", path, files=[*parts, *files], headers=headers)


def address_of(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rstrip("/").rpartition(":")
    return host, int(port)


async def fetch(address: tuple[str, int], request_: bytes) -> tuple[Head, bytes]:
    """One request over a connection of its own; its whole answer."""
    with closing(await Connection.open(address)) as connection:
        await connection.send(request_)
        head = await connection.head()
        return head, await connection.body(head)
