"""Evaluation items: a question about some media and what a right answer holds.

An items file is JSONL, one item a line::

    {"id": "..", "skill": "count", "message": "How many dogs are there?",
     "media": [{"kind": "image", "path": "x.jpg"}], "accept": ["two"], "choices": ["one", "two"]}

Paths are relative to the file's folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mico_chat.errors import DataError
from mico_chat.media.kinds import Kind


class ItemMedium(BaseModel):
    """A medium of an item."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    path: Path


class Item(BaseModel):
    """One question. ``accept``: texts one of which a right answer says; ``choices``: all of which
    it may say one, the first said counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    skill: str
    message: str
    media: tuple[ItemMedium, ...] = ()
    accept: tuple[str, ...]
    choices: tuple[str, ...] = ()


def read_items(path: Path) -> list[Item]:
    """The items of a file, media paths made whole.

    Raises:
        DataError: naming the line and what is wrong with it.
    """
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            data: dict[str, Any] = json.loads(line)
            item = Item.model_validate(data)
        except (ValidationError, json.JSONDecodeError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.msg
            raise DataError(path, number, reason) from error
        media = tuple(m.model_copy(update={"path": path.parent / m.path}) for m in item.media)
        items.append(item.model_copy(update={"media": media}))
    return items
