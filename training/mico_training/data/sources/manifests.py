"""Folders, tables, arrays and published annotations as JSON Lines in the cache for :mod:`.readers`.

A folder has media and captions, ``a.txt`` beside ``a.jpg``. Files of one stem are one sample;
``a.depth.png`` is the depth map of ``a.jpg``. Where no medium has a caption, the name of its
sub-folder says what it shows. ``metadata.jsonl`` or ``metadata.csv`` in the folder describes it as
in Hugging Face's imagefolder. Line N of a CSV file, and item N of an array, is line N of the JSON
Lines, so that an error names what to correct.
"""

import csv
import hashlib
import io
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import BaseModel

from mico_chat.errors import DataError
from mico_chat.evaluation.datasets import filled_in, values_at
from mico_chat.evaluation.datasets.files import FAULT
from mico_chat.media.addresses import (
    Location,
    file_system,
    fingerprint,
    located,
    opened,
    read_part,
    state_of,
)
from mico_chat.media.kinds import MODALITIES, TABLE, Kind
from mico_chat.settings import cache_dir
from mico_training.data.language.english import article

FORMAT = "manifest 2"
CHUNK = 2**20
"""So many characters of a JSON file are read at once."""
LONGEST = 64 * CHUNK
"""An item of an array is not longer."""
DECODER = json.JSONDecoder()
METADATA = ("metadata.jsonl", "metadata.csv")
ENDINGS = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "llava", "csv": "csv", "tsv": "csv"}
SHOWN = {"audio": "The sound of {}.", "video": "A video of {}."}
"""The caption of a medium in a sub-folder; of other kinds it is a photo."""


class Published(BaseModel, extra="forbid", frozen=True):
    """Where the rows of a published annotation file have what a record needs."""

    id: str
    media: dict[Kind, str]
    array: str = ""
    where: dict[str, tuple[str, ...]] = {}
    captions: dict[Kind, tuple[str, ...]] = {}
    subtitle: str = ""
    category: str = ""
    spans: tuple[str, ...] = ()

    def record(self, row: Any) -> dict[str, Any] | None:
        """A row as a record; None for a row that is left out. ``FAULT`` says what is wrong."""
        if not isinstance(row, dict):
            return {FAULT: f"a row is an object, not {type(row).__name__}"}
        if not all(row.get(key) in wanted for key, wanted in self.where.items()):
            return None
        try:
            id = filled_in(self.id, row)
            row = row | {"stem": id.removesuffix(".wav")}
            found: dict[str, Any] = {kind: filled_in(t, row) for kind, t in self.media.items()}
        except ValueError as error:
            return {FAULT: str(error)}
        captions = {kind: _texts(row, keys) for kind, keys in self.captions.items()}
        if self.captions and not any(captions.values()):
            keys = " and ".join(key for own in self.captions.values() for key in own)
            return {"id": id, FAULT: f"the record lacks {keys}"}
        more = {key: row.get(getattr(self, key)) for key in ("subtitle", "category")}
        more["spans"] = [one for key in self.spans for one in values_at(row, key) if one]
        more = {key: value for key, value in more.items() if value}
        return found | {"id": id, "captions": captions} | more


def _texts(row: dict[str, Any], keys: tuple[str, ...]) -> list[Any]:
    return [text for key in keys for text in values_at(row, key) if text]


_TABLE = Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")
PUBLISHED = {name: Published(**row) for name, row in yaml.safe_load(_TABLE).items()}


def form_of(path: str) -> str:
    """The format of a source whose ``kind`` is not given: by its ending, or by what is there."""
    place = located(path)
    if isinstance(place, Path) and place.is_dir():
        return "shards" if any(place.glob("*.tar")) else "folder"
    if path.endswith("/"):
        return "folder"
    form = ENDINGS.get(path.rpartition(".")[2].lower(), "shards")
    is_there = form == "llava" and (not isinstance(place, Path) or place.is_file())
    return "jsonl" if is_there and read_part(place, 0, 64).lstrip()[:1] == b"{" else form


def as_lines(place: Location, form: str) -> tuple[Location, Location]:
    """The JSON Lines of a folder, a CSV file or an array, and the file that errors name.

    Raises:
        DataError: the whole is wrong. A wrong record is a wrong line.
    """
    if form == "jsonl":
        return place, place
    if form in PUBLISHED:
        rows = _of_published(place, PUBLISHED[form])
        return _written(place, f"{form} {fingerprint(place)}", rows), place
    if form != "folder":
        read = _of_csv if form == "csv" else _of_array
        return _written(place, fingerprint(place), read(place)), place
    system, root = file_system(str(place))
    listed = {
        name.removeprefix(root).lstrip("/"): state_of(about)
        for name, about in sorted(system.find(root, detail=True).items())
        if not re.search(r"/\.", name.removeprefix(root))
    }
    for name in METADATA:
        if name in listed:
            return as_lines(_within(place, name), ENDINGS[name.rpartition(".")[2]])
    state = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return _written(place, state, _of_folder(place, listed)), place


def kind_of(name: str) -> Kind | None:
    """The kind of a file by its ending, or by what stands before it: ``a.depth.png``."""
    path = PurePosixPath(name.lower())
    found = [kind for kind in MODALITIES if path.suffix in TABLE[kind].endings]
    inner = PurePosixPath(path.stem).suffix.strip(".")
    return next((kind for kind in found if kind == inner), next(iter(found), None))


def folder_of(path: Location) -> Location:
    return path.parent if isinstance(path, Path) else path.rpartition("/")[0]


def _within(folder: Location, name: str) -> Location:
    return folder / name if isinstance(folder, Path) else f"{folder}/{name}"


