"""The data sets of the tasks (``datasets.yaml``): their files on disk and their items.

Items are media with captions, or questions about media with answers. :class:`Annotations` reads
them from the files of the publishers. One's own data, and the shards of the data engine, are read
as in training (``mico_training/data/own.py``).
"""

import ast
import base64
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from string import Formatter, ascii_uppercase
from typing import Any

import yaml
from pydantic import BaseModel

from mico_chat.errors import DataError
from mico_chat.evaluation.datasets.files import (
    FAULT,
    MediaFolders,
    Row,
    read_object,
    read_records,
    read_table,
    read_text,
)
from mico_chat.evaluation.task import Contents, Item, Split, read_items
from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind


class Beside(BaseModel, extra="forbid", frozen=True):
    """More files; their records belong to the main records with the same value at ``by``."""

    files: tuple[str, ...]
    key: str = ""
    by: str


class Annotations(BaseModel, extra="forbid", frozen=True):
    """Where the files of a data set have its items; ``datasets.yaml`` explains the fields."""

    file: str
    key: str = ""
    delimiter: str = ","
    each: str = ""
    where: dict[str, tuple[str, ...]] = {}
    only: str = ""
    beside: Beside | None = None
    kind: Kind = "video"
    folders: tuple[str, ...] = ("videos",)
    names: tuple[str, ...] = ()
    picture: str = ""
    id: str
    skill: str = ""
    merge: bool = False
    captions: tuple[str, ...] = ()
    paragraph: bool = False
    hint: str = ""
    question: str = ""
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def read(self, folder: Path, change: Callable[[Row], Row]) -> Contents:
        """The items; ``change`` completes each record before it is read."""
        contents = Contents()
        media = MediaFolders([folder / name for name in self.folders], self.kind)
        only = folder / self.only
        used = set(read_text(only).split()) if self.only and only.is_file() else None
        beside: dict[str, list[Row]] = defaultdict(list)
        if self.beside is not None:
            for name in self.beside.files:
                for row in read_records(folder / name, self.beside.key):
                    beside[str(row.get(self.beside.by))].append(row)
        # The id of an item, possible names of its medium, its record, captions or answers.
        entries: dict[object, tuple[str, list[str], Row, list[object]]] = {}
        pictures: dict[str, str] = {}
        for row in map(change, self._records(folder)):
            try:
                id, *names = (filled_in(template, row) for template in (self.id, *self.names))
            except ValueError as error:
                contents.broken.append((f"record {row['number']}", str(error)))
                continue
            if used is not None and id not in used:
                continue
            sources = [row] if self.beside is None else beside[str(row.get(self.beside.by))]
            key = id if self.merge else len(entries)
            *_, texts = entries.setdefault(key, (id, names, row, []))
            paths = self.captions or self.answers
            texts.extend(text for one in sources for path in paths for text in values_at(one, path))
        for id, names, row, texts in entries.values():
            medium = self._picture(row, id, pictures) if self.picture else media.find(names)
            if self.captions:
                contents.caption(id, medium, texts, self.paragraph)
            else:
                asked = " ".join(str(row[k]) for k in (self.hint, self.question) if row.get(k))
                choices = tuple(str(c) for k in self.choices for c in values_at(row, k) if c)
                if choices:  # an answer is a choice's letter, place or text
                    letters: dict[object, str] = {
                        c: ascii_uppercase[n] for n, c in enumerate(choices)
                    }
                    letters |= dict(enumerate(ascii_uppercase))
                    texts = [letters.get(t, t) for t in texts if isinstance(t, str | int)]
                skill = str(row.get(self.skill, ""))
                contents.ask(id, medium, asked, texts, choices=choices, skill=skill)
        return contents

    def _picture(self, row: Row, id: str, known: dict[str, str]) -> MediaFile | str:
        """A picture in base64; a row may have the id of an earlier one with the same picture."""
        text = str(row[self.picture])
        known[id] = text = known.get(text, text)
        try:
            return MediaFile("image", base64.b64decode(text, validate=True), id)
        except ValueError as error:
            return f"its picture is not in base64: {error}"

    def _records(self, folder: Path) -> Iterator[Row]:
        """The records with the values in ``where`` and all faulty records, each with its number
        and the name of its file."""
        for path in sorted(folder.glob(self.file)) or [folder / self.file]:
            if is_table := path.suffix in (".csv", ".tsv"):
                rows = read_table(path, self._columns(), self.delimiter)
            else:
                rows = read_records(path, self.key)
            # In a table, the first record is on line 2.
            for number, whole in enumerate(rows, 2 if is_table else 1):
                for row in _parts(whole, self.each):
                    if FAULT in row or all(row.get(k) in v for k, v in self.where.items()):
                        yield {**row, "number": number, "stem": path.stem}

    def _columns(self) -> list[str]:
        parsed = [part for text in (self.id, *self.names) for part in Formatter().parse(text)]
        columns = [name for _, name, _, _ in parsed if name and name != "number"]
        columns += filter(None, [self.picture, self.question])
        columns += [] if self.beside else [*self.captions, *self.answers]
        return list(dict.fromkeys(columns))


