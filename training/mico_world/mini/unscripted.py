"""Evaluation items that people could have asked: unscripted questions, written by hand.

``unscripted.yaml`` has them, with the packages' files that they are about.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mico_chat.errors import DataError
from mico_training.data.table import Table
from mico_world.mini.real import PICTURES, SOUNDS, VIDEOS, Words, listed, medium

TABLE = Path(__file__).with_name("unscripted.yaml")
SUFFIXES = (*PICTURES, *SOUNDS, *VIDEOS, ".flac", ".avi")


class Turn(Table):
    message: str
    media: tuple[str, ...] = ()
    answer: str


class Question(Table):
    """A line of a file of items, but that ``media`` are names."""

    message: str
    media: tuple[str, ...] = ()
    earlier: tuple[Turn, ...] = ()
    accept: tuple[str, ...]
    choices: tuple[str, ...] = ()
    reject: tuple[str, ...] = ()


class Unscripted(Table):
    """``media`` have the one name by which the questions call them."""

    media: Words
    questions: tuple[Question, ...]


def unscripted(folder: Path) -> Iterator[dict[str, Any]]:
    """The items, whose media are written into ``folder``/media."""
    table = Unscripted.read(TABLE)
    shown = {}
    for _, file, data, (name,) in listed(table.media, SUFFIXES):
        kind, file, data = medium(file, data)
        path = f"media/unscripted-{file}"
        (folder / path).write_bytes(data)
        shown[name] = {"kind": kind, "path": path}
    for number, question in enumerate(table.questions):
        row = question.model_dump()
        for turn in (row, *row["earlier"]):
            if unknown := set(turn["media"]) - set(shown):
                raise DataError(TABLE, None, f"{min(unknown)!r} is not among the media")
            turn["media"] = [shown[name] for name in turn["media"]]
        yield {"id": f"unscripted-{number:02}", "skill": "unscripted", **row}
