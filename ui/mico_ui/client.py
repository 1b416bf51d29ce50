"""The server over HTTP, with or without an event loop.

Leaving the block of ``stream`` closes the connection, and the server stops answering.
"""

import asyncio
import ipaddress
import ssl
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from typing import Any, Self, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from mico_chat import wire
from mico_chat.wire import ChatEvent
from mico_ui.routes import Call, Question, chat

DEFAULT_API = "http://127.0.0.1:8000"

STORED_S = 5.0  # a server has stored a stopped answer, and takes another question, in this time

T = TypeVar("T")

_TYPES: dict[str, Any] = {"progress": wire.Progress, "media": wire.MediaEvent}
_TYPES |= {"delta": wire.DeltaEvent, "done": wire.ChatResponse | wire.Explanation}
_EVENTS = {name: TypeAdapter[ChatEvent](one) for name, one in _TYPES.items()}


@dataclass(eq=False)
class ApiError(Exception):
    """A request that got no answer; ``str(error)`` is the server's own reason, or why none came.

    ``status`` is the HTTP status. It is None if the server was not reached or broke off. ``code``
    is as in OpenAI's errors. ``retry_after_s`` is when to ask again, in seconds.
    """

    message: str
    status: int | None = None
    code: str | None = None
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return self.message


async def read_events(pieces: AsyncIterator[bytes]) -> AsyncIterator[ChatEvent]:
    """The events of a stream of bytes, which is cut anywhere.

    A line ends at a line feed alone. httpx's own reader of lines also ends lines at other
    separators, which a text may contain.
    """
    rest, ended = b"", False
    async for piece in pieces:
        *blocks, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for block in blocks:
            fields = [line.partition(":")[::2] for line in block.decode().split("\n")]
            name = "".join(value.removeprefix(" ") for key, value in fields if key == "event")
            text = "\n".join(value.removeprefix(" ") for key, value in fields if key == "data")
            if name == "error":
                detail = wire.ErrorBody.model_validate_json(text).error
                status = 400 if detail.type == "invalid_request_error" else None
                raise ApiError(detail.message, status, detail.code)
            if name in _EVENTS:  # not so: comments, and events of a newer server
                ended = name == "done"
                yield _EVENTS[name].validate_json(text)
    if not ended:
        raise ApiError("the server broke off in the middle of its answer")


