"""Bodies of requests: forms, JSON, and their description in OpenAPI."""

import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from fastapi import Request
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from mico_chat.errors import LimitError, MediaError, RequestError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.options import request_error
from mico_server.fetch.media_reader import display_name
from mico_server.settings import ServerSettings

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


T = TypeVar("T", bound=BaseModel)


# --- The description of the API ---

SCHEMAS: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_name("openapi.yaml").read_text("utf-8")
)
_CHARSETS = frozenset({b"utf-8", b"us-ascii", b"iso-8859-1"})

FILE_SCHEMA = {"type": "string", "format": "binary"}


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


def stream_response(description: str, event: str | dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI description of an answer that may be server-sent events of a schema."""
    # As the framework describes its own streams.
    items = {"itemSchema": SCHEMAS[event] if isinstance(event, str) else event}
    return {"description": description, "content": {"text/event-stream": items}}


# --- Reading ---


def is_json(request: Request) -> bool:
    return request.headers.get("content-type", "").startswith("application/json")


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
    async with AsyncExitStack() as stack:
        try:
            fields = await stack.enter_async_context(form)
        except HTTPException as error:  # starlette names neither the bytes nor the setting
            if "maximum size" not in str(error.detail):
                raise
            most = settings.max_text_bytes
            raise LimitError(
                "request body", f"a text of more than {most:,} bytes (MICO_SERVER_MAX_TEXT_BYTES)"
            ) from error
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
    await run_in_threadpool(copy, upload, path)
    return MediaFile(kind, path, name=name)


def copy(upload: UploadFile, path: Path) -> None:
    with path.open("wb") as target:
        shutil.copyfileobj(upload.file, target, length=1 << 20)
