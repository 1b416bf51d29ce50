"""/v1/conversations and /v1/media: what the service keeps for a tenant."""

import asyncio
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Self

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mico_chat import wire
from mico_chat.ask import Ask
from mico_chat.errors import RequestError
from mico_chat.media import MediaFile
from mico_chat.media.file import mime_type
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.media.medium import MediaReport
from mico_chat.messages import Message
from mico_chat.options import DepthScale, GenerationOptions
from mico_chat.wire import Deleted, MediaObject
from mico_server.errors import NotFoundError
from mico_server.http.errors import error_responses
from mico_server.http.json_body import JsonRoute
from mico_server.routes.bodies import (
    FILE_SCHEMA,
    check_known,
    open_form,
    request_body,
    saved,
    validated,
)
from mico_server.service import Client, CurrentClient, with_progress
from mico_server.settings import MAX_TTL_S
from mico_server.store.conversation import (
    Conversation,
    NewTurn,
    StoredMedium,
    StoredText,
    Turn,
    text_in,
)
from mico_server.store.conversations import MAX_TITLE
from mico_server.store.tables import new_id

router = APIRouter(route_class=JsonRoute)

Limit = Annotated[int, Query(ge=1, le=100)]

_LATEST = 253_370_764_800  # the year 9999, Python's last

LOOKED_S = 1.0  # changes may come from another process


# --- Conversations ---


class Changes(BaseModel):
    """What changes of a conversation; what is not named stays."""

    model_config = ConfigDict(extra="forbid")

    title: str | None = Field(None, min_length=1, max_length=MAX_TITLE)
    turn: int | None = Field(None, description="read along the newest path through this turn")
    system: str | None = Field(
        None, description="instructions for all answers from now on, or null"
    )
    pinned: bool | None = Field(None, description="it stands first in the list")
    archived: bool | None = Field(None, description="lists without archived ones leave it out")
    pinned_media: dict[str, bool] | None = Field(
        None,
        min_length=1,
        description="ids of media of the conversation: true pins one, so that it stays where "
        "truncation leaves its turn out",
    )

    @property
    def given(self) -> dict[str, Any]:
        found = self.model_dump(exclude_none=True)
        return found | ({"system": self.system} if "system" in self.model_fields_set else {})

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.given:
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        return self


class ConversationsState(BaseModel):
    """``state`` is another text after each change of any of the conversations."""

    state: str


class ImportedConversation(BaseModel):
    """A conversation as GET gives it with all versions; its media are the client's own."""

    model_config = ConfigDict(extra="ignore")

    title: str = Field(min_length=1, max_length=MAX_TITLE)
    system: str | None = None
    model: str = Field("", max_length=512)
    pinned: bool = False
    archived: bool = False
    head: int | None = None
    turns: list[wire.TurnObject] = Field(min_length=1, fail_fast=True)

    def renumbered(self) -> list[NewTurn]:
        """The turns, numbered from 1 without gaps, each behind its parent."""
        numbers, found = {0: 0}, []
        for at, turn in enumerate(self.turns):
            if turn.turn in numbers or turn.parent not in numbers:
                reason = f"turn {turn.turn} behind {turn.parent}: expected each turn once, and"
                raise RequestError.at(f"turns[{at}]", f"{reason} behind one that stands before it")
            if not 0 <= turn.created_at <= _LATEST:
                reason = f"{turn.created_at}: expected seconds since 1970, at most {_LATEST}"
                raise RequestError.at(f"turns[{at}].created_at", reason)
            numbers[turn.turn] = at + 1
            shown = [
                StoredMedium(type=one.kind, media_id=one.id, pinned=one.pinned, heard=one.heard)
                for one in turn.media
            ]
            said = [StoredText(text=turn.message)] if turn.message or not shown else []
            reports = [MediaReport(name=one.name, kind=one.kind) for one in turn.media]
            ended = {"answer", "finish_reason", "usage", "confidence", "unsure"}
            beside = numbers.get(turn.rival or -1)  # of a pair the later turn names the other
            preferred = None if beside is None else numbers.get(turn.preferred or -1)
            found.append(
                NewTurn(
                    (*shown, *said),
                    turn.model or self.model,
                    reports=turn.reports if len(turn.reports) == len(shown) else reports,
                    created_at=datetime.fromtimestamp(turn.created_at, UTC),
                    parent=numbers[turn.parent],
                    beside=beside,
                    preferred=preferred,
                    **{name: getattr(turn, name) for name in ended},
                )
            )
        return found


