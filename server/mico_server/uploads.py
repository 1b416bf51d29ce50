"""A question of /v1/chat, a multipart form or a JSON object: one message, generation options, and
media in the order of the form or object."""

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
from mico_chat.errors import LimitError, MediaError, RequestError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.messages import data_of, is_data_uri
from mico_server.settings import ServerSettings
from mico_server.texts import check_text
from mico_server.work_folder import WorkFolder

MEDIA_SCHEME = "media:"
"""What stands before a stored medium's id where a URL or a file may stand."""

MAX_FIELDS = 64


class ChatFields(BaseModel):
    """Fields of a question of /v1/chat beside the message, the media and the options."""

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
    media: tuple[MediaFile | MediumId, ...]
    options: GenerationOptions
    fields: ChatFields = field(default_factory=ChatFields)


OPTION_NAMES = tuple(GenerationOptions.model_fields)
FIELD_NAMES = ("message", *KINDS, *ChatFields.model_fields, *OPTION_NAMES)

T = TypeVar("T", bound=BaseModel)


_FILE = {"type": "string", "format": "binary"}
_URL = {
    "type": "string",
    "description": "media:ID of an uploaded medium, or a data URI (data:...;base64,...)",
    "pattern": "^(media:|[Dd][Aa][Tt][Aa]:)",
}


def chat_body(*others: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI's words for a question that :func:`read_chat` reads.

    ``others`` are schemas of JSON objects that a route takes beside it.
    """
    form = _chat_schema({"type": "array", "items": _FILE})
    question = _chat_schema({"anyOf": [_URL, {"type": "array", "items": _URL}]})
    either = {"anyOf": [question, *others]} if others else question
    return request_body({"multipart/form-data": form, "application/json": either})


def _chat_schema(media: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["message"],
        "properties": {
            "message": {"type": "string"},
            **dict.fromkeys(KINDS, media),
            **ChatFields.model_json_schema()["properties"],
            **GenerationOptions.model_json_schema()["properties"],
        },
        "additionalProperties": False,
    }


def request_body(schemas: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """OpenAPI's words for a route that reads its body itself; a schema for each media type."""
    content = {media_type: {"schema": schema} for media_type, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


def is_json(request: Request) -> bool:
    """Whether the request says that its body is JSON."""
    return request.headers.get("content-type", "").startswith("application/json")


async def read_chat(
    request: Request,
    settings: ServerSettings,
    folder: WorkFolder,
    body: dict[str, Any] | None = None,
) -> ChatForm:
    """A question, a form or a JSON object; its media are written to ``folder``.

    ``body`` is the JSON object, where it has been read already.

    Raises:
        RequestError: for another body, or a field that is missing, unknown, repeated or of the
            wrong sort.
        MediaError: for an upload without content.
        LimitError: for more media than a request may have.
    """
    if is_json(request):
        return await _read_chat_json(body or await json_object(request), settings, folder)
    expected = "multipart/form-data or application/json"
    async with open_form(request, settings, expected=expected) as form:
        return await _read_chat_form(form, folder)


async def json_object(request: Request) -> dict[str, Any]:
    """The request's JSON object.

    Raises:
        RequestError: if its body is none.
    """
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"request body: not JSON ({error})") from error
    if not isinstance(body, dict):
        raise RequestError("request body: expected a JSON object")
    return body


async def _read_chat_json(
    body: dict[str, Any], settings: ServerSettings, folder: WorkFolder
) -> ChatForm:
    for name, value in body.items():
        _check_known(name, FIELD_NAMES)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):  # a form cannot spell what JSON can
                check_text(text, name)
    message = body.get("message")
    if not isinstance(message, str):
        raise _missing() if message is None else RequestError.at("message", "expected a string")
    media: list[MediaFile | MediumId] = []
    for kind in (name for name in body if name in KINDS):
        urls = body[kind] if isinstance(body[kind], list) else [body[kind]]
        for number, url in enumerate(urls):
            where = f"{kind}[{number}]" if isinstance(body[kind], list) else kind
            media.append(await _medium_of_url(kind, url, where, folder, str(len(media))))
    if len(media) > (most := settings.max_media):
        raise LimitError(
            "request body", f"{len(media)} media, over the limit of {most} (MICO_SERVER_MAX_MEDIA)"
        )
    options = GenerationOptions.of({name: body[name] for name in OPTION_NAMES if name in body})
    return ChatForm(message, tuple(media), options, validated(ChatFields, body))


