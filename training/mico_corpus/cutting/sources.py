"""What a build is given: files, folders, addresses, lists and shards, as rows of ``SOURCE``.

* a video or another file; a file that does not exist is an error here, and a row with the reason
  "missing" later if it stands in a list;
* a folder or an address that ends with ``/``: all videos, sounds and tars in it;
* a pattern with ``*``, also of addresses;
* a list: ``.txt`` with a path or address a line; ``.jsonl``, ``.csv`` or ``.parquet`` with the
  column ``path``, ``video`` or ``url``, and maybe ``caption`` or ``text``, ``source``, ``licence``
  or ``license``, ``category`` or ``categories``. Relative paths start at the list's folder. With
  the recipe's ``kind``, rows are those of a published corpus, and a bad one is a row with a fault;
* a tar of video2dataset or img2dataset: each video in it, with its caption.
"""

import csv
import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mico_chat.errors import ConfigError, DataError, MicoError
from mico_chat.evaluation.datasets.files import FAULT
from mico_chat.media.addresses import Location, file_system, located, matching, opened
from mico_corpus.recipe import BuildRecipe
from mico_corpus.rows import Row
from mico_training.data.sources.manifests import PUBLISHED
from mico_training.data.sources.tar import ENDINGS, Members, samples_of

log = logging.getLogger(__name__)

MORE = ("m4v", "mpg", "mpeg", "ts", "m2ts", "mts", "flv", "wmv", "asf", "3gp", "ogv")
VIDEOS = frozenset((*ENDINGS["video"], *MORE))
MEDIA = VIDEOS | frozenset((*ENDINGS["audio"], "aif", "aiff", "wma", "oga"))
TAR = "tar"
PLACES = ("path", "video", "url")
TEXTS = ("caption", "text")
LICENCES = ("licence", "license")
CATEGORIES = ("category", "categories")


def rows_of(sources: Sequence[str], recipe: BuildRecipe) -> Iterator[Row]:
    """Each file once, in the order given.

    Raises:
        ConfigError: a source does not exist, or no medium is in it.
        DataError: a bad line of a list.
    """
    seen = Seen()
    given = _Given(recipe)
    for text in sources:
        for row in given.rows(text):
            if seen.add(int(row["id"], 16)):
                yield row


class Seen:
    """A set of 64-bit keys in 16 to 32 bytes each; a set of Python takes 80."""

    def __init__(self) -> None:
        self._table = np.zeros(1 << 12, np.uint64)
        self._n = 0

    def add(self, key: int) -> bool:
        """False if the key was there."""
        if 2 * self._n >= len(self._table):
            old = self._table
            self._table = np.zeros(2 * len(old), np.uint64)
            for one in old[old > 0]:
                self._table[self._place(int(one))] = one
        key = key or 1
        place = self._place(key)
        if self._table[place]:
            return False
        self._table[place] = key
        self._n += 1
        return True

    def _place(self, key: int) -> int:
        last = len(self._table) - 1
        place = key & last
        while self._table[place] and int(self._table[place]) != key:
            place = (place + 1) & last
        return place


@dataclass(frozen=True)
class _Given:
    recipe: BuildRecipe

    def rows(self, text: str) -> Iterator[Row]:
        place = located(text)
        match _kind(text, place):
            case "folder":
                files = _walked(place) if isinstance(place, Path) else matching(f"{text}/**")
                yield from self._among(text, files, lists=False)
            case "pattern":
                yield from self._among(text, matching(text), lists=True)
            case "list":
                yield from self._listed(place)
            case _:
                yield from self._file(place)

    def _among(self, text: str, files: Iterable[Location], lists: bool) -> Iterator[Row]:
        taken = alone = 0
        for place in files:
            ending = _ending(str(place))
            if lists and ending in LISTS:
                yield from self._listed(place)
            elif ending in MEDIA or ending == TAR:
                yield from self._file(place)
            else:
                alone += 1
                continue
            taken += 1
        if not taken:
            raise ConfigError(f"{text}: no video, sound or tar is among its {alone} files")
        if alone:
            log.info("%s: %d files are no videos, sounds or tars; left alone", text, alone)

    def _file(self, place: Location, about: Mapping[str, Any] | None = None) -> Iterator[Row]:
        """A file's row, or those of a tar's members; ``about`` is what a list says of it."""
        if _ending(str(place)) == TAR:
            try:
                for key, _, _, members in samples_of(place):
                    said = _said(members) | _texts(about or {})
                    for name, member in members.items():
                        if name.rpartition(".")[2].lower() in VIDEOS:
                            part = (f"{key}.{name}", member.offset, member.size)
                            yield self._row(place, said, *part)
                return
            except (DataError, OSError) as error:
                log.warning("%s", error)  # its own row then says why it gives nothing more
        size = 0
        if isinstance(place, Path):
            with suppress(OSError):
                size = place.stat().st_size
        yield self._row(place, _texts(about or {}), "", 0, size)

    def _row(
        self, place: Location, said: Mapping[str, str], member: str, offset: int, size: int
    ) -> Row:
        address = os.path.abspath(place) if isinstance(place, Path) else place
        return {
            "id": hashlib.sha256(f"{address}\0{member}".encode(errors="replace")).hexdigest()[:16],
            "address": address,
            "member": member,
            "offset": offset,
            "size": size,
            "source": said.get("source") or self.recipe.source,
            "licence": said.get("licence") or self.recipe.licence,
            "text": said.get("text", ""),
            "category": said.get("category", ""),
            "spans": [],
            "fault": "",
        }

    def _listed(self, place: Location) -> Iterator[Row]:
        folder = place.parent if isinstance(place, Path) else place.rpartition("/")[0]
        for number, about in _READERS[_ending(str(place))](place):
            if self.recipe.kind:
                yield self._published(place, folder, number, about)
                continue
            if isinstance(about, DataError):
                raise about
            text = next((about[name] for name in PLACES if about.get(name)), None)
            if not isinstance(text, str):
                names = ", ".join(PLACES)
                raise DataError(
                    place, number, f"names no file; one of {names} is a path or address"
                )
            yield from self._file(_beside(folder, text), about)

    def _published(
        self, place: Location, folder: Location, number: int | None, about: "Record | DataError"
    ) -> Row:
        """The row of a published corpus; of a bad one, its place and what is wrong."""
        try:
            if isinstance(about, DataError):
                raise ValueError(about.args[2])
            record = PUBLISHED[self.recipe.kind].record(about) or {}
            if FAULT in record:
                raise ValueError(record[FAULT])
            spans = [_span(one) for one in record.get("spans", ())]
            (row,) = self._file(_beside(folder, record["video"]), record)
        except ValueError as error:
            return {**self._row(f"{place}:{number}", {}, "", 0, 0), "fault": str(error)}
        return {**row, "spans": spans}


