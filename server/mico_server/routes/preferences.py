"""Which of two answers is better: said of a stored turn, and exported as pairs to learn from."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, TypeGuard

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from mico_chat.media import MediaFile
from mico_chat.media.file import mime_type
from mico_chat.messages import Message, TextPart, media_of
from mico_chat.wire import ConversationSummary
from mico_server.errors import NotFoundError
from mico_server.http.errors import error_responses
from mico_server.http.json_body import JsonRoute
from mico_server.service import Client, CurrentClient
from mico_server.store.conversation import (
    Conversation,
    StoredMedium,
    Turn,
)

router = APIRouter(route_class=JsonRoute)


class Preference(BaseModel):
    """``over`` is the turn with the worse answer, with which the better one stood side by side."""

    model_config = ConfigDict(extra="forbid")

    over: int = Field(ge=1)


@router.put(
    "/v1/conversations/{conversation_id}/turns/{turn}/preference",
    responses=error_responses(400, 404, 409),
)
async def prefer(
    conversation_id: str, turn: int, body: Preference, client: CurrentClient
) -> ConversationSummary:
    """Keep that this turn has the better answer of two; the conversation goes on with it."""
    store = client.service.conversations
    await store.prefer(client.tenant, conversation_id, turn, body.over)
    return ConversationSummary.model_validate(await store.load(client.tenant, conversation_id))


@router.get(
    "/v1/preferences",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {"application/jsonl": {"schema": {"type": "string"}}},
            "description": "JSON Lines: `prompt`, `chosen` and `rejected` are lists of messages, "
            "`media` are those of the prompt, and `models` gave the two answers. With `images`, a "
            "content is a list of parts, and each row has a list of `images`.",
        }
    },
)
async def preferences(
    client: CurrentClient,
    images: Annotated[
        bool, Query(description="the pictures too, as data URLs: for models that see them")
    ] = False,
) -> StreamingResponse:
    """All preferences, in the conversational format that TRL's DPOTrainer reads."""
    return StreamingResponse(_lines(client, images), media_type="application/jsonl")


async def _lines(client: Client, images: bool) -> AsyncIterator[str]:
    store = client.service.conversations
    for id_ in await store.with_preferences(client.tenant):
        try:
            found = await store.load(client.tenant, id_)
        except NotFoundError:
            continue  # it was deleted meanwhile
        for turn in found.tree.values():
            first = found.tree.get(turn.beside or 0)
            if first is not None and turn.preferred in (first.number, turn.number):
                later = turn.preferred == turn.number
                better, worse = (turn, first) if later else (first, turn)
                row = await asyncio.to_thread(_row, client, found, better, worse, images)
                yield json.dumps(row, ensure_ascii=False) + "\n"


def _row(
    client: Client, found: Conversation, better: Turn, worse: Turn, images: bool
) -> dict[str, Any]:
    path = found.path(better.number)
    messages = client.service.conversations.messages(replace(found, turns=path))[:-1]
    media = [part for turn in path for part in turn.parts if isinstance(part, StoredMedium)]
    row: dict[str, Any] = {
        "prompt": [_said(one, images) for one in messages],
        "chosen": [_said(Message.assistant(better.answer), images)],
        "rejected": [_said(Message.assistant(worse.answer), images)],
        "media": [
            {"kind": one.type, "id": one.media_id, "name": found.media[one.media_id].name}
            for one in media
        ],
        "models": {"chosen": better.model or "", "rejected": worse.model or ""},
    }
    if images:
        row["images"] = [_url(one) for one in media_of(messages) if _is_shown(one)]
    return row


def _said(message: Message, images: bool) -> dict[str, Any]:
    """A message as TRL takes it; one with images holds each picture where it was shown."""
    parts: list[dict[str, str]] = [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in message.content
        if isinstance(part, TextPart) or _is_shown(part)
    ]
    return {"role": message.role, "content": parts if images else message.text}


def _is_shown(part: object) -> TypeGuard[MediaFile]:
    return isinstance(part, MediaFile) and part.kind == "image"


def _url(file: MediaFile) -> str:
    data = file.read()
    return f"data:{mime_type(file.kind, data)};base64,{base64.b64encode(data).decode()}"