def _parts(row: Row, each: str) -> list[Row]:
    """The record, or a record for each object of the array at the key ``each``."""
    parts = row.get(each, []) if each and FAULT not in row else [{}]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return [{**row, FAULT: f"its {each} are not an array of objects"}]
    return [{**row, **part} for part in parts]


def filled_in(template: str, row: Row) -> str:
    """The template, filled with the values of a record.

    Raises:
        ValueError: the record cannot be used, or it lacks a value.
    """
    if FAULT in row:
        raise ValueError(row[FAULT])
    for _, name, _, _ in Formatter().parse(template):
        if name and (row.get(name) == "" or not isinstance(row.get(name), str | int)):
            raise ValueError(f"the record lacks {name}")
    return template.format_map(row)


def values_at(row: Row, path: str) -> list[object]:
    """The values at a key of a record; ``KEY.INNER`` is a key of the objects at a key."""
    key, _, inner = path.partition(".")
    found = row.get(key)
    if not inner:
        return found if isinstance(found, list) else [found]
    parts = found if isinstance(found, list) else []
    return [part.get(inner) if isinstance(part, dict) else None for part in parts]


# --- records that need more than a template -------------------------------------------------------

Change = Callable[[Row], Row]


def _didemo(row: Row) -> Row:
    """Adds the name without its ending: many people have re-encoded DiDeMo's .avi or .mov files."""
    return {**row, "stem": str(row.get("video")).rsplit(".", 1)[0]}


def _msvd_qa(folder: Path) -> Change:
    """Adds the name of the clip, which ``youtube_mapping.txt`` has for a number such as vid1301."""
    mapping = folder / "youtube_mapping.txt"
    lines = read_text(mapping).splitlines() if mapping.is_file() else ()
    pairs = [pair for line in lines if len(pair := line.split()) == 2]
    clip_of = {number: clip for clip, number in pairs}

    def change(row: Row) -> Row:
        number = f"vid{row.get('video_id')}"
        return {**row, "clip": clip_of.get(number, number)}

    return change


def _music_avqa(row: Row) -> Row:
    """Fills a question such as "Is the <Object> loud?" with the values in its record."""
    question, values = row.get("question_content"), row.get("templ_values")
    if not isinstance(question, str):
        return row
    if isinstance(values, str):  # the text of a Python list
        try:
            values = ast.literal_eval(values)
        except (SyntaxError, ValueError):
            return {**row, FAULT: f"its templ_values are not a list: {values!r}"}
    given = [str(value) for value in values] if isinstance(values, list | tuple) else []
    parts = re.split(r"<[^<>]+>", question)
    if len(parts) - 1 != len(given):
        places = f"its question has {len(parts) - 1} places"
        return {**row, FAULT: f"{places}, but there are {len(given)} templ_values"}
    filled = [value + text for value, text in zip(given, parts[1:], strict=True)]
    return {**row, "question_content": parts[0] + "".join(filled)}


