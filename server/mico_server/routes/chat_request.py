"""A question of /v1/chat, a multipart form or a JSON object: one message, generation options, and
media in the order of the form or object."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from mico_chat.engine.base import GenerationOptions, request_error
from mico_chat.errors import MediaError, RequestError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.messages import data_of, is_data_uri
from mico_server.fetch.media_reader import MEDIA_SCHEME, check_number, display_name
from mico_server.http.json_body import read_json
from mico_server.service import Service
from mico_server.settings import ServerSettings
from mico_server.store.blobs import WorkFolder
from mico_server.store.tables import check_text

DepthScale = Annotated[
    float, Field(gt=0, le=1000, description="metres for one unit of a 16-bit depth map")
]

EstimateDepth = Annotated[
    bool,
    Field(
        description="estimate a depth map of each picture, and show it behind the picture; a "
        "message that has a depth map gets none. Needs a server with MICO_DEPTH_MODEL"
    ),
]

# An error for each wrong item of a long list would take a kilobyte and 10 us: the first must do.
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


def _few(metadata: Any) -> Any:
    """Refuse too many pairs before each of them gets an error of its own."""
    if isinstance(metadata, dict) and len(metadata) > 16:
        raise ValueError(f"{len(metadata)} pairs, over the limit of 16")
    return metadata


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    BeforeValidator(_few),
    Field(max_length=16, description="the client's own notes, of OpenAI's sizes"),
]


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
    system: str | None = Field(None, description="instructions for a new conversation")
    stream: bool = Field(False, description="answer with server-sent events")
    store: bool = Field(True, description="keep the conversation, to continue it by its id")
    depth_scale: DepthScale = 0.001
    estimate_depth: EstimateDepth = False


@dataclass(frozen=True)
class FormMedium:
    """A medium of a question: with the ``id`` of a stored one, or new, in the work folder."""

    file: MediaFile
    id: str | None = None


@dataclass(frozen=True)
class ChatForm:
    media: tuple[FormMedium, ...]
    options: GenerationOptions
    fields: ChatFields


OPTION_NAMES = tuple(GenerationOptions.model_fields)
FIELD_NAMES = (*ChatFields.model_fields, *KINDS, *OPTION_NAMES)

T = TypeVar("T", bound=BaseModel)


# --- The description of the API ---

SCHEMAS: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_name("openapi.yaml").read_text("utf-8")
)
_CHARSETS = frozenset({b"utf-8", b"us-ascii", b"iso-8859-1"})

FILE_SCHEMA = {"type": "string", "format": "binary"}


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


def request_body(schemas: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The OpenAPI description of a body that the route reads itself: a schema for each type."""
    content = {media_type: {"schema": schema} for media_type, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


def schema_of(
    model: type[BaseModel], mode: Literal["validation", "serialization"] = "validation"
) -> dict[str, Any]:
    """The schema of a model; it refers to the models inside it, which other routes describe."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}", mode=mode)
    schema.pop("$defs", None)
    return schema


def stream_response(description: str, event: str) -> dict[str, Any]:
    """The OpenAPI description of an answer that may be server-sent events of a schema."""
    items = {"itemSchema": SCHEMAS[event]}  # as the framework describes its own streams
    return {"description": description, "content": {"text/event-stream": items}}


# --- Reading ---


def is_json(request: Request) -> bool:
    return request.headers.get("content-type", "").startswith("application/json")


async def read_chat(
    request: Request,
    service: Service,
    tenant: str,
    folder: WorkFolder,
    body: dict[str, Any] | None = None,
) -> ChatForm:
    """Read a question, a form or a JSON object; its new media are written to ``folder``.

    ``body`` is the JSON object, if it has been read already.
    """
    given: list[tuple[str, Any]] = []
    if is_json(request):
        for name, value in (body or await json_object(request)).items():
            several = name in KINDS and isinstance(value, list)
            given += [(name, one) for one in (value if several else [value])]
        return await _read(given, service, tenant, folder)
    expected = "multipart/form-data or application/json"
    async with open_form(request, service.settings, expected=expected) as form:
        for name, value in form.multi_items():
            given.append((name, [value] if name == "stop" else value))
        return await _read(given, service, tenant, folder)


async def _read(
    given: list[tuple[str, Any]], service: Service, tenant: str, folder: WorkFolder
) -> ChatForm:
    check_number(sum(name in KINDS for name, _ in given), "request body", service.settings)
    media: list[FormMedium] = []
    values: dict[str, Any] = {}
    for name, value in given:
        check_known(name, FIELD_NAMES)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                check_text(text, name)
            elif isinstance(text, UploadFile) and name not in KINDS:
                raise RequestError.at(name, "expected text, got a file")
        if name in KINDS:
            before = sum(medium.file.kind == name for medium in media)
            where = f"{name}[{before}]" if before else name
            if isinstance(value, str) and value.startswith(MEDIA_SCHEME):
                id_ = value.removeprefix(MEDIA_SCHEME)
                media.append(FormMedium(await service.stored_part(tenant, id_, name), id_))
            else:
                path = folder.file(str(len(media)))
                media.append(FormMedium(await _written(name, value, where, path)))
        elif name == "stop":
            values[name] = [*values[name], *value] if name in values else value
        elif name in values:
            raise RequestError.at(name, "given several times, expected once")
        else:
            values[name] = value
    if isinstance(values.get("json_schema"), str):
        values["json_schema"] = read_json(values["json_schema"], "json_schema")
    options = GenerationOptions.of({name: values[name] for name in OPTION_NAMES if name in values})
    return ChatForm(tuple(media), options, validated(ChatFields, values))


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


async def json_object(request: Request) -> dict[str, Any]:
    body = await request.json()
    if not isinstance(body, dict):
        raise RequestError("request body: expected a JSON object")
    return body


@asynccontextmanager
async def open_form(
    request: Request, settings: ServerSettings, *, expected: str = "multipart/form-data"
) -> AsyncIterator[FormData]:
    """The request's form; its large uploads are temporary files until the block ends."""
    content_type = request.headers.get("content-type", "")
    if not content_type.startswith(("multipart/form-data", "application/x-www-form-urlencoded")):
        got = repr(content_type) if content_type else "nothing"
        raise RequestError(f"content-type: expected {expected}, got {got}")
    _, options = parse_options_header(content_type)
    if options.get(b"charset", b"utf-8").lower() not in _CHARSETS:  # codecs of Python's own, too
        known = ", ".join(sorted(charset.decode() for charset in _CHARSETS))
        raise RequestError(f"content-type: expected a charset of {known}, or none")
    form = request.form(
        max_files=settings.max_media, max_fields=64, max_part_size=settings.max_text_bytes
    )
    async with form as fields:
        yield fields


def check_known(name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise RequestError(f"unknown field {name!r}; known are {', '.join(known)}", name)


def validated(model: type[T], values: dict[str, Any]) -> T:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise request_error(error.errors()[0]) from error


async def saved(kind: Kind, upload: UploadFile, path: Path) -> MediaFile:
    """An upload as a file of its own, which the decoder's process can open."""
    name = display_name(upload.filename or "") or kind
    if not upload.size:
        raise MediaError(name, "the upload is empty", "empty")

    def copy() -> None:
        with path.open("wb") as target:
            shutil.copyfileobj(upload.file, target, length=1 << 20)

    await run_in_threadpool(copy)
    return MediaFile(kind, path, name=name)
