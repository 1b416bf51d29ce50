"""Tasks, the table of all tasks (``tasks.yaml``), and the items that a task asks a model about.

A :class:`Model` gives a :class:`Reply` for each item.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.store import Record
from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.messages import Message

if TYPE_CHECKING:
    from torch import nn

MEDIA_CONTROLS = ("full", "withheld", "swapped")
CONTROLS = (*MEDIA_CONTROLS, "without-concepts", "without-grid", "base-llm")
"""Ways to ask a model, which show where its figures come from; :mod:`.run` explains each.

The media controls change nothing but the media, so they are there for every model."""

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
    ``controls`` are those of a task that is no suite; ``peers`` the published figures of others.
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
    controls: tuple[str, ...] = ("full",)
    peers: dict[str, PaperFigure] = {}


ITEMS = Task(name="items", family="skills", prompt="{question}")
"""All files of items on a command line are of this task."""
_ROWS = yaml.safe_load(Path(__file__).with_name("tasks.yaml").read_text(encoding="utf-8"))
# "families" is no task: it holds anchors, which the rows of the tasks include.
TASKS = {name: Task(name=name, **row) for name, row in _ROWS.items() if name != "families"}
SUITES = [name for name, task in TASKS.items() if task.family == "skills"]
OWN = ("own", "world")
"""The data sets that are read as in training: what ``--data`` names, and the data engine's."""


def task_named(name: str) -> Task:
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`mico-chat evaluate --list` lists the tasks"
    raise ConfigError(f"{name!r} is neither a task nor a file of items; {hint}")


class Earlier(NamedTuple):
    """An earlier turn of a conversation: how many media it shows, its question and answer."""

    shows: int
    question: str
    answer: str


@dataclass(frozen=True)
class Item:
    """Media with the captions that people gave them, or with a question and its answers.

    The first of the ``media`` are those of ``earlier`` turns, whose answers are given.

    An answer is right if it has one of ``answers`` before any other of the ``choices``, and none of
    ``reject``. The ``subtitle`` is what is said in the media, for a stage 1 model that reads it.
    """

    id: str
    media: tuple[MediaFile, ...] = ()
    question: str = ""
    captions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    skill: str = ""
    reject: tuple[str, ...] = ()
    subtitle: str = ""
    earlier: tuple[Earlier, ...] = ()

    def messages(self) -> list[Message]:
        """The conversation up to the question; turns whose media are withheld show none."""
        media, found = list(self.media), []
        for turn in self.earlier:
            shown, media = media[: turn.shows], media[turn.shows :]
            found += [Message.user(*shown, turn.question), Message.assistant(turn.answer)]
        return [*found, Message.user(*media, self.question)]

    def asked(self) -> Record:
        """The question of a skill and its right and wrong answers, as a record has them."""
        words = {"message": self.question, "accept": self.answers, "choices": self.choices}
        more = {"reject": self.reject, "earlier": self.earlier}
        return words | {key: value for key, value in more.items() if value}


@dataclass
class Contents:
    """The items of a data set, and the ids of broken items with the reasons.

    With ``same_words``, a caption is right for every medium that has the same caption.
    """

    items: list[Item] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    same_words: bool = False
    _seen: set[str] = field(default_factory=set)

    def caption(
        self, id: str, medium: MediaFile | str, given: Sequence[object], paragraph: bool = False
    ) -> None:
        """Add a medium with its captions; they are one caption if they are a ``paragraph``.

        In place of a medium, a text is the reason why the medium cannot be used.
        """
        texts = [_clean(text) for text in given]
        for number, text in enumerate(texts, 1):
            if not text:
                self.broken.append((f"{id}, caption {number}", "it is empty"))
        texts = [text for text in texts if text]
        captions = (" ".join(texts),) if paragraph and texts else tuple(texts)
        self._add(id, medium, "" if texts else "it has no caption", captions=captions)

    def ask(
        self,
        id: str,
        medium: MediaFile | str,
        question: object,
        given: Sequence[object],
        **more: Any,
    ) -> None:
        """Add a question about a medium with the answers that people gave; ``choices`` are shown
        below it, with letters."""
        texts = tuple(str(answer) for answer in given if answer is not None and str(answer).strip())
        asked = _clean(question)
        fault = "" if asked and texts else f"it has no {'answer' if asked else 'question'}"
        asked += "".join(map("\n{}. {}".format, ascii_uppercase, more.get("choices", ())))
        self._add(id, medium, fault, question=asked, answers=texts, **more)

    def _add(self, id: str, medium: MediaFile | str, fault: str, **words: Any) -> None:
        if not fault:
            fault = "the item occurs twice; only the first is used" if id in self._seen else ""
            self._seen.add(id)
        if fault or isinstance(medium, str):
            self.broken.append((id, fault or str(medium)))
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