async def _medium_of_url(
    kind: Kind, url: Any, where: str, folder: WorkFolder, file: str
) -> MediaFile | MediumId:
    if isinstance(url, str) and url.startswith(MEDIA_SCHEME):
        return MediumId(kind, url.removeprefix(MEDIA_SCHEME))
    if not isinstance(url, str) or not is_data_uri(url):
        raise RequestError(
            f"{where}: expected {MEDIA_SCHEME}ID of an uploaded medium or a data URI "
            "(data:...;base64,...); a file goes into a multipart form",
            kind,
        )
    # In a thread: a data URI may have many megabytes.
    path = folder.file(file)
    await run_in_threadpool(lambda: path.write_bytes(data_of(url, where)))
    return MediaFile(kind, path, name=kind)


@asynccontextmanager
async def open_form(
    request: Request, settings: ServerSettings, *, expected: str = "multipart/form-data"
) -> AsyncIterator[FormData]:
    """The request's form; large uploads of it are files, which close with it.

    Raises:
        RequestError: if the body is no form; ``expected`` says which bodies the route takes.
    """
    content_type = request.headers.get("content-type", "")
    if not content_type.startswith(("multipart/form-data", "application/x-www-form-urlencoded")):
        got = repr(content_type) if content_type else "nothing"
        raise RequestError(f"content-type: expected {expected}, got {got}")
    form = request.form(
        max_files=settings.max_media, max_fields=MAX_FIELDS, max_part_size=settings.max_text_bytes
    )
    async with form as fields:
        yield fields


async def _read_chat_form(form: FormData, folder: WorkFolder) -> ChatForm:
    media: list[MediaFile | MediumId] = []
    texts: dict[str, list[str]] = {}
    for name, value in form.multi_items():
        if name in KINDS:
            media.append(await _medium(name, value, folder, str(len(media))))
        else:
            texts.setdefault(name, []).append(text_of(name, value, FIELD_NAMES))
    message = _single(texts, "message")
    if message is None:
        raise _missing()
    stops = texts.pop("stop", [])
    values: dict[str, Any] = {name: _single(texts, name) for name in texts}
    given = {name: values[name] for name in OPTION_NAMES if name in values}
    if "json_schema" in given:
        given["json_schema"] = _json("json_schema", given["json_schema"])
    if stops:
        given["stop"] = stops
    options = GenerationOptions.of(given)
    return ChatForm(message, tuple(media), options, validated(ChatFields, values))


def text_of(name: str, value: UploadFile | str, known: tuple[str, ...]) -> str:
    """The text of a field.

    Raises:
        RequestError: for an unknown field, or a file.
    """
    _check_known(name, known)
    if isinstance(value, UploadFile):
        raise RequestError.at(name, "expected text, got a file")
    return value


def _check_known(name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise RequestError(f"unknown field {name!r}; known are {', '.join(known)}", name)


def _missing() -> RequestError:
    return RequestError.at("message", "the field is missing")


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
) -> MediaFile | MediumId:
    if isinstance(value, UploadFile):
        return await saved(kind, value, folder.file(file))
    if value.startswith(MEDIA_SCHEME):
        return MediumId(kind, value.removeprefix(MEDIA_SCHEME))
    raise RequestError(
        f"{kind}: expected a file with a file name, or {MEDIA_SCHEME}ID of an uploaded medium; "
        "got other text",
        kind,
    )


async def saved(kind: Kind, upload: UploadFile, path: Path) -> MediaFile:
    """An upload as a file of its own, which the decoder's process can open.

    Raises:
        MediaError: for an upload without content.
    """
    name = display_name(upload.filename or "") or kind
    if not upload.size:
        raise MediaError(name, "the upload is empty", "empty")
    await run_in_threadpool(_copy, upload, path)
    return MediaFile(kind, path, name=name)


def _copy(upload: UploadFile, path: Path) -> None:
    with path.open("wb") as target:
        shutil.copyfileobj(upload.file, target, length=1 << 20)


def display_name(filename: str) -> str:
    """The last part of a client's file name, printable and short: only messages show it."""
    last = filename.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(character for character in last if character.isprintable())[:100]
