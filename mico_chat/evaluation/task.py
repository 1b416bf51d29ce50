"""Tasks, the table of all tasks (``tasks.yaml``), and the items that a task asks a model about."""

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
    """A figure of the paper and its place there; ``also`` has other metrics of this row."""

    figure: float
    place: str
    also: dict[str, float] = {}


class Task(BaseModel, extra="forbid", frozen=True):
    """One row of the results.

    The first of ``metrics`` gives the row's figure. ``protocol`` names the items, ``how`` the way a
    pretraining model answers them. ``frames`` is the number of frames of a video, ``slices`` that
    of a sound or a sound track; with 0 slices, a video is used without its track. ``resolution`` is
    that of the paper's model. A retrieval cuts captions to ``text_length`` tokens, as fine-tuning
    does. A task with a ``prompt`` asks a chat model; ``{question}`` in it is the item's question.
    """

    name: str
    family: Family
    dataset: str = ""
    metrics: tuple[str, ...] = ("accuracy",)
    protocol: str = ""
    how: str = ""
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
    del rows["families"]  # anchors, which the rows of the tasks include
    return {name: Task(name=name, **row) for name, row in rows.items()}


def skills_task(name: str, **more: Any) -> Task:
    """A task of items with skills; a chat model gets their questions unchanged."""
    return Task(name=name, family="skills", prompt="{question}", **more)


ITEMS = "items"
"""The name of the task of all files of items on a command line."""
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
    """Media with the captions that people gave them, or with a question and its answers.

    An answer is right if it has one of ``answers`` before any other of the ``choices``.
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
    """The items of a data set, and the ids of broken items with the reasons.

    With ``same_words``, a caption is right for every medium that has the same caption.
    """

    items: list[Item] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    same_words: bool = False
    _seen: set[str] = field(default_factory=set)

    def lose(self, id: str, reason: str) -> None:
        self.broken.append((id, reason))

    def caption(
        self, id: str, medium: MediaFile | str, given: Sequence[object], paragraph: bool = False
    ) -> None:
        """Add a medium with its captions; they are one caption if they are a ``paragraph``.

        In place of a medium, a text is the reason why the medium cannot be used.
        """
        texts = [_clean(text) for text in given]
        for number, text in enumerate(texts, 1):
            if not text:
                self.lose(f"{id}, caption {number}", "it is empty")
        texts = [text for text in texts if text]
        captions = (" ".join(texts),) if paragraph and texts else tuple(texts)
        self._add(id, medium, "" if texts else "it has no caption", captions=captions)

    def ask(
        self, id: str, medium: MediaFile | str, question: object, given: Sequence[object]
    ) -> None:
        """Add a question about a medium with the answers that people gave."""
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
    """The text with single spaces. Half a surrogate pair, which no tokenizer reads, becomes "?"."""
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
    """The items of these skills, or all items for no skills; ``path`` is their file in errors."""
    known = sorted({item.skill for item in items})
    if unknown := set(skills) - set(known):
        why = f"unknown skill {min(unknown)!r}; the skills are {', '.join(known)}"
        raise DataError(path, None, why)
    if not items:
        raise DataError(path, None, "the files hold no items")
    return [item for item in items if not skills or item.skill in skills]


def words_digest(items: Sequence[Item]) -> str:
    """A digest of the ids and words of a data set's items; their media make no difference."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.id, item.captions, item.question, item.answers)).encode())
    return digest.hexdigest()[:16]


def bytes_digest(items: Sequence[Item]) -> str:
    """A digest of the words and the media's bytes of items; the places of files do not matter."""
    digest = hashlib.sha256()
    for item in items:
        words = {"id": item.id, "skill": item.skill, "message": item.question}
        whole = {**words, "accept": item.answers, "choices": item.choices}
        digest.update(json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode())
        for file in item.media:
            try:
                data = file.read()
            except MediaError:  # the run reports this medium as broken
                data = b""
            digest.update(f"{file.kind} {hashlib.sha256(data).hexdigest()}".encode())
    return digest.hexdigest()[:16]