class _Turn(BaseModel, extra="forbid"):
    message: str
    media: tuple[_Medium, ...] = ()
    answer: str


class _Line(BaseModel, extra="forbid"):
    id: str = ""
    skill: str
    message: str
    media: tuple[_Medium, ...] = ()
    earlier: tuple[_Turn, ...] = ()
    accept: tuple[str, ...]
    choices: tuple[str, ...] = ()
    reject: tuple[str, ...] = ()


def read_items(path: Path) -> list[Item]:
    """The items of a JSONL file, one on each line::

        {"id": "..", "skill": "count", "message": "How many dogs are there?",
         "media": [{"kind": "image", "path": "x.jpg"}], "accept": ["two"],
         "choices": ["one", "two"]}

    ``earlier`` has the turns before the question, each with a message, its media and its answer.
    Media paths are relative to the file's folder. A line without an id is named by its place.
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
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise DataError(path, number, f"{key}: {first['msg']}".removeprefix(": ")) from error
        shown = [m for turn in line.earlier for m in turn.media] + list(line.media)
        media = tuple(MediaFile(m.kind, path.parent / m.path) for m in shown)
        earlier = tuple(Earlier(len(t.media), t.message, t.answer) for t in line.earlier)
        words = (line.accept, line.choices, line.skill, line.reject)
        id = line.id or f"{path.name}:{number}"
        items.append(Item(id, media, line.message, (), *words, earlier=earlier))
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


def fingerprint(model: nn.Module, more: str = "") -> str:
    """A digest of ``more`` and of each tensor's shape and sum: faster than one of all bytes."""
    digest = hashlib.sha256(more.encode())
    for name, tensor in sorted(model.state_dict().items()):
        total = tensor.double().sum().item()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total!r}\n".encode())
    return digest.hexdigest()[:16]


def files_fingerprint(files: Sequence[Path]) -> str:
    """A digest of the names and the bytes of files."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Reply:
    """An answer, or the reason why the model refuses the item or its medium is broken.

    Refused and broken items do not count as wrong answers. ``confidence`` is that of an answer
    about media, if the model gives it. ``cut``: the answer reached the limit of its tokens.
    """

    kind: Literal["answer", "refused", "broken"]
    text: str
    confidence: float | None = None
    cut: bool = field(default=False, compare=False)

    @classmethod
    def of(
        cls, text: str, finish: str | None, max_tokens: int | None, confidence: float | None = None
    ) -> Reply:
        if text or finish != "length":
            return cls("answer", text, confidence, finish == "length")
        why = f"the model wrote no answer within {max_tokens} tokens: a model that thinks first"
        return cls("refused", f"{why} needs a higher --max-tokens")


class Model:
    """A model under evaluation."""

    def header(self) -> Record:
        """Everything that the answers depend on; ``model`` is its name, ``weights`` a digest."""
        raise NotImplementedError

    def use(self, control: str) -> None:
        """Switch off the parts that a control leaves out. ``base-llm`` cannot be undone."""

    def batches(self, items: Sequence[Item]) -> list[list[int]]:
        """The batches, as places of items. The last bits of an answer depend on its batch."""
        return chunks(len(items), 1)

    def answers(
        self, task: Task, items: Sequence[Item], max_tokens: int
    ) -> Iterator[tuple[int, Reply]]:
        """Yields the place of each item and its greedy or beam-searched answer, in any order."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what the model holds, such as processes and connections."""


def chunks(count: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]
