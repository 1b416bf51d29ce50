"""How a question is answered, whatever dialect it comes in: read, admitted, streamed, kept.

A :class:`Dialect` reads a request's body to a :class:`Question` and writes the events of the answer
as its own bytes. All else is here, for clients that wait, for batches and for estimates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from mico_chat.ask import Ask
from mico_chat.assistant import Answer, Assistant, Event, GatheredAnswer
from mico_chat.engine.base import Delta
from mico_chat.media.medium import MediaReport
from mico_chat.messages import without_depth
from mico_chat.wire import Estimate
from mico_server.fetch.media_reader import MediaReader, check_number
from mico_server.host import ModelHost
from mico_server.http.errors import ErrorForm, error_responses
from mico_server.http.json_body import JsonRoute
from mico_server.routes.bodies import stream_response
from mico_server.service import (
    Client,
    CurrentClient,
    EventStream,
    Service,
    event,
)

B = TypeVar("B", bound="RequestBody")
T = TypeVar("T")

WrittenEvent: TypeAlias = tuple[Any, str | None]
"""A server-sent event: its data, which is JSON text or becomes it, and its name."""

Written: TypeAlias = Iterable[WrittenEvent]


class RequestBody(BaseModel):
    """The fields that the body of a request has in every dialect."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(examples=["mini"])
    stream: bool | None = False


class Question(ABC):
    """A request that was read: what it asks, and how its answer is written.

    ``fingerprint`` says what computes the answer. An error ends a stream with an event that is
    called ``error_event``.
    """

    error_event: ClassVar[str | None] = None
    error_form: ErrorForm | None = None
    fingerprint = ""

    def __init__(self, ask: Ask, model: str, *, stream: bool) -> None:
        self.ask, self.model, self.stream = ask, model, stream

    async def prepare(self, host: ModelHost, reader: MediaReader) -> None:
        """Refuse what the loaded model cannot answer, before anything is computed or stored."""
        check_depths(self.ask, host, reader)

    @property
    def n_choices(self) -> int:
        return self.ask.options.n

    def events(self, host: ModelHost) -> AsyncGenerator[Event, None]:
        """The events of the answer; closing it stops the model."""
        return host.stream(self.ask)

    @asynccontextmanager
    async def stored(self) -> AsyncIterator[None]:
        """Keep the question while it is answered."""
        yield

    async def keep(self, answer: Answer) -> None:  # noqa: B027 - most dialects keep nothing
        """Keep the answer."""

    def keep_so_far(self, text: Callable[[], str]) -> None:  # noqa: B027
        """Keep what is answered so far, while the answer goes on."""

    async def keep_part(self, gathered: GatheredAnswer) -> None:  # noqa: B027
        """Keep what was answered before the client left."""

    @abstractmethod
    def begin(self, media: tuple[MediaReport, ...]) -> Written:
        """The first events of a stream, once the first delta exists."""

    @abstractmethod
    def write(self, delta: Delta) -> Written: ...

    @abstractmethod
    def end(self, answer: Answer) -> Written: ...

    @abstractmethod
    def whole(self, answer: Answer) -> BaseModel:
        """The answer to a request without a stream."""


def check_depths(ask: Ask, host: ModelHost, reader: MediaReader) -> None:
    """Refuse depth maps that nobody can estimate, or that would be too many media."""
    if ask.options.estimate_depth:
        host.assistant.encoder.check_estimates()
        shown = sum(len(one.media) + len(without_depth(one.media)) for one in ask.messages)
        check_number(shown, "estimate_depth", reader.service.settings)


Read: TypeAlias = Callable[[MediaReader, AsyncExitStack], Awaitable[Question]]
"""Reads a question; what it holds until the answer is there is entered into the stack."""


async def _read(client: Client, read: Read, stack: AsyncExitStack) -> tuple[Question, MediaReader]:
    client.service.models.check(client.tenant)  # before anybody uploads what will be refused
    folder = await stack.enter_async_context(client.service.media.work_folder())
    reader = MediaReader(client.service, client.tenant, folder)
    return await read(reader, stack), reader


async def _admitted(
    client: Client, question: Question, reader: MediaReader, stack: AsyncExitStack
) -> ModelHost:
    host = await client.use(stack, question.model)
    host.assistant.check_length(question.ask)
    await client.connected(question.prepare(host, reader))
    question.fingerprint = host.assistant.fingerprint
    return host


