"""/v1/conversations: what /v1/chat has kept."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from mico_chat.engine import Usage
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MediaReport
from mico_server.conversations import (
    MAX_TITLE,
    Conversation,
    ConversationInfo,
    StoredText,
    Turn,
    TurnEnd,
)
from mico_server.errors import error_responses
from mico_server.routes.media import Deleted
from mico_server.service import CurrentCaller, CurrentService

router = APIRouter()


class ShownMedium(BaseModel):
    """A medium of a message; its file is at /v1/media/{id}/content."""

    kind: Kind
    id: str
    name: str


class TurnObject(BaseModel):
    """A message and its answer. ``finish_reason`` cancelled: the client left before its end.

    unanswered: the message is being answered now, or the server ended before it was. Asking on
    makes it a part of the next question; taking it back (DELETE) makes room to ask it again.
    ``reports`` has one for each of ``media``, and is empty for a message that is unanswered.
    """

    turn: int
    message: str
    media: list[ShownMedium]
    answer: str
    finish_reason: TurnEnd
    usage: Usage | None
    reports: tuple[MediaReport, ...]
    created_at: int

    @classmethod
    def of(cls, turn: Turn, conversation: Conversation) -> TurnObject:
        """What tells a turn."""
        shown = [
            ShownMedium(kind=p.type, id=p.media_id, name=conversation.media[p.media_id].name)
            for p in turn.parts
            if not isinstance(p, StoredText)
        ]
        return cls(
            turn=turn.number,
            message=" ".join(p.text for p in turn.parts if isinstance(p, StoredText)),
            media=shown,
            answer=turn.answer,
            finish_reason=turn.finish_reason,
            usage=turn.usage,
            reports=turn.reports,
            created_at=int(turn.created_at.timestamp()),
        )


class ConversationSummary(BaseModel):
    """A conversation without its turns. Times are seconds since 1970."""

    id: str
    object: Literal["conversation"] = "conversation"
    title: str
    system: str | None
    model: str
    created_at: int
    updated_at: int

    @classmethod
    def of(cls, info: ConversationInfo) -> ConversationSummary:
        """What tells a conversation."""
        return cls(
            id=info.id,
            title=info.title,
            system=info.system,
            model=info.model,
            created_at=int(info.created_at.timestamp()),
            updated_at=int(info.updated_at.timestamp()),
        )


class ConversationObject(ConversationSummary):
    """A whole conversation."""

    turns: list[TurnObject]


class ConversationList(BaseModel):
    """The last one answered first; ``before`` the last one's id come the next ones."""

    object: Literal["list"] = "list"
    data: list[ConversationSummary]
    has_more: bool


class Title(BaseModel):
    """A conversation's new title."""

    model_config = ConfigDict(extra="forbid")

    title: str = Field(min_length=1, max_length=MAX_TITLE)


@router.get("/v1/conversations", responses=error_responses(400, 404))
async def list_conversations(
    service: CurrentService,
    caller: CurrentCaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    before: Annotated[str | None, Query(description="the last id of the page before")] = None,
    query: Annotated[str | None, Query(description="text in titles, questions, answers")] = None,
) -> ConversationList:
    """Conversations, the last one answered first."""
    found = await service.conversations.list(
        caller.tenant, query=query, limit=limit + 1, before=before
    )
    data = [ConversationSummary.of(info) for info in found[:limit]]
    return ConversationList(data=data, has_more=len(found) > limit)


@router.get("/v1/conversations/{conversation_id}", responses=error_responses(404))
async def get_conversation(
    conversation_id: str, service: CurrentService, caller: CurrentCaller
) -> ConversationObject:
    """A conversation with all its turns."""
    found = await service.conversations.load(caller.tenant, conversation_id)
    turns = [TurnObject.of(turn, found) for turn in found.turns]
    return ConversationObject(**ConversationSummary.of(found).model_dump(), turns=turns)


@router.patch("/v1/conversations/{conversation_id}", responses=error_responses(400, 404))
async def rename_conversation(
    conversation_id: str, body: Title, service: CurrentService, caller: CurrentCaller
) -> ConversationSummary:
    """Give a conversation another title."""
    await service.conversations.rename(caller.tenant, conversation_id, body.title)
    return ConversationSummary.of(await service.conversations.load(caller.tenant, conversation_id))


@router.delete("/v1/conversations/{conversation_id}", responses=error_responses(404))
async def delete_conversation(
    conversation_id: str, service: CurrentService, caller: CurrentCaller
) -> Deleted:
    """Forget a conversation, and the media that came with it."""
    await service.conversations.delete(caller.tenant, conversation_id)
    return Deleted(id=conversation_id)


@router.delete(
    "/v1/conversations/{conversation_id}/turns/{turn}", responses=error_responses(400, 404)
)
async def delete_turns(
    conversation_id: str, turn: int, service: CurrentService, caller: CurrentCaller
) -> Deleted:
    """Take a turn and all after it back, to ask it again or otherwise.

    Media that came with them stay for an hour, so that they can be shown again by their ids.
    """
    await service.conversations.truncate(caller.tenant, conversation_id, turn)
    return Deleted(id=conversation_id)
