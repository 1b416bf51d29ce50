"""/v1/conversations: what /v1/chat has kept."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from mico_chat.wire import (
    ConversationList,
    ConversationObject,
    ConversationSummary,
    Deleted,
    ShownMedium,
    TurnObject,
)
from mico_server.conversations import (
    MAX_TITLE,
    Conversation,
    ConversationInfo,
    StoredText,
    Turn,
)
from mico_server.errors import error_responses
from mico_server.service import CurrentCaller, CurrentService

router = APIRouter()


class Title(BaseModel):
    """A conversation's new title."""

    model_config = ConfigDict(extra="forbid")

    title: str = Field(min_length=1, max_length=MAX_TITLE)


def _summary(info: ConversationInfo) -> ConversationSummary:
    """A conversation without its turns, as the API shows it."""
    return ConversationSummary(
        id=info.id,
        title=info.title,
        system=info.system,
        model=info.model,
        created_at=int(info.created_at.timestamp()),
        updated_at=int(info.updated_at.timestamp()),
    )


def _turn(turn: Turn, conversation: Conversation) -> TurnObject:
    """A turn as the API shows it."""
    shown = [
        ShownMedium(kind=p.type, id=p.media_id, name=conversation.media[p.media_id].name)
        for p in turn.parts
        if not isinstance(p, StoredText)
    ]
    return TurnObject(
        turn=turn.number,
        message=" ".join(p.text for p in turn.parts if isinstance(p, StoredText)),
        media=shown,
        answer=turn.answer,
        finish_reason=turn.finish_reason,
        usage=turn.usage,
        reports=turn.reports,
        created_at=int(turn.created_at.timestamp()),
    )


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
    data = [_summary(info) for info in found[:limit]]
    return ConversationList(data=data, has_more=len(found) > limit)


@router.get("/v1/conversations/{conversation_id}", responses=error_responses(404))
async def get_conversation(
    conversation_id: str, service: CurrentService, caller: CurrentCaller
) -> ConversationObject:
    """A conversation with all its turns."""
    found = await service.conversations.load(caller.tenant, conversation_id)
    turns = [_turn(turn, found) for turn in found.turns]
    return ConversationObject(**_summary(found).model_dump(), turns=turns)


@router.patch("/v1/conversations/{conversation_id}", responses=error_responses(400, 404))
async def rename_conversation(
    conversation_id: str, body: Title, service: CurrentService, caller: CurrentCaller
) -> ConversationSummary:
    """Give a conversation another title."""
    await service.conversations.rename(caller.tenant, conversation_id, body.title)
    return _summary(await service.conversations.load(caller.tenant, conversation_id))


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
