"""The server over HTTP, with or without an event loop.

::

    with Client("http://127.0.0.1:8000") as client:
        medium = client.send(calls.upload(Upload("image", Path("cat.jpg"))))
        question = Question("What is it?", media=[MediumId("image", medium.id)])
        with client.stream(question) as events:
            for event in events:
                if isinstance(event, Delta):
                    print(event.text, end="")

Leaving ``stream``'s block closes the connection, at which the server stops answering.
"""

from __future__ import annotations

import ipaddress
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    ExitStack,
    aclosing,
    asynccontextmanager,
    closing,
    contextmanager,
)
from functools import cache
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import ValidationError

from mico_ui.answers import ChatAnswer, ChatEvent, Delta, Reports
from mico_ui.calls import Call, Question, chat

DEFAULT_API = "http://127.0.0.1:8000"

USER_HEADER = "x-mico-user"
REQUIRE_KEY_HEADER = "x-mico-require-key"

T = TypeVar("T")


class ApiError(Exception):
    """A request that got no answer; ``str(error)`` is the server's own reason, or why none came.

    ``status`` is the HTTP status, None if the server was not reached or broke off. ``code`` and
    ``param`` are as in OpenAI's errors, ``retry_after_s`` the seconds after which to come again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


class EventReader:
    """Bytes of a stream in, events out.

    Lines end at line feeds alone: a text may have other separators of lines in it, at which
    httpx's own reader of lines would cut it.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._ended = False

    def feed(self, data: bytes) -> Iterator[ChatEvent]:
        """The events that end in ``data``.

        Raises:
            ApiError: for an event that is an error.
        """
        *blocks, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for block in blocks:
            if (event := self._event(block)) is not None:
                yield event

    def end(self) -> None:
        """To be called when no more bytes come.

        Raises:
            ApiError: if the answer is not whole.
        """
        if not self._ended:
            raise ApiError("the server broke off in the middle of its answer")

    def _event(self, block: bytes) -> ChatEvent | None:
        name, data = "", []
        for line in block.decode().split("\n"):
            key, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if key == "event":
                name = value
            elif key == "data":
                data.append(value)
        text = "\n".join(data)
        if name == "error":
            raise _error_of(json.loads(text), None, "the answer failed")
        if name == "media":
            return Reports.model_validate_json(text)
        if name == "delta":
            return Delta.model_validate_json(text)
        if name == "done":
            self._ended = True
            return ChatAnswer.model_validate_json(text)
        return None  # a comment, or an event of a newer server


