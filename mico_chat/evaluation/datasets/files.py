"""Annotation files as their publishers wrote them, and the media files that they name.

A fault of a whole file raises an error that names the file. A fault of a single record is counted.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
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
"""The endings to try, in this order, if an annotation names a file without its ending."""
FAULT = "(fault)"
"""The key of a record that cannot be used; its value is the reason."""

Row = dict[str, Any]


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


def read_json(path: Path) -> Any:
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        with suppress(json.JSONDecodeError):  # JSON Lines may be named .json
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        raise DataError(path, error.lineno, f"not JSON: {error.msg}") from error


def read_object(path: Path) -> Row:
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(path, None, f"expected an object, got {type(content).__name__}")
    return content


def read_records(path: Path, key: str = "") -> Iterator[Row]:
    """The records of a JSON file: an array of objects, or an object of objects.

    With a ``key``, the records are the value at that key of the file's object. A record of an
    object of objects gets its own name at the key "key". A record that is no object gets a
    ``FAULT``.
    """
    content = read_object(path).get(key) if key else read_json(path)
    if not isinstance(content, dict | list):
        place = f"at {key!r}" if key else "in this file"
        raise DataError(path, None, f"there are no records {place}; is this the right file?")
    named = content.items() if isinstance(content, dict) else enumerate(content)
    for name, record in named:
        if isinstance(record, dict):
            yield {"key": name, **record}
        else:
            yield {FAULT: f"the record of {name!r} is {type(record).__name__}, not an object"}


def read_table(
    path: Path, columns: Iterable[str], delimiter: str = ","
) -> Iterator[dict[str, str]]:
    """The rows of a table whose first line names its columns; a missing cell is empty."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    names = reader.fieldnames or ()
    if missing := [column for column in columns if column not in names]:
        why = f"missing columns: {', '.join(missing)}; the columns are {', '.join(names) or 'none'}"
        raise DataError(path, 1, why)
    before = csv.field_size_limit(2**31 - 1)  # a cell may hold a picture
    try:
        rows = list(reader)
    finally:
        csv.field_size_limit(before)
    for row in rows:
        yield {name: row[name] or "" for name in names}


class MediaFolders:
    """The media files of a data set; each folder is listed once, because it has many thousands."""

    def __init__(self, folders: Sequence[Path], kind: Kind) -> None:
        self.kind = kind
        self.places = ", ".join(f"{folder.name}/" for folder in folders)
        self._files: dict[str, Path] = {}
        there = [folder for folder in folders if folder.is_dir()]
        if folders and not there:
            raise DataError(folders[0], None, "no such folder")
        for folder in there:
            for path in folder.rglob("*"):
                name = path.relative_to(folder).as_posix()
                self._files[name] = self._files[f"{folder.name}/{name}"] = path

    def find(self, names: Sequence[str]) -> MediaFile | str:
        """The first file with one of ``names``, alone or with an ending of its kind.

        Without such a file, the reason.
        """
        suffixes = SUFFIXES[self.kind]
        for name in (name.removeprefix("./") for name in names):
            for suffix in ("", *suffixes, *map(str.upper, suffixes)):
                if (path := self._files.get(name + suffix)) is not None:
                    return MediaFile(self.kind, path, path.name)
        ending = "" if names[0].lower().endswith(suffixes) else suffixes[0]
        return f"no file {names[0]}{ending} in {self.places}"