def _written(place: Location, state: str, records: Iterator[tuple[int, Any]]) -> Path:
    """JSON Lines in the cache: each record at its line."""
    name = hashlib.sha256("\0".join((FORMAT, str(place), state)).encode()).hexdigest()[:24]
    file = cache_dir() / "manifests" / f"{name}.jsonl"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        # Another process may write the same file at the same time.
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            partial_file = Path(folder) / file.name
            with partial_file.open("w", encoding="utf-8") as out:
                written = 0
                for line, record in records:
                    out.write("\n" * (line - 1 - written) + json.dumps(record) + "\n")
                    written = line
            os.utime(partial_file, (0, 0))
            partial_file.replace(file)
    return file


def _of_published(place: Location, form: Published) -> Iterator[tuple[int, Any]]:
    table = str(place).endswith(".csv")
    rows = _of_csv(place) if table else enumerate(_items(place, form.array), start=1)
    for line, row in rows:
        if (record := form.record(row)) is not None:
            yield line, record


def _items(place: Location, key: str = "") -> Iterator[Any]:
    """The items of a JSON array, or of the array at a key of an object, with few of them in memory.

    Raises:
        DataError: the file is not JSON, or it is cut off.
    """
    with opened(place) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig")
        scanner = _Scanner(place, iter(partial(text.read, CHUNK), ""))
        if key and scanner.next() == "{":
            scanner.at += 1
            while scanner.value() != key:
                scanner.skip(":")
                scanner.value()
                if scanner.next() == "}":
                    raise DataError(place, None, f"has no array at {key!r}")
                scanner.skip(",")
            scanner.skip(":")
        if scanner.next() != "[":
            raise DataError(place, None, f"is no array of rows, but begins with {scanner.next()!r}")
        scanner.at += 1
        while scanner.next() != "]":
            yield scanner.value()
            if scanner.next() != "]":
                scanner.skip(",")


class _Scanner:
    """Values of a JSON text that comes in pieces; ``at`` is the place in the piece that is held."""

    def __init__(self, place: Location, pieces: Iterator[str]) -> None:
        self.place, self.pieces = place, pieces
        self.held, self.at, self.n = "", 0, 0

    def next(self) -> str:
        """The next character that is no space, not taken."""
        while True:
            while self.at < len(self.held) and self.held[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.held):
                return self.held[self.at]
            self._more()

    def skip(self, mark: str) -> None:
        if self.next() != mark:
            raise self._wrong(f"{mark!r} is expected, not {self.held[self.at : self.at + 20]!r}")
        self.at += 1

    def value(self) -> Any:
        self.next()
        while True:
            try:
                found, end = DECODER.raw_decode(self.held, self.at)
                if end < len(self.held):  # a number may go on in the next piece
                    self.at, self.n = end, self.n + 1
                    return found
            except (ValueError, RecursionError) as error:
                if len(self.held) - self.at > LONGEST:
                    raise self._wrong(str(error)) from error
            self._more()

    def _more(self) -> None:
        try:
            piece = next(self.pieces, "")
        except UnicodeDecodeError as error:
            raise self._wrong(str(error)) from error
        if not piece:
            raise self._wrong(f"it ends in {self.held[self.at : self.at + 40]!r}")
        self.held, self.at = self.held[self.at :] + piece, 0

    def _wrong(self, why: str) -> DataError:
        return DataError(self.place, None, f"not JSON behind value {self.n}: {why}")


def _of_array(place: Location) -> Iterator[tuple[int, Any]]:
    try:
        records = json.loads(read_part(place))
    except (ValueError, RecursionError) as error:
        raise DataError(place, None, f"not JSON: {error}") from error
    if not isinstance(records, list):
        raise DataError(place, None, f"a LLaVA file is an array, not {type(records).__name__}")
    yield from enumerate(records, start=1)


def _of_csv(place: Location) -> Iterator[tuple[int, Any]]:
    line = 1
    try:
        with opened(place) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            header = text.readline()
            rows = csv.reader(text, delimiter=max(",;\t", key=header.count))
            (columns,) = csv.reader([header], rows.dialect)
            for row in rows:
                cells = zip(columns, row, strict=False)
                if record := {column: cell for column, cell in cells if cell.strip()}:
                    yield line + 1, record
                line = 1 + rows.line_num
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(place, line + 1, f"not CSV in UTF-8: {error}") from error


def _of_folder(folder: Location, listed: dict[str, str]) -> Iterator[tuple[int, Any]]:
    media: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in listed:
        stem = name.rpartition(".")[0]
        if kind := kind_of(name):
            media[stem.removesuffix(f".{kind}")][kind].append(name)
        elif PurePosixPath(name).name in METADATA:
            raise DataError(folder, None, f"{name} describes its own folder: give that as path")
    if not media:
        raise DataError(folder, None, "no file in this folder has the ending of a medium")
    captioned = any(f"{stem}.txt" in listed for stem in media)
    for line, (stem, files) in enumerate(sorted(media.items()), start=1):
        told = next(kind for kind in ("video", "image", "audio", *files) if kind in files)
        label = PurePosixPath(stem).parent.name.replace("_", " ").strip()
        record: dict[str, Any] = {"id": stem, **files, "caption": []}
        if f"{stem}.txt" in listed:
            text = read_part(_within(folder, f"{stem}.txt")).decode(errors="surrogateescape")
            record["captions"] = {told: [text.strip()] if text.strip() else []}
        elif label and not captioned:
            record["concept"] = label
            record["captions"] = {told: SHOWN.get(told, "A photo of {}.").format(article(label))}
        yield line, record
