"""HTTP/1.1 over bare sockets: a client so lean that the time is the server's.

It can also misbehave: send half a request, read a few bytes at a time, or leave without a word. It
reads the bodies that this project's server sends: with a length, or in chunks.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

_READ = 1 << 16


@dataclass(frozen=True)
class File:
    """A file of a multipart form, in the field ``field``."""

    field: str
    name: str
    data: bytes


@dataclass(frozen=True)
class Head:
    """Status and headers of an answer; the headers' names are lower case."""

    status: int
    headers: dict[str, str]


class Connection:
    """One connection. Requests go over it one after the other; ``close`` leaves at any moment.

    A slow client reads ``piece`` bytes at once and waits ``pause_s`` seconds before each read.
    Every read raises ConnectionError if the connection ends before.
    """

    def __init__(self, connected: socket.socket, piece: int = _READ, pause_s: float = 0.0) -> None:
        self._socket = connected
        self._piece, self._pause_s = piece, pause_s
        self._loop = asyncio.get_running_loop()
        self._buffer = b""

    @classmethod
    async def open(cls, address: tuple[str, int], **reading: Any) -> Self:
        connecting = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        connecting.setblocking(False)
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.get_running_loop().sock_connect(connecting, address)
        except BaseException:
            connecting.close()
            raise
        return cls(connecting, **reading)

    def close(self, *, abort: bool = False) -> None:
        """Close; with ``abort`` by a reset, which the other side meets as an error."""
        if abort:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._socket, data)

    async def head(self) -> Head:
        lines = (await self._until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:])
        return Head(int(lines[0].split(" ")[1]), {k.lower(): v for k, v in headers.items()})

    async def body(self, head: Head) -> bytes:
        return b"".join([piece async for piece in self.pieces(head)])

    async def pieces(self, head: Head) -> AsyncGenerator[bytes, None]:
        if "transfer-encoding" not in head.headers:
            yield await self._exactly(int(head.headers.get("content-length", "0")))
            return
        while size := int(await self._until(b"\r\n"), 16):
            yield (await self._exactly(size + 2))[:-2]
        await self._exactly(2)

    async def events(self, head: Head) -> AsyncIterator[tuple[str, bytes]]:
        """Read server-sent events: each one's name ("" where it has none) and data."""
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
        while not self._buffer.endswith(b"\r\n0\r\n\r\n"):
            await self._read()
        found, self._buffer = self._buffer, b""
        return found

    async def _until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            await self._read()
        found, _, self._buffer = self._buffer.partition(end)
        return found

    async def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self._read()
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    async def _read(self) -> None:
        if self._pause_s:
            await asyncio.sleep(self._pause_s)
        data = await self._loop.sock_recv(self._socket, self._piece)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer += data


def request(
    method: str,
    path: str,
    body: bytes = b"",
    content_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    if body:
        head += f"content-type: {content_type}\r\ncontent-length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


def json_request(path: str, value: Any, headers: Mapping[str, str] | None = None) -> bytes:
    return request("POST", path, json.dumps(value).encode(), headers=headers)


def form_request(
    path: str,
    fields: Mapping[str, Any],
    files: Sequence[File] = (),
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """The bytes of a POST of a multipart form; values that are no text are written as JSON."""
    boundary = uuid.uuid4().hex
    parts = [
        (f'name="{name}"', (value if isinstance(value, str) else json.dumps(value)).encode())
        for name, value in fields.items()
    ]
    parts += [(f'name="{file.field}"; filename="{file.name}"', file.data) for file in files]
    body = b"".join(
        f"--{boundary}\r\ncontent-disposition: form-data; {what}\r\n\r\n".encode() + data + b"\r\n"
        for what, data in parts
    )
    body += f"--{boundary}--\r\n".encode()
    return request("POST", path, body, f"multipart/form-data; boundary={boundary}", headers)


def address_of(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rstrip("/").rpartition(":")
    return host, int(port)


async def fetch(address: tuple[str, int], request_: bytes) -> tuple[Head, bytes]:
    """One request over a connection of its own; its whole answer."""
    connection = await Connection.open(address)
    try:
        await connection.send(request_)
        head = await connection.head()
        return head, await connection.body(head)
    finally:
        connection.close()
