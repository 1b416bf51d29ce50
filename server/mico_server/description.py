"""The description of the API where the framework cannot know it by itself.

Messages and content parts are checked by :mod:`mico_chat.messages`, whose errors name the part at
fault; to the framework they are any JSON. And what does not fit a route's types is answered with
400 and this service's own error, not with the framework's 422.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

from mico_chat.media.kinds import KINDS
from mico_chat.wire import ErrorBody

_FRAMEWORKS = ("HTTPValidationError", "ValidationError")


def _object(required: list[str], **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


_URL = {
    "type": "string",
    "description": "a data URI, media:ID of an uploaded medium, or, where the service allows it, "
    "http(s)",
}
_TEXT_PART = _object(["type", "text"], type={"const": "text"}, text={"type": "string"})
_MEDIA_PARTS = [
    _object(
        ["type", f"{kind}_url"],
        type={"const": f"{kind}_url"},
        **{f"{kind}_url": {"anyOf": [_object(["url"], url=_URL), _URL]}},
    )
    for kind in KINDS
] + [
    _object(
        ["type", "input_audio"],
        type={"const": "input_audio"},
        input_audio=_object(
            ["data", "format"],
            data={"type": "string", "contentEncoding": "base64", "minLength": 4},
            format={"enum": ["wav", "mp3", "flac", "ogg", "opus", "m4a", "aac"]},
        ),
    )
]

MESSAGES: dict[str, Any] = {
    "items": _object(
        ["role", "content"],
        role={"enum": ["system", "developer", "user", "assistant"]},
        content={
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {"anyOf": [_TEXT_PART, *_MEDIA_PARTS]},
                },
            ]
        },
    ),
    "examples": [[{"role": "user", "content": "What is the capital of France?"}]],
}
"""Messages of /v1/chat/completions, beside their number."""

_ITEM = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        *_MEDIA_PARTS,
        {"type": "array", "minItems": 1, "items": {"anyOf": _MEDIA_PARTS}},
    ]
}
ITEMS: dict[str, Any] = {
    "anyOf": [*_ITEM["anyOf"][:-1], {"type": "array", "minItems": 1, "items": _ITEM}],
    "examples": ["a red square"],
}
"""One or many items of /v1/embeddings and /v1/score."""


def event_stream(description: str, **data: dict[str, Any]) -> dict[str, Any]:
    """A response of server-sent events by their names, each with the schema of its JSON."""
    events = [
        _object(
            ["event", "data"],
            event={"const": name},
            data={
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": schema,
            },
        )
        for name, schema in data.items()
    ]
    # One item, as the framework describes its own streams.
    content = {"text/event-stream": {"itemSchema": {"oneOf": events}}}
    return {"description": description, "content": content}


def schema_of(
    model: type[BaseModel], mode: Literal["validation", "serialization"] = "validation"
) -> dict[str, Any]:
    """The schema of a model; other routes have brought those of the models inside it."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}", mode=mode)
    schema.pop("$defs", None)
    return schema


def reference(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of a model that some route answers with."""
    return {"$ref": f"#/components/schemas/{model.__name__}"}


class DescribedApi(FastAPI):
    """A FastAPI that tells how to send a key, and its own errors instead of the framework's."""

    def openapi(self) -> dict[str, Any]:
        """The description, made when it is first asked for."""
        schema = super().openapi()
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}, {}]  # a service on loopback may need none
        schemas = schema["components"]["schemas"]
        if all(schemas.pop(name, None) is None for name in _FRAMEWORKS):
            return schema
        invalid = {
            "description": "Bad Request",
            "content": {"application/json": {"schema": reference(ErrorBody)}},
        }
        for path in schema["paths"].values():
            for operation in path.values():
                responses = operation["responses"]
                if _FRAMEWORKS[0] in str(responses.get("422")):
                    del responses["422"]
                    responses.setdefault("400", invalid)
        return schema
