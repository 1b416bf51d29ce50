"""Annotation files as their publishers wrote them, and the media that they name.

A fault of a whole file is an error that names the file; a fault of one item is counted.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mico_chat.errors import DataError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".jpg", ".jpeg", ".png", ".webp"),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".m4a", ".mp4"),
    "video": (".mp4", ".webm", ".mkv", ".avi", ".mov"),
}
"""Endings of a medium's file that an annotation names without its ending, the best first."""


def read_text(path: Path) -> str:
    """A text file in UTF-8, in UTF-16 with a byte order mark, or in Windows-1252."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(path, None, error.strerror or str(error)) from error
    marked = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    # Spreadsheets save tables as Windows-1252.
    encodings = ["utf-16"] if marked else ["utf-8-sig", "cp1252"]
    for encoding in encodings:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DataError(path, None, f"its text is not encoded as {' or '.join(encodings)}")


def read_json(path: Path, kind: type[dict[str, Any]] | type[list[Any]] = dict) -> Any:
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(path, error.lineno, f"not JSON: {error.msg}") from error
    if not isinstance(content, kind):
        wanted = "an object" if kind is dict else "an array"
        raise DataError(path, None, f"expected {wanted}, got {type(content).__name__}")
    return content


def records(path: Path, key: str) -> list[dict[str, Any]]:
    """The array of objects at a key of a JSON file's object."""
    found = read_json(path).get(key)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(
            path, None, f"the array of objects {key!r} is missing; is this the right file?"
        )
    return found


def objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON file's array."""
    for number, row in enumerate(read_json(path, list)):
        if not isinstance(row, dict):
            raise DataError(path, None, f"element {number} is {type(row).__name__}, not an object")
        yield row


def texts_at(row: dict[str, Any], list_key: str, key: str) -> list[object]:
    """The values at ``key`` of the objects in a list of a record; None for one that lacks it."""
    found = row.get(list_key)
    found = found if isinstance(found, list) else []
    return [part.get(key) if isinstance(part, dict) else None for part in found]


def read_table(path: Path, *columns: str, delimiter: str = ",") -> Iterator[dict[str, str]]:
    """The rows of a table whose first line names its columns; a missing cell is empty."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    names = reader.fieldnames or ()
    if missing := [column for column in columns if column not in names]:
        why = f"missing columns: {', '.join(missing)}; the columns are {', '.join(names) or 'none'}"
        raise DataError(path, 1, why)
    for row in reader:
        yield {name: row[name] or "" for name in columns}


class MediaFolder:
    """The files of a folder by name, listed once: a data set has many thousands."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        if not folder.is_dir():
            raise DataError(folder, None, "no such folder")
        self.folder = folder
        self.kind = kind
        self._names = {path.name for path in folder.iterdir()}

    def named(self, name: object) -> MediaFile | str:
        """The file of this name, or the reason why there is none."""
        if not isinstance(name, str) or not name:
            return "the record does not name a file"
        if name not in self._names:
            return f"no file {name} in {self.folder.name}/"
        return MediaFile(self.kind, self.folder / name, name)

    def stem(self, *stems: str) -> MediaFile | str:
        """The file called one of ``stems``, with any ending; or the reason why there is none."""
        for stem in stems:
            for suffix in SUFFIXES[self.kind]:
                for name in (stem + suffix, stem + suffix.upper()):
                    if name in self._names:
                        return MediaFile(self.kind, self.folder / name, name)
        return f"no file {stems[0]}{SUFFIXES[self.kind][0]} in {self.folder.name}/"


def listed(path: Path) -> set[str] | None:
    """The names in a list, one on each line; None without the file."""
    if not path.is_file():
        return None
    return {line.strip() for line in read_text(path).splitlines() if line.strip()}
