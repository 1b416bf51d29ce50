"""What a task is, the items that it asks about, and the table of all tasks (``tasks.yaml``)."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from mico_chat.errors import ConfigError, DataError, MediaError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.messages import Message

Family = Literal["retrieval", "captioning", "qa", "skills"]
Split = Literal["test", "train"]


class PaperFigure(BaseModel, extra="forbid", frozen=True):
    """A figure of the paper and its place there; ``also`` has other metrics of the same row."""

    figure: float
    place: str
    also: dict[str, float] = {}


class Task(BaseModel, extra="forbid", frozen=True):
    """One row of the results.

    The first of ``metrics`` is the row's figure. ``frames`` are taken of a video, ``slices`` of a
    sound or a video's sound track; with ``slices`` 0 a track is left out. ``resolution`` is the
    paper's model's. A retrieval's captions are cut to ``text_length`` tokens, as in fine-tuning. A
    task with a ``prompt`` asks a chat model; ``{question}`` in it is the item's.
    """

    name: str
    family: Family
    dataset: str = ""
    metrics: tuple[str, ...] = ("accuracy",)
    protocol: str = ""
    paper: PaperFigure | None = None
    frames: int = 1
    slices: int = 0
    resolution: int = 224
    text_length: int = 40
    prompt: str = ""
    max_tokens: int = 0
    judged: bool = False
    skills: tuple[str, ...] = ()

    def asked(self, item: Item) -> Item:
        return replace(item, question=self.prompt.replace("{question}", item.question))


def _read_tasks() -> dict[str, Task]:
    text = Path(__file__).with_name("tasks.yaml").read_text(encoding="utf-8")
    rows: dict[str, dict[str, Any]] = yaml.safe_load(text)
    families = rows.pop("families")
    tasks = {}
    for name, row in rows.items():
        if "skills" in row:
            tasks[name] = skills_task(name, **row)
            continue
        family = next((f for f in ("retrieval", "captioning") if f"-{f}" in name), "qa")
        if "prompt" not in row:
            row["protocol"] += f"; {families[family]['protocol']}"
        tasks[name] = Task.model_validate(
            {"name": name, "family": family, "metrics": families[family]["metrics"]} | row
        )
    return tasks


def skills_task(name: str, **more: Any) -> Task:
    """A task of items with skills; its questions are asked as they stand."""
    return Task(name=name, family="skills", prompt="{question}", **more)


ITEMS = "items"
"""The task of the files of items that a command line names."""
TASKS = _read_tasks()
SUITES = [name for name, task in TASKS.items() if task.family == "skills"]


def task_named(name: str) -> Task:
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`mico-chat evaluate --list` lists the tasks"
    raise ConfigError(f"{name!r} is neither a task nor a file of items; {hint}")


@dataclass(frozen=True)
class Item:
    """Media, and the captions that people gave them, or a question about them and its answers.

    A right answer says one of ``answers``, before any other of ``choices``.
    """

    id: str
    media: tuple[MediaFile, ...] = ()
    question: str = ""
    captions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    skill: str = ""

    def message(self) -> Message:
        return Message.user(*self.media, self.question)


@dataclass
class Contents:
    """The items of a data set, filled by its reader, and the ids of broken ones with the reason.

    With ``same_words`` a caption is right for every medium that has it word for word.
    """

    items: list[Item] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    same_words: bool = False
    _seen: set[str] = field(default_factory=set)

    def lose(self, id: str, reason: str) -> None:
        self.broken.append((id, reason))

    def caption(self, id: str, medium: MediaFile | str, captions: object) -> None:
        """Add a medium, or the reason why there is none, with its captions: texts in a list, or
        one.
        """
        given = captions if isinstance(captions, list | tuple) else [captions]
        texts = [_clean(text) for text in given]
        for number, text in enumerate(texts, 1):
            if not text:
                self.lose(f"{id}, caption {number}", "it is empty")
        texts = [text for text in texts if text]
        self._add(id, medium, "" if texts else "it has no caption", captions=tuple(texts))

    def ask(self, id: str, medium: MediaFile | str, question: object, answers: object) -> None:
        """Add a question with the answers that people gave."""
        given = answers if isinstance(answers, list | tuple) else [answers]
        texts = tuple(str(answer) for answer in given if answer is not None and str(answer).strip())
        asked = _clean(question)
        fault = "" if asked and texts else f"it has no {'answer' if asked else 'question'}"
        self._add(id, medium, fault, question=asked, answers=texts)

    def _add(self, id: str, medium: MediaFile | str, fault: str, **words: Any) -> None:
        if not fault:
            fault = "the item occurs twice; only the first is used" if id in self._seen else ""
            self._seen.add(id)
        if fault or isinstance(medium, str):
            self.lose(id, fault or str(medium))
        else:
            self.items.append(Item(id, (medium,), **words))

    def first(self, limit: int) -> Contents:
        """The first ``limit`` items of each skill; 0 is all."""
        taken: Counter[str] = Counter()
        kept = []
        for item in self.items:
            taken[item.skill] += 1
            if not limit or taken[item.skill] <= limit:
                kept.append(item)
        return replace(self, items=kept)


def _clean(text: object) -> str:
    """Single spaces; "?" for half a surrogate pair, which JSON can spell and no tokenizer takes."""
    words = text.encode("utf-8", "replace").decode().split() if isinstance(text, str) else ()
    return " ".join(words)


class _Medium(BaseModel, extra="forbid"):
    kind: Kind
    path: Path


class _Line(BaseModel, extra="forbid"):
    id: str
    skill: str
    message: str
    media: tuple[_Medium, ...] = ()
    accept: tuple[str, ...]
    choices: tuple[str, ...] = ()


def read_items(path: Path) -> list[Item]:
    """The items of a JSONL file, one on each line::

        {"id": "..", "skill": "count", "message": "How many dogs are there?",
         "media": [{"kind": "image", "path": "x.jpg"}], "accept": ["two"],
         "choices": ["one", "two"]}

    Media paths are relative to the file's folder.
    """
    try:
        whole = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "its text is not UTF-8"
        raise DataError(path, None, reason) from error
    items = []
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = _Line.model_validate_json(text)
        except ValidationError as error:
            raise DataError(path, number, error.errors()[0]["msg"]) from error
        media = tuple(MediaFile(m.kind, path.parent / m.path) for m in line.media)
        answers, choices = line.accept, line.choices
        items.append(Item(line.id, media, line.message, (), answers, choices, line.skill))
    return items


def of_skills(items: Sequence[Item], skills: Sequence[str], path: Path) -> list[Item]:
    """The items of these skills, all for an empty list; ``path`` names their file in errors."""
    known = sorted({item.skill for item in items})
    if unknown := set(skills) - set(known):
        why = f"unknown skill {min(unknown)!r}; the skills are {', '.join(known)}"
        raise DataError(path, None, why)
    if not items:
        raise DataError(path, None, "the files hold no items")
    return [item for item in items if not skills or item.skill in skills]


def words_digest(items: Sequence[Item]) -> str:
    """A name for items of a data set: of their ids and words, not of their media."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.id, item.captions, item.question, item.answers)).encode())
    return digest.hexdigest()[:16]


def bytes_digest(items: Sequence[Item]) -> str:
    """A name for items of files: of their words and their media's bytes, not of the places."""
    digest = hashlib.sha256()
    for item in items:
        words = {"id": item.id, "skill": item.skill, "message": item.question}
        whole = {**words, "accept": item.answers, "choices": item.choices}
        digest.update(json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode())
        for file in item.media:
            try:
                data = file.read()
            except MediaError:  # a run names it as broken when it shows it
                data = b""
            digest.update(f"{file.kind} {hashlib.sha256(data).hexdigest()}".encode())
    return digest.hexdigest()[:16]
