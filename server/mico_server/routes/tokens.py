"""POST /tokenize and /detokenize: a prompt or a conversation as token ids, and back, as in vLLM."""

from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from mico_chat.ask import Ask
from mico_chat.assistant import Assistant
from mico_chat.errors import RequestError
from mico_server import answering
from mico_server.dialects.completions import COMPLETIONS
from mico_server.dialects.prompts import PROMPTS
from mico_server.http.errors import error_responses
from mico_server.http.json_body import JsonRoute
from mico_server.routes.bodies import SCHEMAS, Objects, validated
from mico_server.service import CurrentClient

router = APIRouter(route_class=JsonRoute, tags=["tokens"])

_ERRORS = error_responses(400, 404, 413, 422, 504)
_OF_MESSAGES = {"messages", "tools", "continue_final_message", "add_generation_prompt"}
_OF_MESSAGES |= {"chat_template_kwargs"}


class TokenizeRequest(BaseModel):
    """A ``prompt``, or ``messages`` of text with their tools, which the chat template puts
    together. Without ``model`` it is the first one. ``add_special_tokens`` is for a prompt: what
    the tokenizer puts around it."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Objects | None, Field(json_schema_extra=SCHEMAS["ChatMessages"])] = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    tools: Objects | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Tokenized(BaseModel):
    """``token_strs`` are there if the request has ``return_token_strs``."""

    count: int
    max_model_len: int
    tokens: tuple[int, ...]
    token_strs: list[str] | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    tokens: Annotated[list[StrictInt], Field(fail_fast=True)]


class Detokenized(BaseModel):
    prompt: str


@router.post("/tokenize", responses=_ERRORS)
async def tokenize(body: TokenizeRequest, client: CurrentClient) -> Tokenized:
    """The token ids of a prompt, or of a conversation's prompt."""
    given = body.model_dump(exclude_none=True, include=_OF_MESSAGES)
    given["model"] = client.service.models.named(body.model).name
    if (body.prompt is None) == (body.messages is None):
        raise RequestError.at("prompt", "expected prompt or messages, and one of them alone")
    if body.messages is not None:
        if body.add_special_tokens:
            reason = "the chat template has them already; leave it out, or send a prompt"
            raise RequestError.at("add_special_tokens", reason)
        read = COMPLETIONS.reading(validated(COMPLETIONS.body, given), client)
    else:
        if others := given.keys() - {"model"}:
            raise RequestError.at(min(others), "a prompt has none; leave it out, or send messages")
        given["prompt"] = body.prompt
        read = PROMPTS.reading(validated(PROMPTS.body, given), client)
    special = body.add_special_tokens is not False

    async def tokenized(assistant: Assistant, ask: Ask) -> Tokenized:
        found = await assistant.tokens(ask, special=special)
        name = assistant.adapter.tokenizer.backend_tokenizer.id_to_token
        return Tokenized(
            count=len(found),
            max_model_len=assistant.engine.max_position,
            tokens=found,
            token_strs=list(map(name, found)) if body.return_token_strs else None,
        )

    return await answering.about(client, read, tokenized)


@router.post("/detokenize", responses=_ERRORS)
async def detokenize(body: DetokenizeRequest, client: CurrentClient) -> Detokenized:
    """The text of token ids, markup too."""
    async with AsyncExitStack() as stack:
        host = await client.use(stack, body.model)
        text = host.assistant.text_of(tuple(body.tokens), client.tenant)
        return Detokenized(prompt=await client.connected(host.guarded(text)))
