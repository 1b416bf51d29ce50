"""A folder of media, a CSV file, or a LLaVA array as JSON Lines in the cache for :mod:`.readers`.

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
from pathlib import Path, PurePosixPath
from typing import Any

from mico_chat.errors import DataError
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

FORMAT = "manifest 1"
METADATA = ("metadata.jsonl", "metadata.csv")
ENDINGS = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "llava", "csv": "csv", "tsv": "csv"}
SHOWN = {"audio": "The sound of {}.", "video": "A video of {}."}
"""The caption of a medium in a sub-folder; of other kinds it is a photo."""


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
        lines = {line: json.dumps(record) for line, record in records}
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as out:
            out.writelines(
                f"{lines.get(line, '')}\n" for line in range(1, max(lines, default=0) + 1)
            )
        os.utime(out.name, (0, 0))  # another process may write the same file at the same time
        Path(out.name).replace(file)
    return file


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