def _beside(folder: Location, text: str) -> Location:
    file = located(text)
    if not isinstance(file, Path):
        return file
    return folder / file if isinstance(folder, Path) else f"{folder}/{text}"


def _span(ends: Any) -> Row:
    """Two times, seconds or "00:04:52.140", as one span; a ValueError for anything else."""
    try:
        start, end = (
            sum(60**n * float(part) for n, part in enumerate(reversed(str(one).split(":"))))
            for one in ends
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"its span {ends!r} is not two times") from error
    if not 0 <= start < end < math.inf:
        raise ValueError(f"its span {ends!r} has no beginning before its end")
    return {"start": start, "end": end}


def _kind(text: str, place: Location) -> str:
    """What a source is: "folder", "pattern", "list" or "file"; a ConfigError if it is nowhere."""
    if isinstance(place, Path):
        if place.is_dir():
            return "folder"
        there = place.exists()
    else:
        if "*" in text:
            return "pattern"
        there = True
        try:
            system, path = file_system(text)
            if text.endswith("/") or (not _ending(text) and system.isdir(path)):
                return "folder"
            there = system.exists(path)
        except MicoError:
            raise
        except Exception as error:  # each protocol's package has its own
            raise ConfigError(f"{text}: cannot be opened: {error}") from error
    if not there and "*" in text:
        return "pattern"
    if not there:
        raise ConfigError(f"{text}: no such file or folder")
    return "list" if _ending(text) in LISTS else "file"


def _ending(text: str) -> str:
    """In small letters; of an address without its query."""
    if "://" in text:
        text = text.partition("?")[0].partition("#")[0]
    name = text.rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""


def _walked(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(root, name) for name in sorted(names))


def _texts(about: Mapping[str, Any]) -> dict[str, str]:
    found = {"text": TEXTS, "source": ("source",), "licence": LICENCES, "category": CATEGORIES}
    values = {
        name: next((about[k] for k in keys if about.get(k)), "") for name, keys in found.items()
    }
    if isinstance(values["category"], list):  # YouTube's, as yt-dlp writes them
        values["category"] = values["category"][0]
    return {name: text.strip() for name, text in values.items() if isinstance(text, str) and text}


def _said(members: Members) -> dict[str, str]:
    """What a sample's JSON and text say; neither need be there, or be right."""
    about: Any = {}
    if "json" in members:
        with suppress(ValueError):
            about = json.loads(members["json"].read())
    said = {}
    if isinstance(about, dict):  # video2dataset keeps what yt-dlp said of a video
        more = about.get("yt_meta_dict")
        more = more.get("info") if isinstance(more, dict) else None
        said = _texts((more if isinstance(more, dict) else {}) | about)
    text = members["txt"].read().decode(errors="replace").strip() if "txt" in members else ""
    return said | ({"text": text} if text else {})


Record = Mapping[str, Any]
Lines = Iterator[tuple[int | None, Record | DataError]]
"""It yields a line's number and its record, or what is wrong with it."""


def _text_lines(place: Location) -> Iterator[str]:
    with opened(place) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        try:
            yield from text
        except UnicodeDecodeError as error:
            raise DataError(place, None, f"is not UTF-8: {error}") from error


def _of_text(place: Location) -> Lines:
    for number, line in enumerate(_text_lines(place), start=1):
        if line.strip():
            yield number, {"path": line.strip()}


def _of_jsonl(place: Location) -> Lines:
    for number, line in enumerate(_text_lines(place), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, DataError(place, number, f"not JSON: {error}")
            continue
        if not isinstance(record, dict):
            why = f"a line is an object, not {type(record).__name__}"
            record = DataError(place, number, why)
        yield number, record


def _of_csv(place: Location) -> Lines:
    reader = csv.DictReader(_text_lines(place))
    try:
        for record in reader:
            yield reader.line_num, record
    except csv.Error as error:
        raise DataError(place, reader.line_num, f"not CSV: {error}") from error


def _of_parquet(place: Location) -> Lines:
    with opened(place) as file:
        try:
            table = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise DataError(place, None, f"not Parquet: {error}") from error
        known = (*PLACES, *TEXTS, "source", *LICENCES, *CATEGORIES, "video_id", "clip", "clips")
        columns = [name for name in table.schema_arrow.names if name in known]
        for batch in table.iter_batches(4096, columns=columns):
            yield from ((None, record) for record in batch.to_pylist())


_READERS = {"txt": _of_text, "jsonl": _of_jsonl, "csv": _of_csv, "parquet": _of_parquet}
LISTS = frozenset(_READERS)
