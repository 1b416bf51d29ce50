"""Annotation files as their publishers wrote them, and the media that they name.

Whatever is wrong with a whole file is an error that names it; what is wrong with one item in it is
for the reader to count.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mico_chat.errors import DataError
from mico_chat.evaluation.tasks.task import ItemMedia
from mico_chat.media.kinds import Kind

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".jpg", ".jpeg", ".png", ".webp"),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".m4a", ".mp4"),
    "video": (".mp4", ".webm", ".mkv", ".avi", ".mov"),
}
"""What a medium's file may end in where its annotation names it without, the best first."""


def read_text(path: Path) -> str:
    """A text file: UTF-8 with or without a mark, UTF-16 with one, or else Windows-1252.

    Raises:
        DataError: it cannot be read, or is none of these.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(path, None, error.strerror or str(error)) from error
    marked = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    # The last for tables that a spreadsheet saved.
    encodings = ["utf-16"] if marked else ["utf-8-sig", "cp1252"]
    for encoding in encodings:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DataError(path, None, f"its text is not encoded as {' or '.join(encodings)}")


def read_json(path: Path, kind: type[dict[str, Any]] | type[list[Any]]) -> Any:
    """A JSON file whose whole is an object (``dict``) or an array (``list``).

    Raises:
        DataError: it is not JSON, or something else.
    """
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(path, error.lineno, f"not JSON: {error.msg}") from error
    if not isinstance(content, kind):
        names = {dict: "an object", list: "an array"}
        raise DataError(path, None, f"expected {names[kind]}, got {type(content).__name__}")
    return content


def records(content: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    """The array of objects at a key of a JSON object.

    Raises:
        DataError: there is none.
    """
    found = content.get(key)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(
            path, None, f"the array of objects {key!r} is missing; is this the right file?"
        )
    return found


def objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON array.

    Raises:
        DataError: it is no such file, or an element is something else.
    """
    for number, row in enumerate(read_json(path, list)):
        if not isinstance(row, dict):
            raise DataError(path, None, f"element {number} is {type(row).__name__}, not an object")
        yield row


def read_table(
    path: Path, columns: tuple[str, ...], delimiter: str = ","
) -> Iterator[dict[str, str]]:
    """The rows of a table whose first line names its columns; those short of cells lack them.

    Raises:
        DataError: one of ``columns`` is not there.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise DataError(
            path,
            1,
            f"missing columns: {', '.join(missing)}; the columns are "
            f"{', '.join(reader.fieldnames or ('none',))}",
        )
    for row in reader:
        yield {name: row[name] or "" for name in columns}


class MediaFolder:
    """The files of a folder by name, looked up once: a data set has many thousands.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, folder: Path, kind: Kind) -> None:
        if not folder.is_dir():
            raise DataError(folder, None, "no such folder")
        self.folder = folder
        self.kind = kind
        self._names = {path.name for path in folder.iterdir()}

    def named(self, name: object) -> ItemMedia | str:
        """The file of a whole name, or why there is none."""
        if not isinstance(name, str) or not name:
            return "the record does not name a file"
        if name not in self._names:
            return f"no file {name} in {self.folder.name}/"
        return ItemMedia(self.kind, self.folder / name)

    def stem(self, *stems: str) -> ItemMedia | str:
        """The file called one of ``stems``, whatever it ends in; or why there is none."""
        for stem in stems:
            for suffix in SUFFIXES[self.kind]:
                for name in (stem + suffix, stem + suffix.upper()):
                    if name in self._names:
                        return ItemMedia(self.kind, self.folder / name)
        return f"no file {stems[0]}{SUFFIXES[self.kind][0]} in {self.folder.name}/"


def listed(path: Path) -> set[str] | None:
    """The names in a list, one a line; None where there is no such list."""
    if not path.is_file():
        return None
    return {line.strip() for line in read_text(path).splitlines() if line.strip()}
