"""POST /v1/chat: a message with any media, in a conversation that the service keeps.

The body is a multipart form or a JSON object: one message, options, and media in their order.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from mico_chat.ask import Ask
from mico_chat.assistant import Answer, GatheredAnswer
from mico_chat.engine.base import Delta
from mico_chat.errors import MicoError, RequestError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.media.medium import MediaReport
from mico_chat.messages import Message, data_of, is_data_uri
from mico_chat.options import GenerationOptions
from mico_chat.wire import ChatResponse, DeltaEvent, MediaEvent
from mico_server.answering import Question, Read, Written, answer, check_depths
from mico_server.errors import NotFoundError
from mico_server.fetch.media_reader import MEDIA_SCHEME, MediaReader, check_number
from mico_server.host import ModelHost
from mico_server.http.errors import error_responses
from mico_server.http.json_body import JsonRoute, read_json
from mico_server.routes.bodies import (
    FILE_SCHEMA,
    SCHEMAS,
    check_known,
    is_json,
    json_object,
    open_form,
    request_body,
    saved,
    stream_response,
    validated,
)
from mico_server.service import CLIENT_LEFT, CurrentClient, with_progress
from mico_server.store.conversation import (
    Conversation,
    NewTurn,
    StoredMedium,
    StoredText,
    with_question,
)
from mico_server.store.database import uninterrupted
from mico_server.store.media import NewMedium
from mico_server.store.tables import check_text, is_id, new_id

logger = logging.getLogger(__name__)

router = APIRouter(route_class=JsonRoute)


class ChatFields(BaseModel):
    """The fields of a question of /v1/chat beside the media and the options."""

    model_config = ConfigDict(frozen=True)

    message: str
    model: str | None = Field(
        None, description="a served model; by default the conversation's, or the first"
    )
    conversation_id: str | None = Field(None, description="the conversation to continue")
    create: bool = Field(
        False,
        description="begin a conversation with this id if there is none: the client's own id, "
        "`conv-` and 24 random hexadecimal digits. With it a client finds an answer again that "
        "broke off",
    )
    after: int | None = Field(
        None,
        ge=0,
        description="the turn that the message follows, 0 for the beginning; by default the last "
        "one. Turns that follow it already stay, as versions",
    )
    beside: int | None = Field(
        None,
        ge=1,
        description="the turn whose question another model answers here, too, as a version that "
        "the conversation does not go on with. That turn may still be under way",
    )
    system: str | None = Field(None, description="instructions for a new conversation")
    stream: bool = Field(False, description="answer with server-sent events")
    store: bool = Field(True, description="keep the conversation, to continue it by its id")


@dataclass(frozen=True)
class ChatForm:
    media: tuple[MediaFile, ...]
    options: GenerationOptions
    fields: ChatFields


SAVED_S = 1.0
"""What a stream has shown is kept within so many seconds."""

OPTION_NAMES = tuple(GenerationOptions.model_fields)
LISTS = ("stop", "stop_token_ids", "choice")
"""A form may have them several times."""
OBJECTS = ("json_schema", "structural_tag", "logit_bias", "mm_processor_kwargs", "media_io_kwargs")
FIELD_NAMES = (*ChatFields.model_fields, *KINDS, *OPTION_NAMES)


def chat_body(*others: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI description of a body that :func:`read_chat` reads.

    ``others`` are schemas of JSON objects that the route accepts, too.
    """
    form = _chat_schema({"type": "array", "items": FILE_SCHEMA})
    url = SCHEMAS["ChatUrl"]
    question = _chat_schema({"anyOf": [url, {"type": "array", "items": url}]})
    either = {"anyOf": [question, *others]} if others else question
    return request_body({"multipart/form-data": form, "application/json": either})


def _chat_schema(media: dict[str, Any]) -> dict[str, Any]:
    fields = ChatFields.model_json_schema()
    return {
        "type": "object",
        "required": fields["required"],
        "properties": {
            **fields["properties"],
            **dict.fromkeys(KINDS, media),
            **GenerationOptions.model_json_schema()["properties"],
        },
        "additionalProperties": False,
    }


