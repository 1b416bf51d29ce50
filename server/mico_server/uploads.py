"""A multipart form: one message, generation options, and media files in the order of the form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from mico_chat.engine import GenerationOptions
from mico_chat.errors import MediaError, RequestError
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.messages import MediaPart, Message

OPTION_NAMES = tuple(GenerationOptions.model_fields)
FIELD_NAMES = ("message", *KINDS, *OPTION_NAMES)


def form_schema() -> dict[str, Any]:
    """JSON schema of the form, as OpenAPI has it: files are binary strings."""
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    return {
        "type": "object",
        "required": ["message"],
        "properties": {
            "message": {"type": "string"},
            **dict.fromkeys(KINDS, files),
            **GenerationOptions.model_json_schema()["properties"],
        },
    }


async def read_form(form: FormData, folder: Path) -> tuple[list[Message], GenerationOptions]:
    """The conversation and the options of a form; uploads are written to ``folder``.

    Raises:
        RequestError: for a field that is missing, unknown, repeated or of the wrong sort.
        MediaError: for an upload without content.
    """
    media: list[MediaPart] = []
    texts: dict[str, list[str]] = {}
    for name, value in form.multi_items():
        if name not in FIELD_NAMES:
            raise RequestError(f"unknown field {name!r}; known are {', '.join(FIELD_NAMES)}")
        if name in KINDS:
            media.append(await _saved(name, value, folder / str(len(media))))
        elif isinstance(value, UploadFile):
            raise RequestError(f"{name}: expected text, got a file")
        else:
            texts.setdefault(name, []).append(value)
    message = _single(texts, "message")
    if message is None:
        raise RequestError("message: the field is missing")
    return [Message.user(*media, message)], _options(texts)


def _options(texts: dict[str, list[str]]) -> GenerationOptions:
    values: dict[str, Any] = {}
    for name in OPTION_NAMES:
        if name == "stop":
            values["stop"] = texts.get("stop", [])
        elif (value := _single(texts, name)) is not None:
            values[name] = _json(name, value) if name == "json_schema" else value
    return GenerationOptions.of(values)


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name}: not JSON ({error})") from error


def _single(texts: dict[str, list[str]], name: str) -> str | None:
    values = texts.get(name, [])
    if len(values) > 1:
        raise RequestError(f"{name}: given {len(values)} times, expected once")
    return values[0] if values else None


async def _saved(kind: Kind, value: UploadFile | str, path: Path) -> MediaPart:
    """An upload as a file of its own, which the decoder's process can open."""
    if not isinstance(value, UploadFile):
        raise RequestError(f"{kind}: expected a file with a file name, got text")
    name = display_name(value.filename or "") or kind
    if not value.size:
        raise MediaError(name, "the upload is empty")
    await run_in_threadpool(_copy, value, path)
    return MediaPart(kind, path, name=name)


def _copy(upload: UploadFile, path: Path) -> None:
    with path.open("wb") as target:
        shutil.copyfileobj(upload.file, target, length=1 << 20)


def display_name(filename: str) -> str:
    """The last part of a client's file name, printable and short: it is used in messages alone."""
    last = filename.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(character for character in last if character.isprintable())[:100]