def _turn(turn: Turn, conversation: Conversation) -> wire.TurnObject:
    parts = [p for p in turn.parts if isinstance(p, StoredMedium)]
    named = [(p.type, conversation.media[p.media_id]) for p in parts]
    shown = [
        wire.ShownMedium(
            kind=kind,
            id=m.id,
            name=m.name,
            pinned=m.id in conversation.pinned_media,
            heard=m.id in conversation.heard_media,
        )
        for kind, m in named
    ]
    told = {"turn": turn.number, "message": text_in(turn.parts), "media": shown}
    told |= {"versions": conversation.versions[turn.parent]}
    told |= {"later": conversation.later[turn.number], "model": turn.model or ""}
    if (pair := conversation.rivals.get(turn.number)) is not None:
        rival = pair.beside if pair.number == turn.number else pair.number
        told |= {"rival": rival, "preferred": pair.preferred}
    return wire.TurnObject.model_validate({**dict(turn), **told})


@router.get("/v1/conversations", responses=error_responses(400, 404))
async def list_conversations(
    client: CurrentClient,
    limit: Limit = 20,
    before: Annotated[str | None, Query(description="the last id of the page before")] = None,
    query: Annotated[
        str | None,
        Query(
            max_length=1000,
            description='words or "phrases" in titles, turns, file names and texts of media',
        ),
    ] = None,
    pinned: Annotated[bool | None, Query(description="only these, or only others")] = None,
    archived: Annotated[bool | None, Query(description="only these, or only others")] = None,
) -> wire.ConversationList:
    """Conversations: pinned ones first, and among both the last one answered first."""
    store = client.service.conversations
    found = await store.list(
        client.tenant,
        query=query,
        limit=limit + 1,
        before=before,
        pinned=pinned,
        archived=archived,
    )
    page = {"data": found[:limit], "has_more": len(found) > limit}
    return wire.ConversationList.model_validate(page)


@router.post("/v1/conversations", status_code=201, responses=error_responses(400, 404))
async def import_conversation(
    body: ImportedConversation, client: CurrentClient
) -> wire.ConversationSummary:
    """Store a conversation that was exported, as a new one: all its turns, with new numbers.

    Its media must be stored already: upload them to /v1/media, and name them by their new ids.
    """
    store, id_ = client.service.conversations, new_id("conv")
    turns, order = body.renumbered(), body.model_dump(include={"title", "pinned", "archived"})
    chosen = next((n for n, one in enumerate(body.turns, 1) if one.turn == body.head), None)
    await store.import_turns(client.tenant, id_, turns, body.system, turn=chosen, **order)
    return wire.ConversationSummary.model_validate(await store.load(client.tenant, id_))


@router.get("/v1/conversations/state", responses=error_responses(400))
async def conversations_state(
    client: CurrentClient,
    known: Annotated[str, Query(description="the state that the client knows")] = "",
    wait_s: Annotated[float, Query(ge=0, le=300, description="seconds to wait for a change")] = 20,
) -> ConversationsState:
    """Whether conversations have changed: at once if the state is not ``known``, else as soon as it
    is another one, or when the time is over."""
    until, ending = time.monotonic() + wait_s, client.service.ending
    while True:
        state = await client.service.conversations.state(client.tenant)
        if state != known or time.monotonic() > until or ending.is_set():
            return ConversationsState(state=state)
        with suppress(TimeoutError):
            await client.connected(asyncio.wait_for(ending.wait(), LOOKED_S))


@router.get("/v1/conversations/{conversation_id}", responses=error_responses(400, 404))
async def get_conversation(
    conversation_id: str,
    client: CurrentClient,
    turn: Annotated[int | None, Query(description="the newest path through this turn")] = None,
    all_versions: Annotated[bool, Query(description="the turns of all paths, by number")] = False,
) -> wire.ConversationObject:
    """A conversation with the turns of one path: that to the turn asked last, or chosen last."""
    found = await client.service.conversations.load(client.tenant, conversation_id, turn)
    shown = found.tree.values() if all_versions else found.turns
    turns = [_turn(one, found) for one in shown]
    return wire.ConversationObject.model_validate({**vars(found), "turns": turns})