class ChatTurn(Question):
    """A question in a conversation; it stores itself and its answer.

    ``conversation_id`` and ``number`` (from 1) are None if nothing is to be stored.
    """

    error_event = "error"

    def __init__(self, reader: MediaReader, form: ChatForm, earlier: Conversation | None) -> None:
        self._service, self._tenant = reader.service, reader.tenant
        if earlier is not None:
            media = [replace(m, heard=m.heard or m.id in earlier.heard_media) for m in form.media]
            form = replace(form, media=tuple(media))
        self._form, self._earlier = form, earlier
        self._kept: NewTurn | None = None  # the turn with its answer
        self._said = ""  # of the answer, before the question was set aside
        self.aside: tuple[str, int, NewTurn] | None = None
        self._waiting: tuple[str, int, NewTurn] | None = None  # a stored turn without an answer
        self._former: int | None = None  # the conversation's last turn before it
        self._saving: asyncio.Task[None] | None = None
        self.conversation_id: str | None = None
        self.number: int | None = None
        fields = form.fields
        model = self._service.models.named(fields.model or self._kept_model()).name
        if fields.store:
            self.conversation_id = fields.conversation_id or new_id("conv")
            self.number = 1 if earlier is None else earlier.next_number
        before = [] if earlier is None else self._service.conversations.messages(earlier)
        if fields.system is not None:
            before = [m for m in before if m.role != "system"]
            before.insert(0, Message.system(fields.system))
        self._before = before
        super().__init__(self._ask(), model, stream=fields.stream)

    @classmethod
    async def opened(cls, reader: MediaReader, form: ChatForm, stack: AsyncExitStack) -> ChatTurn:
        """The turn of a form; nobody else can ask in its conversation until ``stack`` closes."""
        service, tenant = reader.service, reader.tenant
        wanted = form.fields.conversation_id
        earlier = None
        if wanted is not None:
            if not form.fields.store:
                raise RequestError.at("store", "false, but conversation_id names a stored one")
            after, beside = form.fields.after, form.fields.beside
            if beside is not None and after is not None:
                raise RequestError.at("after", "given, but beside says where the message stands")
            held = service.conversations.answering(tenant, wanted, beside=beside is not None)
            await stack.enter_async_context(held)
            try:
                earlier = await service.conversations.load(tenant, wanted, beside or after or None)
            except NotFoundError:
                if not (form.fields.create and is_id("conv", wanted)) or after or beside:
                    raise
            if earlier is not None and beside is not None:
                after = earlier.tree[beside].parent
            if earlier is not None and after is not None:
                before = tuple(turn for turn in earlier.turns if turn.number <= after)
                earlier = replace(earlier, turns=before)
        else:
            for name in ("create", "after", "beside"):
                if getattr(form.fields, name):
                    raise RequestError.at(name, "given, but conversation_id does not say where")
        return cls(reader, form, earlier)

    def _kept_model(self) -> str | None:
        """The conversation's model, if it is still served."""
        names = [view.name for view in self._service.models.views]
        kept = None if self._earlier is None else self._earlier.model
        return kept if kept in names else None

    def _ask(self, *, alone: bool = False) -> Ask:
        """The question with the conversation before it, or ``alone``."""
        media = [file for file in self._form.media if not file.heard]
        texts = [self._form.fields.message] if self._form.fields.message or not media else []
        message = Message.user(*media, *texts)
        messages = [message] if alone else with_question(self._before, message)
        return Ask(messages, self._form.options, self._tenant)

    async def prepare(self, host: ModelHost, reader: MediaReader) -> None:
        """Show an estimated depth map behind each picture of the message, and keep it as a file."""
        alone = self._ask(alone=True)
        if not alone.options.estimate_depth:
            return
        check_depths(alone, host, reader)
        (shown,) = (await host.guarded(host.assistant.shown(alone))).messages
        own = iter(file for file in self._form.media if not file.heard)
        media = [file for file in self._form.media if file.heard]
        for number, file in enumerate(shown.files):
            if file.path is not None:
                media.append(next(own))
                continue
            path = reader.folder.file(f"depth-{number}")
            await asyncio.to_thread(path.write_bytes, file.read())
            media.append(replace(file, source=path))
        options = alone.options.model_copy(update={"estimate_depth": False})
        self._form = replace(self._form, media=tuple(media), options=options)
        self.ask = self._ask()

    @asynccontextmanager
    async def stored(self) -> AsyncIterator[None]:
        """Store the question. Inside the block it outlives the process.

        If the block ends without an answer, the question is taken back, except if the service ends.
        """
        if self.conversation_id is None or self.number is None:
            yield
            return
        store = self._service.conversations
        async with AsyncExitStack() as held:
            if self._form.fields.conversation_id is None:  # a new one, which others see from now on
                await held.enter_async_context(store.answering(self._tenant, self.conversation_id))
            try:
                if self._waiting is None:
                    await self._store(self.conversation_id, self.number)
                yield
            except asyncio.CancelledError as error:
                if CLIENT_LEFT not in error.args:
                    self._waiting = None  # the service ends, and the client still waits
                raise
            finally:
                if self._saving is not None:
                    self._saving.cancel()
                if self._waiting is not None:
                    try:
                        await store.take_back(self._tenant, *self._waiting, self._former)
                    except MicoError as error:
                        logger.warning("a question without an answer is not taken back: %s", error)

    @uninterrupted  # if the client leaves meanwhile, the whole turn is stored, then taken back
    async def _store(self, conversation_id: str, number: int) -> None:
        parts, new = await self._prepared()
        earlier = () if self._earlier is None else self._earlier.turns
        parent = earlier[-1].number if earlier else 0
        beside = self._form.fields.beside
        if self._earlier is not None and beside is not None:
            beside = self._earlier.tree[beside].beside or beside  # all are beside the first
        turn = NewTurn(parts, self.model, new_media=new, parent=parent, beside=beside)
        self._former = await self._service.conversations.add_turn(
            self._tenant,
            conversation_id,
            number,
            turn,
            create=self._earlier is None,
            system=self._form.fields.system,
        )
        self._waiting = (conversation_id, number, turn)
        self.ask = self._ask()

    @uninterrupted
    async def reword(self, form: ChatForm) -> bool:
        """Ask this instead of the question that was set aside, and go on with it.

        False if that one does not exist any more.
        """
        assert self.aside is not None
        id_, number, turn = self.aside
        self._form = form
        parts, new = await self._prepared()
        turn = replace(turn, parts=parts, new_media=(*turn.new_media, *new))
        if not await self._service.conversations.reword(self._tenant, id_, number, turn, new):
            return False
        self._waiting, self.aside = (id_, number, turn), None
        self.ask = self._ask()
        return True

    async def _prepared(self) -> tuple[list[StoredText | StoredMedium], list[NewMedium]]:
        """The parts of the question, and those of its media that are not stored yet."""
        store = self._service.media
        parts: list[StoredText | StoredMedium] = []
        new: list[NewMedium] = []
        media: list[MediaFile] = []
        for file in self._form.media:
            if file.id is None:
                assert file.path is not None  # in the work folder
                new.append(await store.prepare(file.kind, file.path, file.name))
                # Storing it moves the file.
                path = store.path_of(self._tenant, new[-1].sha256)
                file = replace(file, source=path, id=new[-1].id)
            parts.append(StoredMedium(type=file.kind, media_id=file.id, heard=file.heard))
            media.append(file)
        if self._form.fields.message or not parts:
            parts.append(StoredText(text=self._form.fields.message))
        self._form = replace(self._form, media=tuple(media))
        return parts, new

    async def keep(self, answer: Answer) -> None:
        """Add the answer to the question; when this returns, it outlives the process."""
        first = answer.choices[0]
        said = first.model_dump(include={"finish_reason", "confidence", "unsure"})
        await self._keep(answer.media, answer=first.text, usage=answer.usage, **said)

    async def keep_part(self, gathered: GatheredAnswer, said: str | None = None) -> None:
        """Add the text of a cancelled answer, or what was ``said`` of it, if possible: perhaps
        nobody is left to get an error."""
        text = gathered.text() if said is None else said
        if not text:
            return
        try:
            await self._keep(gathered.reports, answer=text, finish_reason="cancelled")
        except MicoError as error:
            logger.warning("a cancelled answer is not kept: %s", error)

    @property
    def media(self) -> tuple[MediaFile, ...]:
        """The media of the question, with their ids once it is stored."""
        return self._form.media

    @property
    def kept(self) -> bool:
        """Whether the turn stays at the end."""
        return self._waiting is None

    def set_aside(self, said: str = "") -> None:
        """Let the question stay without an answer; that of who goes on begins with ``said``."""
        self._said += said
        self.aside, self._waiting = self._waiting, None

    def go_on(self) -> None:
        self._waiting, self.aside = self.aside, None

    @property
    def cut(self) -> Callable[[str], Awaitable[None]] | None:
        """Shortens the answer that was kept to what was heard of it."""
        if self._kept is None or self.conversation_id is None or self.number is None:
            return None
        cut = self._service.conversations.cut_answer
        kept = partial(cut, self.conversation_id, self.number, self._kept)
        said = self._said
        return lambda text: kept(said + text)

    def keep_so_far(self, text: Callable[[], str]) -> None:
        """Keep the text so far soon, in case that the process is killed before the answer ends."""
        if self._saving is None or self._saving.done():
            self._saving = asyncio.create_task(self._save(text))

    async def _save(self, text: Callable[[], str]) -> None:
        await asyncio.sleep(SAVED_S)
        if self._waiting is None:
            return
        try:
            await self._service.conversations.answer_so_far(*self._waiting, self._said + text())
        except MicoError as error:
            logger.warning("a part of an answer is not kept: %s", error)

    @uninterrupted  # a client that leaves now has seen the answer
    async def _keep(self, reports: Sequence[MediaReport], **said: Any) -> None:
        """Store the fields ``said`` of the turn; ``reports`` has all media of the conversation."""
        if self._waiting is None:
            return
        if self._saving is not None:
            self._saving.cancel()
            await asyncio.wait((self._saving,))
        id_, number, turn = self._waiting
        self._waiting = None  # if storing fails, the question stays as it is
        left, own = list(reports), []  # the last ones are this message's
        for file in reversed(self._form.media):
            unseen = file.heard or not left
            own.append(MediaReport(name=file.name, kind=file.kind) if unseen else left.pop())
        said["answer"] = self._said + said["answer"]
        turn = self._kept = replace(turn, reports=own[::-1], **said)
        system = self._form.fields.system
        former = system if self._earlier is None else self._earlier.system
        await self._service.conversations.answer_turn(
            self._tenant, id_, number, turn, system=system, former=former
        )

    # --- Writing ---

    def begin(self, media: tuple[MediaReport, ...]) -> Written:
        begun = MediaEvent(conversation_id=self.conversation_id, turn=self.number, media=media)
        yield begun.model_dump_json(), "media"

    def write(self, delta: Delta) -> Written:
        said, silent = (
            DeltaEvent.model_validate(vars(delta)),
            DeltaEvent(index=delta.index, text=""),
        )
        if said != silent:
            unset = {name for name, value in vars(silent).items() if value == getattr(said, name)}
            yield said.model_dump_json(exclude=unset - {"index", "text"}), "delta"

    def end(self, answer: Answer) -> Written:
        yield self.whole(answer).model_dump_json(), "done"

    def whole(self, answer: Answer) -> ChatResponse:
        first = answer.choices[0]
        return ChatResponse.model_validate(
            {
                **vars(answer),
                **vars(first),
                "answer": first.text,
                "model": self.model,
                "conversation_id": self.conversation_id,
                "turn": self.number,
                "choices": answer.choices if len(answer.choices) > 1 else (),
            }
        )


