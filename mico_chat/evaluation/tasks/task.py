"""What a task is, and the items that it asks about."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mico_chat.media.file import TarMember
from mico_chat.media.kinds import Kind

Family = Literal["retrieval", "captioning", "qa"]
Split = Literal["test", "train"]


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper: what it measures, in per cent or points, and where it stands.

    ``also``: more metrics of the same row, and their values.
    """

    metric: str
    value: float
    place: str
    also: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Task:
    """One row of the results.

    ``metrics`` are computed in this order, and the first is the row's figure. ``frames`` are taken
    of a video, ``slices`` of a sound or a video's sound track; with ``slices`` 0 a track is left
    out. ``resolution`` is that of the paper's model; ours says itself which it has. Captions that
    are sought by lose what is beyond ``text_length`` tokens, as in fine-tuning. ``protocol`` is
    what a reader of the figure must know of how it came about.
    """

    name: str
    family: Family
    dataset: str
    metrics: tuple[str, ...]
    protocol: str
    paper: PaperFigure | None = None
    frames: int = 1
    slices: int = 0
    resolution: int = 224
    text_length: int = 40
    prompt: str = ""
    max_tokens: int = 0
    judged: bool = False


Stored: TypeAlias = Path | TarMember
"""Where a medium's encoded bytes lie."""


@dataclass(frozen=True)
class ItemMedia:
    """The one medium of an item; a video brings its sound track."""

    kind: Kind
    source: Stored

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.source.name if isinstance(self.source, Path) else self.source.path.name


@dataclass(frozen=True)
class Entry:
    """A medium and what people said of it, or a question about it and their answers.

    Entries of one ``id`` do not occur twice in a task. Several questions may share a medium.
    """

    id: str
    media: ItemMedia
    captions: tuple[str, ...] = ()
    question: str = ""
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Broken:
    """An item that cannot be used, and why. It is counted and named in every report."""

    id: str
    reason: str


@dataclass
class Contents:
    """What a data set's files hold of a split, filled by its reader.

    ``same_words``: a caption is right for every medium that has it word for word. The field's
    benchmarks count the one medium alone that the caption was written for.
    """

    entries: list[Entry] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    same_words: bool = False
    _seen: set[str] = field(default_factory=set)

    def lose(self, id: str, reason: str) -> None:
        """Count an item that cannot be used."""
        self.broken.append(Broken(id, reason))

    def caption(self, id: str, media: ItemMedia | str, captions: object) -> None:
        """Add a medium with its captions, or count what is wrong with it.

        Args:
            media: or why there is none.
            captions: as the file has them: texts in a list, or one.
        """
        given = captions if isinstance(captions, list | tuple) else [captions]
        texts = []
        for number, text in enumerate(given, 1):
            if isinstance(text, str) and text.strip():
                texts.append(_clean(text))
            else:
                self.lose(f"{id}, caption {number}", "it is empty")
        if not texts:
            self.lose(id, "it has no caption")
            return
        self._add(id, media, captions=tuple(texts))

    def ask(self, id: str, media: ItemMedia | str, question: object, answers: object) -> None:
        """Add a question with the answers people gave, or count what is wrong with it."""
        given = answers if isinstance(answers, list | tuple) else [answers]
        texts = tuple(str(answer) for answer in given if answer is not None and str(answer).strip())
        if not isinstance(question, str) or not question.strip():
            self.lose(id, "it has no question")
        elif not texts:
            self.lose(id, "it has no answer")
        else:
            self._add(id, media, question=_clean(question), answers=texts)

    def _add(self, id: str, media: ItemMedia | str, **words: Any) -> None:
        if id in self._seen:
            self.lose(id, "the item occurs twice; only the first is used")
            return
        self._seen.add(id)
        if isinstance(media, str):
            self.lose(id, media)
        else:
            self.entries.append(Entry(id, media, **words))

    def first(self, limit: int) -> Contents:
        """The first ``limit`` entries alone; 0 is all."""
        if not limit:
            return self
        return Contents(self.entries[:limit], self.broken, self.same_words)


def _clean(text: str) -> str:
    """Single spaces; halves of surrogates, which JSON can spell and no tokenizer takes, as "?"."""
    return " ".join(text.encode("utf-8", "replace").decode().split())