@router.patch("/v1/conversations/{conversation_id}", responses=error_responses(400, 404))
async def change_conversation(
    conversation_id: str, body: Changes, client: CurrentClient
) -> wire.ConversationSummary:
    """Rename a conversation, pin or archive it, give it a system prompt, pin its media, or choose
    among the versions of its turns. The answer that is under way keeps the system prompt that it
    began with.
    """
    store = client.service.conversations
    await store.change(client.tenant, conversation_id, **body.given)
    return wire.ConversationSummary.model_validate(await store.load(client.tenant, conversation_id))


@router.delete("/v1/conversations/{conversation_id}", responses=error_responses(404))
async def delete_conversation(conversation_id: str, client: CurrentClient) -> Deleted:
    """Delete a conversation, and the media that came with it."""
    await client.service.conversations.delete(client.tenant, conversation_id)
    return Deleted(id=conversation_id)


@router.delete(
    "/v1/conversations/{conversation_id}/turns/{turn}", responses=error_responses(400, 404, 409)
)
async def delete_turns(
    conversation_id: str,
    turn: int,
    client: CurrentClient,
    turns: Annotated[
        int | None, Query(ge=1, description="how many are to go; another number is refused")
    ] = None,
) -> Deleted:
    """Delete a turn and all turns that follow it. To ask differently, nothing need be deleted.

    Media that came with them stay for an hour, so that they can be shown again by their ids.
    """
    store = client.service.conversations
    await store.delete_turns(client.tenant, conversation_id, turn, turns)
    return Deleted(id=conversation_id)


@router.post(
    "/v1/conversations/{conversation_id}/turns/{turn}/explanation",
    response_model=wire.Explanation,
    responses=error_responses(400, 404, 410, 504),
)
async def explain_turn(
    conversation_id: str, turn: int, client: CurrentClient, progress: bool = False
) -> Any:
    """Which media of the conversation the answer of a turn rests on.

    Each medium, and each of its parts, is left out in turn, and the answer is scored again. The
    media are those of this turn and all before it, in order. With `progress` it comes as events:
    `progress`, then `done` with the explanation, or `error`.
    """
    explained = _explained(conversation_id, turn, client)
    return await (with_progress(client, explained) if progress else explained)


async def _explained(conversation_id: str, turn: int, client: Client) -> wire.Explanation:
    found = await client.service.conversations.load(client.tenant, conversation_id, turn)
    turns = [one for one in found.turns if one.number <= turn]
    if turns[-1].finish_reason == "unanswered":
        raise NotFoundError(f"conversation {conversation_id} has no answer in turn {turn}")
    *before, answer = client.service.conversations.messages(replace(found, turns=tuple(turns)))
    async with AsyncExitStack() as stack:
        host = await client.use(stack, found.model)
        explaining = host.assistant.explain(Ask(before, tenant=client.tenant), answer.text)
        return await client.connected(host.guarded(explaining))


# --- Media ---


class MediaFields(BaseModel):
    """The fields of an upload beside its file."""

    model_config = ConfigDict(frozen=True)

    ttl_s: int | None = Field(
        None,
        ge=1,
        le=MAX_TTL_S,
        description="seconds it is kept; a conversation that shows it keeps it longer",
    )
    depth_scale: DepthScale = 0.001
    model: str | None = Field(
        None, description="the served model whose tokens are counted; the first one by default"
    )
    read: bool = Field(
        True,
        description="false: text and speech in it are recognised, and their tokens counted, when "
        "it is first asked about or estimated",
    )


_UPLOAD: dict[str, Any] = {
    "type": "object",
    "description": "exactly one file of one kind",
    "properties": {
        **dict.fromkeys(KINDS, FILE_SCHEMA),
        **MediaFields.model_json_schema()["properties"],
    },
    "oneOf": [{"required": [kind]} for kind in KINDS],
    "additionalProperties": False,
}