# --- Reading ---


def reading(request: Request, body: dict[str, Any] | None = None) -> Read:
    """Read a question, a form or a JSON object; ``body`` is the object, if it was read already."""

    async def read(reader: MediaReader, stack: AsyncExitStack) -> ChatTurn:
        media, values = await read_fields(request, reader, FIELD_NAMES, body)
        for name in OBJECTS:
            if isinstance(values.get(name), str):
                values[name] = read_json(values[name], name)
        given = {name: values[name] for name in OPTION_NAMES if name in values}
        form = ChatForm(media, GenerationOptions.of(given), validated(ChatFields, values))
        return await ChatTurn.opened(reader, form, stack)

    return read


async def read_fields(
    request: Request,
    reader: MediaReader,
    names: Sequence[str],
    body: dict[str, Any] | None = None,
) -> tuple[tuple[MediaFile, ...], dict[str, Any]]:
    """The media of a form or JSON object, and its other fields, all of which are among ``names``.

    New media are written to the reader's folder.
    """
    given: list[tuple[str, Any]] = []
    if is_json(request):
        for name, value in (body or await json_object(request)).items():
            several = name in KINDS and isinstance(value, list)
            given += [(name, one) for one in (value if several else [value])]
        return await _read(given, reader, names)
    expected = "multipart/form-data or application/json"
    async with open_form(request, reader.service.settings, expected=expected) as form:
        for name, value in form.multi_items():
            given.append((name, [value] if name in LISTS else value))
        return await _read(given, reader, names)