class AsyncClient:
    def __init__(
        self,
        api: str = DEFAULT_API,
        key: str | None = None,
        *,
        user: str | None = None,
        browser: str | None = None,
        home: bool = False,
        require_key: bool = False,
    ) -> None:
        """``user`` names for whom the requests are, where one key serves many.

        ``browser`` has its own things where no key says whose requests they are. With ``home`` they
        are the person's who sits at this machine, if the server is here too. With ``require_key``
        the server asks for a key even where this machine needs none.
        """
        url = _address(api)
        self.api = str(url).rstrip("/")
        if not (key or "").isascii():
            raise ApiError("the key has characters in it that no key has")
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        headers |= {} if user is None else {"x-mico-user": user}
        headers |= {} if browser is None else {"x-mico-browser": browser}
        headers |= {"x-mico-home": "1"} if home and is_local(url.host) else {}
        headers |= {"x-mico-require-key": "1"} if require_key else {}
        self._http = httpx.AsyncClient(
            base_url=self.api,
            headers=headers,
            verify=_certificates(),
            timeout=httpx.Timeout(600.0, connect=10.0, pool=None),
            # A proxy cannot reach this machine's own addresses.
            trust_env=not is_local(url.host),
        )

    async def send(self, call: Call[T]) -> T:
        with self._errors_in_words(), ExitStack() as files:
            response = await self._http.send(self._http.build_request(**call.arguments(files)))
            _check(response)
            return call.read(response)

    @asynccontextmanager
    async def stream(self, asked: Question | Call[None]) -> AsyncIterator[AsyncIterator[ChatEvent]]:
        """Ask; the events of the answer come while the block runs.

        For STORED_S the question is asked again while the conversation is busy.
        """
        call = chat(asked) if isinstance(asked, Question) else asked
        until = time.monotonic() + STORED_S
        while (response := await self._ask(call)).status_code == HTTPStatus.CONFLICT:
            if time.monotonic() > until:
                break
            await response.aclose()
            await asyncio.sleep(0.1)
        async with aclosing(response):
            if not response.is_success:
                with self._errors_in_words():
                    await response.aread()
                    _check(response)
            yield self._events(response)

    @asynccontextmanager
    async def live(self, path: str, **params: str | None) -> AsyncIterator[ClientConnection]:
        """A WebSocket of the server while the block runs; that it breaks off is an error."""
        given = {name: value for name, value in params.items() if value is not None}
        url = self._http.base_url.join(path).copy_merge_params(given)
        how: dict[str, Any] = {"ssl": _certificates()} if url.scheme == "https" else {}
        how |= {"proxy": None if is_local(url.host) else True}
        # Sound in base64 does not become smaller. The server looks for itself who is still there.
        how |= {"compression": None, "ping_interval": None}
        sent = ("authorization", "x-mico-")
        headers = [one for one in self._http.headers.items() if one[0].startswith(sent)]
        address = str(url.copy_with(scheme="wss" if url.scheme == "https" else "ws"))
        with self._errors_in_words():
            try:
                connection = await connect(address, additional_headers=headers, **how)
            except InvalidStatus as error:
                told = error.response
                how = {"headers": list(told.headers.raw_items()), "content": bytes(told.body)}
                _check(httpx.Response(told.status_code, request=httpx.Request("GET", url), **how))
                raise
            except (OSError, WebSocketException) as error:
                raise ApiError(f"no server answers at {self.api}") from error
        try:
            async with connection:
                yield connection
        except ConnectionClosed as error:
            reason = error.rcvd.reason if error.rcvd is not None else ""
            raise ApiError(reason or f"the connection to {self.api} broke off") from error

    async def _ask(self, call: Call[None]) -> httpx.Response:
        with self._errors_in_words(), ExitStack() as files:
            request = self._http.build_request(**call.arguments(files))
            return await self._http.send(request, stream=True)

    async def _events(self, response: httpx.Response) -> AsyncIterator[ChatEvent]:
        with self._errors_in_words():
            async for event in read_events(response.aiter_bytes()):
                yield event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    @contextmanager
    def _errors_in_words(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise ApiError(f"no server answers at {self.api}") from error
        except httpx.TimeoutException as error:
            raise ApiError(f"the server at {self.api} takes too long to answer") from error
        except httpx.RequestError as error:
            raise ApiError(f"the connection to the server at {self.api} broke off") from error
        except (ValidationError, UnicodeDecodeError) as error:
            raise ApiError(f"{self.api} answers, but not as a server of mico-chat does") from error
        except OSError as error:  # a file that is to be uploaded
            reason = error.strerror or str(error)
            raise ApiError(f"{error.filename or 'file'}: {reason}") from error


class Client:
    """An :class:`AsyncClient` for code without an event loop, with the same arguments."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self._client = AsyncClient(*args, **keywords)
        self._runner = asyncio.Runner()
        self.api = self._client.api

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a task to its end, or raise KeyboardInterrupt at Ctrl-C.

        Nothing else stops a task for good here. But where the HTTP library stops it in the same
        moment, the runner raises CancelledError instead.
        """
        try:
            return self._runner.run(work)
        except asyncio.CancelledError as error:
            raise KeyboardInterrupt from error

    def send(self, call: Call[T]) -> T:
        return self._run(self._client.send(call))

    @contextmanager
    def stream(self, question: Question) -> Iterator[Iterator[ChatEvent]]:
        answer = self._client.stream(question)
        events = self._run(answer.__aenter__())

        async def following() -> ChatEvent | None:
            return await anext(events, None)

        try:
            yield iter(lambda: self._run(following()), None)
        finally:
            self._run(answer.__aexit__(None, None, None))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._run(self._client.__aexit__())
        self._runner.close()


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: the page makes a client for each call, and most of its time went into reading."""
    return httpx.create_ssl_context()


def _address(api: str) -> httpx.URL:
    """The server's address as users write it: host and port alone, or OpenAI's with /v1."""
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
    retry = response.headers.get("retry-after", "")
    retry_after_s = float(retry) if retry.isdigit() else None
    try:
        detail = wire.ErrorBody.model_validate_json(response.content).error
    except ValidationError as error:  # not a server of ours, perhaps a proxy before it
        status = f"{response.status_code} {response.reason_phrase}".strip()
        message = f"the server at {response.url.host} answers {status}"
        raise ApiError(message, response.status_code, None, retry_after_s) from error
    raise ApiError(detail.message, response.status_code, detail.code, retry_after_s)
