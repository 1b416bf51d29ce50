"""A multipart form: one message, generation options, and media in the order of the form."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from mico_chat.engine import GenerationOptions
from mico_chat.engine.base import request_error
from mico_chat.errors import MediaError, RequestError
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.messages import MediaPart
from mico_server.settings import ServerSettings
from mico_server.work_folder import WorkFolder

MEDIA_SCHEME = "media:"
"""What stands before a stored medium's id where a URL or a file may stand."""

MAX_FIELDS = 64


class ChatFields(BaseModel):
    """Fields of a form of /v1/chat beside the message, the media and the options."""

    model_config = ConfigDict(frozen=True)

    conversation_id: str | None = Field(None, description="the conversation to go on with")
    create: bool = Field(
        False,
        description="begin the conversation if there is none of this id, which is the client's "
        "own: `conv-` and 24 random hexadecimal digits. It finds an answer again that broke off",
    )
    system: str | None = Field(None, description="instructions for a new conversation")
    stream: bool = Field(False, description="answer with server-sent events")
    store: bool = Field(True, description="keep the conversation, to go on with it by its id")
    depth_scale: float = Field(
        0.001, gt=0, le=1000, description="metres for one unit of a 16-bit depth map"
    )


@dataclass(frozen=True)
class MediumId:
    """A medium that was uploaded before, by its id, shown as ``kind``."""

    kind: Kind
    id: str


@dataclass(frozen=True)
class ChatForm:
    """A message and what is shown with it; uploads are files in a folder of the caller's."""

    message: str
    media: tuple[MediaPart | MediumId, ...]
    options: GenerationOptions
    fields: ChatFields = field(default_factory=ChatFields)


OPTION_NAMES = tuple(GenerationOptions.model_fields)
FIELD_NAMES = ("message", *KINDS, *ChatFields.model_fields, *OPTION_NAMES)

T = TypeVar("T", bound=BaseModel)


def form_schema() -> dict[str, Any]:
    """JSON schema of the form, as OpenAPI has it: files are binary strings."""
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    return {
        "type": "object",
        "required": ["message"],
        "properties": {
            "message": {"type": "string"},
            **dict.fromkeys(KINDS, files),
            **ChatFields.model_json_schema()["properties"],
            **GenerationOptions.model_json_schema()["properties"],
        },
        "additionalProperties": False,
    }


def form_body(schema: dict[str, Any]) -> dict[str, Any]:
    """What tells the API's page of a route that reads its form itself, to keep its order."""
    content = {"multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


@asynccontextmanager
async def open_form(request: Request, settings: ServerSettings) -> AsyncIterator[FormData]:
    """The request's form; large uploads of it are files, which close with it.

    Raises:
        RequestError: if the body is no form.
    """
    content_type = request.headers.get("content-type", "")
    if not content_type.startswith(("multipart/form-data", "application/x-www-form-urlencoded")):
        got = repr(content_type) if content_type else "nothing"
        raise RequestError(f"content-type: expected multipart/form-data, got {got}")
    form = request.form(
        max_files=settings.max_media, max_fields=MAX_FIELDS, max_part_size=settings.max_text_bytes
    )
    async with form as fields:
        yield fields


async def read_chat_form(form: FormData, folder: WorkFolder) -> ChatForm:
    """The message, its media and the options of a form; uploads are written to ``folder``.

    Raises:
        RequestError: for a field that is missing, unknown, repeated or of the wrong sort.
        MediaError: for an upload without content.
    """
    media: list[MediaPart | MediumId] = []
    texts: dict[str, list[str]] = {}
    for name, value in form.multi_items():
        if name in KINDS:
            media.append(await _medium(name, value, folder, str(len(media))))
        else:
            texts.setdefault(name, []).append(text_of(name, value, FIELD_NAMES))
    message = _single(texts, "message")
    if message is None:
        raise RequestError.at("message", "the field is missing")
    stops = texts.pop("stop", [])
    values = {name: _single(texts, name) for name in texts}
    given = {name: values[name] for name in OPTION_NAMES if name in values}
    if "json_schema" in given:
        given["json_schema"] = _json("json_schema", given["json_schema"])
    options = GenerationOptions.of({**given, "stop": stops})
    return ChatForm(message, tuple(media), options, validated(ChatFields, values))


def text_of(name: str, value: UploadFile | str, known: tuple[str, ...]) -> str:
    """The text of a field.

    Raises:
        RequestError: for an unknown field, or a file.
    """
    if name not in known:
        raise RequestError(f"unknown field {name!r}; known are {', '.join(known)}", name)
    if isinstance(value, UploadFile):
        raise RequestError.at(name, "expected text, got a file")
    return value


def validated(model: type[T], values: dict[str, Any]) -> T:
    """A model of a form's texts.

    Raises:
        RequestError: naming the first field that makes no sense.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise request_error(error.errors()[0]) from error


def _json(name: str, text: str | None) -> Any:
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise RequestError.at(name, f"not JSON ({error})") from error


def _single(texts: dict[str, list[str]], name: str) -> str | None:
    values = texts.get(name, [])
    if len(values) > 1:
        raise RequestError.at(name, f"given {len(values)} times, expected once")
    return values[0] if values else None


async def _medium(
    kind: Kind, value: UploadFile | str, folder: WorkFolder, file: str
) -> MediaPart | MediumId:
    if isinstance(value, UploadFile):
        return await saved(kind, value, folder.file(file))
    if value.startswith(MEDIA_SCHEME):
        return MediumId(kind, value.removeprefix(MEDIA_SCHEME))
    raise RequestError(
        f"{kind}: expected a file with a file name, or {MEDIA_SCHEME}ID of an uploaded one, "
        "got other text",
        kind,
    )


async def saved(kind: Kind, upload: UploadFile, path: Path) -> MediaPart:
    """An upload as a file of its own, which the decoder's process can open.

    Raises:
        MediaError: for an upload without content.
    """
    name = display_name(upload.filename or "") or kind
    if not upload.size:
        raise MediaError(name, "the upload is empty", "empty")
    await run_in_threadpool(_copy, upload, path)
    return MediaPart(kind, path, name=name)


def _copy(upload: UploadFile, path: Path) -> None:
    with path.open("wb") as target:
        shutil.copyfileobj(upload.file, target, length=1 << 20)


def display_name(filename: str) -> str:
    """The last part of a client's file name, printable and short: it is used in messages alone."""
    last = filename.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(character for character in last if character.isprintable())[:100]