CHANGES: dict[str, Callable[[Path], Change]] = {
    "didemo": lambda _: _didemo,
    "msvd-qa": _msvd_qa,
    "music-avqa": lambda _: _music_avqa,
}
"""For some data sets, a function of the folder; it returns the function that completes a record."""


# --- items that this project makes ----------------------------------------------------------------


def _mini_skills(folder: Path) -> Contents:
    """The items of two files, and the questions without media that come with the package."""
    text = Path(__file__).parents[1] / "text.jsonl"
    files = [folder / "mini/items/items.jsonl", folder / "real/items.jsonl", text]
    return Contents([item for path in files for item in read_items(path)])


SUBTITLES = "subtitles.json"
"""A file that a data set's folder may have: ``{"video7010": "what is said", ..}``, by the names of
the media's files without their endings."""


def _subtitled(items: Sequence[Item], path: Path) -> list[Item]:
    """The items with the subtitles of their media."""
    said = read_object(path)
    if not all(isinstance(text, str) for text in said.values()):
        raise DataError(path, None, "expected an object with a text for each medium")
    texts = [said.get(Path(item.media[0].name).stem, "").strip() for item in items]
    return [replace(item, subtitle=text) for item, text in zip(items, texts, strict=True)]


# --- the table ------------------------------------------------------------------------------------


class Layout(BaseModel, extra="forbid", frozen=True):
    """The files of a data set by its publishers' names; those in brackets are optional."""

    name: str
    folder: str = ""
    page: str
    tree: dict[str, str]

    def layout(self, data: Path) -> str:
        """The folder tree that the data set needs, and where to get it."""
        width = max(len(name) for name in self.tree)
        lines = [f"  {name:<{width}}  {what}".rstrip() for name, what in self.tree.items()]
        return "\n".join([f"{data / self.folder}/", *lines, f"from: {self.page}"])

    def missing(self, data: Path) -> list[str]:
        folder = data / self.folder
        needed = [name for name in self.tree if not name.startswith("[")]
        return [name for name in needed if not any(folder.glob(name.rstrip("/")))]


class DataSet(Layout, extra="forbid", frozen=True):
    """A data set as its publishers distribute it; ``datasets.yaml`` explains the fields."""

    folder: str
    command: str = ""
    items: Annotations | None = None
    train: dict[str, Any] = {}
    also: tuple[str, ...] = ()

    def read(self, data: Path, split: Split = "test") -> Contents:
        """The items that a test measures, or those that fine-tuning reads."""
        folder = data / self.folder
        if self.items is None:
            contents = _mini_skills(folder)
        else:
            changed = self.train if split == "train" else {}
            form = Annotations(**self.items.model_dump() | changed)
            change = CHANGES[self.name](folder) if self.name in CHANGES else dict
            contents = form.read(folder, change)
        if not contents.items:
            why = f"none of {len(contents.broken)} items can be used"
            if contents.broken:
                why += f"; the first: {': '.join(contents.broken[0])}"
            raise DataError(folder, None, why)
        if (folder / SUBTITLES).is_file():
            contents.items = _subtitled(contents.items, folder / SUBTITLES)
        return contents


_ROWS = yaml.safe_load(Path(__file__).with_name("datasets.yaml").read_text(encoding="utf-8"))
DATASETS: dict[str, DataSet] = {name: DataSet(name=name, **row) for name, row in _ROWS.items()}


def datasets_in(path: str) -> set[str]:
    """The data sets that a path of training data names; the longest name counts at each place."""
    spans: dict[tuple[int, int], set[str]] = defaultdict(set)
    for name, dataset in DATASETS.items():
        for one in (name, *dataset.also) if dataset.items is not None else ():
            words = "[^a-z0-9]*".join(re.findall("[a-z]+|[0-9]+", one.lower()))
            for found in re.finditer(f"(?<![a-z]){words}(?![a-z])", path.lower()):
                spans[found.span()].add(name)
    inside = {a for a in spans for b in spans if a != b and b[0] <= a[0] and a[1] <= b[1]}
    return {name for span, names in spans.items() if span not in inside for name in names}