@router.post(
    "/v1/media",
    status_code=201,
    responses=error_responses(400, 404, 413, 422, 504),
    openapi_extra=request_body({"multipart/form-data": _UPLOAD}),
)
async def upload(request: Request, client: CurrentClient) -> MediaObject:
    """Store a file, in the field of its kind, if it can be decoded."""
    client.service.models.check(client.tenant)
    async with (
        open_form(request, client.service.settings) as form,
        client.service.media.work_folder() as folder,
        AsyncExitStack() as stack,
    ):
        parts: list[MediaFile] = []
        texts: dict[str, str] = {}
        for name, value in form.multi_items():
            if name in KINDS and not isinstance(value, str):
                parts.append(await saved(name, value, folder.file(str(len(parts)))))
                continue
            check_known(name, (*KINDS, *MediaFields.model_fields))
            if not isinstance(value, str):
                raise RequestError.at(name, "expected text, got a file")
            texts[name] = value
        if len(parts) != 1 or any(name in KINDS for name in texts):
            raise RequestError(
                f"expected exactly one file, in one of the fields {', '.join(KINDS)}; "
                f"got {len(parts)}"
            )
        fields = validated(MediaFields, texts)
        file = replace(parts[0], depth_scale=fields.depth_scale)
        host = await client.use(stack, fields.model)
        report = await client.connected(host.inspect(file, client.tenant, read=fields.read))
        assert file.path is not None  # where the upload was written
        record = await client.service.media.add(
            client.tenant,
            file.kind,
            file.path,
            file.name,
            ttl_s=fields.ttl_s or client.service.settings.media_ttl_s,
            report=report,
        )
    return MediaObject.model_validate(record)


@router.post(
    "/v1/media/{media_id}/depth",
    status_code=201,
    responses=error_responses(400, 404, 410, 413, 422, 504),
)
async def estimate_depth(
    media_id: str,
    client: CurrentClient,
    model: Annotated[str | None, Query(description="as in an upload")] = None,
) -> MediaObject:
    """Store the depth map of a stored picture, estimated from it by MICO_DEPTH_MODEL.

    Its report names that model. Show it behind its picture to ask about both.
    """
    picture = await client.service.stored_part(client.tenant, media_id, "image")
    async with client.service.media.work_folder() as folder, AsyncExitStack() as stack:
        host = await client.use(stack, model)
        estimating = GenerationOptions(estimate_depth=True)
        ask = Ask([Message.user(picture)], estimating, client.tenant)
        (shown,) = (await client.connected(host.guarded(host.assistant.shown(ask)))).messages
        _, depth = shown.files
        report = await client.connected(host.inspect(depth, client.tenant))
        path = folder.file("depth")
        await asyncio.to_thread(path.write_bytes, depth.read())
        record = await client.service.media.add(
            client.tenant,
            depth.kind,
            path,
            depth.name,
            ttl_s=client.service.settings.media_ttl_s,
            report=report,
        )
    return MediaObject.model_validate(record)


@router.get("/v1/media", responses=error_responses(400, 404))
async def list_media(
    client: CurrentClient,
    limit: Limit = 20,
    after: str | None = None,
    kind: Kind | None = None,
) -> wire.MediaList:
    """Stored media, the newest first."""
    found = await client.service.media.list(client.tenant, limit=limit + 1, after=after, kind=kind)
    data = [MediaObject.model_validate(record) for record in found[:limit]]
    return wire.MediaList(data=data, has_more=len(found) > limit)


@router.get("/v1/media/{media_id}", responses=error_responses(404))
async def get_medium(media_id: str, client: CurrentClient) -> MediaObject:
    """A stored medium without its file."""
    return MediaObject.model_validate(await client.service.media.get(client.tenant, media_id))


@router.get(
    "/v1/media/{media_id}/content",
    response_class=FileResponse,
    responses={
        200: {
            "content": {"*/*": {"schema": FILE_SCHEMA}},
            "description": "The file, as uploaded.",
        },
        **error_responses(404, 410),
    },
)
async def content(media_id: str, client: CurrentClient) -> FileResponse:
    """The file itself."""
    record = await client.service.media.get(client.tenant, media_id)
    path = client.service.media.path(record)
    with path.open("rb") as file:
        kind = mime_type(record.kind, file.read(64))
    # A browser that opens this address must run nothing of an uploaded file.
    headers = {"content-security-policy": "sandbox", "x-content-type-options": "nosniff"}
    return FileResponse(path, media_type=kind, filename=record.name, headers=headers)


@router.delete("/v1/media/{media_id}", responses=error_responses(404, 409))
async def delete_medium(media_id: str, client: CurrentClient) -> Deleted:
    """Delete a medium that no conversation shows."""
    await client.service.media.delete(client.tenant, media_id)
    return Deleted(id=media_id)
