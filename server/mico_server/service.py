"""The parts that all routes share: the models, the stores, the settings, who is asking.

Work for a client ends when the client leaves; a stream of server-sent events is such work.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message as AsgiMessage
from starlette.types import Receive, Scope, Send

from mico_chat.ask import NOTE
from mico_chat.errors import MicoError, RequestError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.speech import Voices
from mico_chat.wire import Progress
from mico_server.fetch.fetcher import Fetcher
from mico_server.host import ModelHost
from mico_server.http.auth import Caller, ClientSecrets
from mico_server.http.errors import ErrorForm, mico_error_body
from mico_server.http.limits import Sessions
from mico_server.models import Models
from mico_server.settings import ServerSettings
from mico_server.store.batches import BatchStore
from mico_server.store.conversations import ConversationStore
from mico_server.store.keys import KeyStore
from mico_server.store.media import MediaStore
from mico_server.store.taught import TaughtStore

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """One running service. ``fetcher`` is None if media are not fetched from URLs.

    ``ending`` is set once the service is to end: whoever waits for news alone gives up then.
    """

    settings: ServerSettings
    models: Models
    keys: KeyStore
    media: MediaStore
    conversations: ConversationStore
    batches: BatchStore
    fetcher: Fetcher | None
    taught: TaughtStore
    sessions: Sessions
    counted: Callable[[Caller], Awaitable[None]]
    left: Callable[[Caller], Awaitable[list[dict[str, Any]]]]
    secrets: ClientSecrets = field(default_factory=ClientSecrets)
    voices: Voices = field(default_factory=Voices)
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    async def stored_part(self, tenant: str, media_id: str, kind: Kind) -> MediaFile:
        record = await self.media.get(tenant, media_id)
        if record.kind != kind:
            raise RequestError.at(
                kind, f"{media_id} ({record.name}) is of kind {record.kind}; show it as that"
            )
        return MediaFile(kind, self.media.path(record), record.name, id=media_id)


@dataclass(frozen=True)
class Client:
    """Who asks, and has sent its whole body. Without ``receive`` nobody waits for the answer."""

    service: Service
    tenant: str
    receive: Receive | None = None

    async def connected(self, work: Awaitable[T]) -> T:
        """The result of work that ends when the client leaves."""
        return await (work if self.receive is None else while_connected(self.receive, work))

    async def use(self, stack: AsyncExitStack, name: str | None) -> ModelHost:
        """A loaded model until ``stack`` closes."""
        using = self.service.models.use(name, self.tenant)
        return await self.connected(stack.enter_async_context(using))


async def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


async def _caller(request: Request) -> Caller:
    return cast(Caller, request.state.caller)


async def _client(request: Request) -> Client:
    return Client(await _service(request), (await _caller(request)).tenant, request.receive)


# Async functions: FastAPI would call plain functions in a thread each.
CurrentService = Annotated[Service, Depends(_service)]
CurrentCaller = Annotated[Caller, Depends(_caller)]
CurrentClient = Annotated[Client, Depends(_client)]


# --- Work for a client that may leave ---

CLIENT_LEFT = "the client left"
"""The message of a cancellation because the client left; other cancellations have another."""


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client disconnects.

    The request's body must have been read before.
    """

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(disconnected())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel(CLIENT_LEFT if leaving.done() else None)
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event. If ``data`` is text, it must be JSON already."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {text}\n\n".encode()


EVENTS = "text/event-stream"


class EventStream(StreamingResponse):
    """Sends a first event, then each of ``events`` as soon as it exists.

    A MicoError of ``events`` ends the stream with an event that is called ``error_name``; where the
    ``media_type`` has no events, it breaks the connection.
    ``events`` is closed when the client leaves, or takes nothing for ``send_timeout_s`` seconds.
    """

    _events: AsyncGenerator[bytes, None]
    _send_timeout_s: float

    @classmethod
    async def started(
        cls,
        events: AsyncGenerator[bytes, None],
        receive: Receive | None,
        *,
        send_timeout_s: float,
        error_name: str | None = None,
        error_form: ErrorForm | None = None,
        media_type: str = EVENTS,
    ) -> EventStream:
        """The response, once its first event exists; an error before it gets its own status."""
        try:
            first = await (while_connected(receive, anext(events)) if receive else anext(events))
        except BaseException:
            await events.aclose()
            raise

        async def pieces() -> AsyncGenerator[bytes, None]:
            yield first
            try:
                async for piece in events:
                    yield piece
            except MicoError as error:
                if media_type != EVENTS:
                    raise
                body = mico_error_body(error)
                yield event(error_form(error.status, body) if error_form else body, error_name)

        # A proxy must neither store nor buffer the stream.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        response = cls(pieces(), headers=headers, media_type=media_type)
        response._events, response._send_timeout_s = events, send_timeout_s
        return response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def timed(message: AsgiMessage) -> None:
            async with asyncio.timeout(self._send_timeout_s):
                await send(message)

        try:
            async with aclosing(self._events):
                await while_connected(receive, self.stream_response(timed))
        except ClientDisconnect:
            logger.info("%s: the client disconnected", scope["path"])
        except TimeoutError:
            logger.info("%s: the client stopped reading; the connection was closed", scope["path"])


PROGRESS_AFTER_S, PROGRESS_EVERY_S = 1.0, 0.25


async def with_progress(client: Client, work: Awaitable[BaseModel | EventStream]) -> EventStream:
    """The events of an answer and, where the next one takes long, how far the work for it is."""
    now, wait_s = asyncio.get_running_loop().time, client.service.settings.body_timeout_s
    items: asyncio.Queue[bytes | Progress | None] = asyncio.Queue()

    async def run() -> None:
        NOTE.set(items.put_nowait)
        try:
            found = await work
            if not isinstance(found, EventStream):
                items.put_nowait(event(found.model_dump_json(), "done"))
                return
            async with aclosing(found._events):
                async for piece in found.body_iterator:
                    items.put_nowait(cast(bytes, piece))
        finally:
            items.put_nowait(None)

    async def events() -> AsyncGenerator[bytes, None]:
        running, told, due = asyncio.create_task(run()), "", now() + PROGRESS_AFTER_S
        try:
            while (item := await items.get()) is not None:
                if isinstance(item, bytes):
                    yield item
                    told, due = "", now() + PROGRESS_AFTER_S
                elif item.what == told if item.done == item.total > 0 else now() >= due:
                    yield event(item.model_dump_json(), "progress")
                    told, due = item.what, now() + PROGRESS_EVERY_S
            await running  # raises its error
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            running.cancel(*(error.args if cancelled else (CLIENT_LEFT,)))
            await asyncio.wait((running,))
            raise

    return await EventStream.started(events(), None, send_timeout_s=wait_s, error_name="error")