class _Base:
    """What both clients share: where the server is, and what goes wrong on the way."""

    def __init__(
        self,
        api: str = DEFAULT_API,
        key: str | None = None,
        *,
        user: str | None = None,
        require_key: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        """``user`` is whom the requests are for, where one key serves many.

        ``require_key``: the requests come from others, so that the server asks for a key even
        where it needs none from this machine.

        ``timeout_s``: seconds without a byte after which a request is given up.

        Raises:
            ApiError: for an address or a key that cannot be one.
        """
        url = _address(api)
        self.api = str(url).rstrip("/")
        if not (key or "").isascii():
            raise ApiError("the key has characters in it that no key has")
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        headers |= {} if user is None else {USER_HEADER: user}
        headers |= {REQUIRE_KEY_HEADER: "1"} if require_key else {}
        self._settings: dict[str, Any] = {
            "base_url": self.api,
            "headers": headers,
            "verify": _certificates(),
            "timeout": httpx.Timeout(timeout_s, connect=10.0, pool=None),
            # A proxy cannot reach this machine's own addresses.
            "trust_env": not is_local(url.host),
        }

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise ApiError(f"no server answers at {self.api}") from error
        except httpx.TimeoutException as error:
            raise ApiError(f"the server at {self.api} takes too long to answer") from error
        except httpx.RequestError as error:
            raise ApiError(f"the connection to the server at {self.api} broke off") from error
        except (ValidationError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ApiError(f"{self.api} answers, but not as a server of mico-chat does") from error
        except OSError as error:  # a file that is to be uploaded
            reason = error.strerror or str(error)
            raise ApiError(f"{error.filename or 'file'}: {reason}") from error


class Client(_Base):
    """For code without an event loop."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._http = httpx.Client(**self._settings)

    def send(self, call: Call[T]) -> T:
        """Send a request of :mod:`mico_ui.calls`, and read its result.

        Raises:
            ApiError: if there is none.
        """
        with self._errors_told(), ExitStack() as stack:
            response = self._http.send(self._http.build_request(**call.arguments(stack)))
            _check(response)
            return call.read(response)

    @contextmanager
    def stream(self, question: Question) -> Iterator[Iterator[ChatEvent]]:
        """Ask; the events of the answer come while the block runs.

        Raises:
            ApiError: if it is refused; while iterating: if the answer fails.
        """
        with self._errors_told(), ExitStack() as files:
            request = self._http.build_request(**chat(question).arguments(files))
            response = self._http.send(request, stream=True)
        with closing(response):
            if not response.is_success:
                with self._errors_told():
                    response.read()
                    _check(response)
            yield self._events(response)

    def _events(self, response: httpx.Response) -> Iterator[ChatEvent]:
        reader = EventReader()
        with self._errors_told():
            for data in response.iter_bytes():
                yield from reader.feed(data)
            reader.end()

    def close(self) -> None:
        """End all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncClient(_Base):
    """As :class:`Client`, for code with an event loop."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._http = httpx.AsyncClient(**self._settings)

    async def send(self, call: Call[T]) -> T:
        """See :meth:`Client.send`."""
        with self._errors_told(), ExitStack() as stack:
            response = await self._http.send(self._http.build_request(**call.arguments(stack)))
            _check(response)
            return call.read(response)

    @asynccontextmanager
    async def stream(self, question: Question) -> AsyncIterator[AsyncIterator[ChatEvent]]:
        """See :meth:`Client.stream`."""
        with self._errors_told(), ExitStack() as files:
            request = self._http.build_request(**chat(question).arguments(files))
            response = await self._http.send(request, stream=True)
        async with aclosing(response):
            if not response.is_success:
                with self._errors_told():
                    await response.aread()
                    _check(response)
            yield self._events(response)

    async def _events(self, response: httpx.Response) -> AsyncIterator[ChatEvent]:
        reader = EventReader()
        with self._errors_told():
            async for data in response.aiter_bytes():
                for event in reader.feed(data):
                    yield event
            reader.end()

    async def aclose(self) -> None:
        """End all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: the page makes a client for each call, most of whose time reading them took."""
    return httpx.create_ssl_context()


def _address(api: str) -> httpx.URL:
    """The server's address, of what users write: host and port alone, or OpenAI's with /v1."""
    text = api.strip() if "://" in api else f"http://{api.strip()}"
    try:
        url = httpx.URL(text.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise ApiError(f"{api!r} is no address of a server; it looks like {DEFAULT_API}")
    return url


def host_of(netloc: str) -> str:
    """The host of ``host:port``, empty for anything else."""
    try:
        return "" if "@" in netloc else httpx.URL(f"http://{netloc}").host
    except httpx.InvalidURL:
        return ""


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    fallback = f"the server at {response.url.host} answers {response.status_code}"
    try:
        body = response.json()
    except ValueError:
        body = None
    retry = response.headers.get("retry-after", "")
    error = _error_of(body, response.status_code, f"{fallback} {response.reason_phrase}".strip())
    error.retry_after_s = float(retry) if retry.isdigit() else None
    raise error


def _error_of(body: Any, status: int | None, otherwise: str) -> ApiError:
    """The error of a body in OpenAI's shape; ``otherwise`` is its message if it is not."""
    told = body.get("error") if isinstance(body, dict) else None
    if not isinstance(told, dict) or not isinstance(told.get("message"), str):
        return ApiError(otherwise, status=status)
    return ApiError(told["message"], status=status, code=told.get("code"), param=told.get("param"))