async def answer(client: Client, read: Read) -> BaseModel | EventStream:
    """The answer to a question, whole or as a stream."""
    async with AsyncExitStack() as stack:
        question, reader = await _read(client, read, stack)
        async with AsyncExitStack() as admission:
            host = await _admitted(client, question, reader, admission)
            await stack.enter_async_context(question.stored())
            # The stack ends the admission first, then what was stored.
            await stack.enter_async_context(admission.pop_all())
        if question.stream and client.receive is not None:
            return await EventStream.started(
                _streamed(question, host, stack.pop_all()),
                client.receive,
                send_timeout_s=client.service.settings.body_timeout_s,
                error_name=question.error_event,
                error_form=question.error_form,
            )
        found = await client.connected(_gathered(question, host))
        await question.keep(found)
        return question.whole(found)


async def about(client: Client, read: Read, work: Callable[[Assistant, Ask], Awaitable[T]]) -> T:
    """What an assistant says about a question that it does not answer."""
    async with AsyncExitStack() as stack:
        question, reader = await _read(client, read, stack)
        host = await _admitted(client, question, reader, stack)
        return await client.connected(host.guarded(work(host.assistant, question.ask)))


async def estimate(client: Client, read: Read) -> Estimate:
    """What the answer would cost."""
    return await about(client, read, lambda assistant, ask: assistant.estimate(ask))


async def _gathered(question: Question, host: ModelHost) -> Answer:
    gathered = GatheredAnswer(question.n_choices)
    async with aclosing(question.events(host)) as events:
        async for one in events:
            gathered.add(one)
    return gathered.answer()


async def _streamed(
    question: Question, host: ModelHost, stack: AsyncExitStack
) -> AsyncGenerator[bytes, None]:
    """The events of an answer. If the client leaves, the question keeps the text so far."""
    gathered = GatheredAnswer(question.n_choices)
    begun = False
    async with stack:
        try:
            async with aclosing(question.events(host)) as events:
                async for one in events:
                    gathered.add(one)
                    if not isinstance(one, Delta):
                        continue
                    if not begun:  # an error before the first delta has a status of its own
                        begun = True
                        for written in question.begin(gathered.reports):
                            yield event(*written)
                    for written in question.write(one):
                        yield event(*written)
                    question.keep_so_far(gathered.text)
            answer = gathered.answer()
        except BaseException:
            await question.keep_part(gathered)
            raise
        await question.keep(answer)
        for written in question.end(answer):
            yield event(*written)


@dataclass(frozen=True)
class Dialect(Generic[B]):
    """A format of questions and answers at a path: /v1/batches and the routes are made of it.

    ``read`` makes a question of a body. ``name`` and ``about`` name and describe the route,
    ``streamed`` its answer with ``stream``, whose events have the schema ``event``. Its errors
    are in OpenAI's form or in an ``error_form``, which ``more_paths`` of its router have too.
    """

    path: str
    name: str
    about: str
    body: type[B]
    read: Callable[[B, MediaReader], Awaitable[Question]]
    answer: type[BaseModel]
    streamed: str
    event: str | dict[str, Any]
    error_form: ErrorForm | None = None
    more_paths: tuple[str, ...] = ()
    router: APIRouter = field(default_factory=lambda: APIRouter(route_class=JsonRoute))

    def __post_init__(self) -> None:
        async def route(body: Any, client: CurrentClient) -> Any:
            return await answer(client, self.reading(body, client))

        route.__annotations__["body"] = self.body
        self.router.add_api_route(
            self.path,
            route,
            methods=["POST"],
            name=self.name,
            description=self.about,
            response_model=self.answer,
            responses={
                200: stream_response(self.streamed, self.event),
                **error_responses(400, 404, 410, 413, 422, 504),
            },
        )

    def reading(self, body: B, client: Client) -> Read:
        async def read(reader: MediaReader, stack: AsyncExitStack) -> Question:
            client.service.models.named(body.model)
            question = await client.connected(self.read(body, reader))
            question.error_form = self.error_form
            return question

        return read

    async def answered(self, body: B, service: Service, tenant: str) -> BaseModel:
        """The whole answer to a request that nobody waits for."""
        client = Client(service, tenant)
        answered = await answer(client, self.reading(body, client))
        assert isinstance(answered, BaseModel)  # without a connection nothing is streamed
        return answered