async def _read(
    given: list[tuple[str, Any]], reader: MediaReader, names: Sequence[str]
) -> tuple[tuple[MediaFile, ...], dict[str, Any]]:
    check_number(sum(name in KINDS for name, _ in given), "request body", reader.service.settings)
    media: list[MediaFile] = []
    values: dict[str, Any] = {}
    for name, value in given:
        check_known(name, tuple(names))
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                check_text(text, name)
            elif isinstance(text, UploadFile) and name not in KINDS:
                raise RequestError.at(name, "expected text, got a file")
        if name in KINDS:
            before = sum(file.kind == name for file in media)
            where = f"{name}[{before}]" if before else name
            if isinstance(value, str) and value.startswith(MEDIA_SCHEME):
                id_ = value.removeprefix(MEDIA_SCHEME)
                media.append(await reader.service.stored_part(reader.tenant, id_, name))
            else:
                path = reader.folder.file(str(len(media)))
                media.append(await _written(name, value, where, path))
        elif name in LISTS:
            values[name] = [*values[name], *value] if name in values else value
        elif name in values:
            raise RequestError.at(name, "given several times, expected once")
        else:
            values[name] = value
    return tuple(media), values


async def _written(kind: Kind, value: Any, where: str, path: Path) -> MediaFile:
    if isinstance(value, UploadFile):
        return await saved(kind, value, path)
    if not isinstance(value, str) or not is_data_uri(value):
        raise RequestError(
            f"{where}: expected {MEDIA_SCHEME}ID of an uploaded medium, a data URI "
            "(data:...;base64,...), or a file in a multipart form",
            kind,
        )
    # In a thread: a data URI may have many megabytes.
    await run_in_threadpool(lambda: path.write_bytes(data_of(value, where)))
    return MediaFile(kind, path, name=kind)


@router.post(
    "/v1/chat",
    response_model=ChatResponse,
    responses={
        200: stream_response(
            "The answer; with `stream`, events `media`, `delta` (one for each piece of text), then "
            "`done` with the object that the answer is otherwise, or `error`; with `progress`, "
            "events `progress` whenever no other comes for a second.",
            "ChatEvent",
        ),
        **error_responses(400, 404, 409, 410, 413, 422, 504),
    },
    openapi_extra=chat_body(),
)
async def chat(request: Request, client: CurrentClient, progress: bool = False) -> Any:
    """Answer a message about any mix of media.

    Without `conversation_id` a conversation begins; with it, earlier messages and their media are
    part of the question and need not be sent again. A medium's field may also have the text
    `media:ID`, for a medium that was uploaded to /v1/media. A JSON object with the same fields is
    accepted as well, its media as `media:ID` or as data URIs.

    The message is stored before it is answered (`finish_reason` unanswered). It is taken back if
    it is refused, or if the client leaves before the first word.
    """
    answered = answer(client, reading(request))
    return await (with_progress(client, answered) if progress else answered)
