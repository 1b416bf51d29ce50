"""A stored conversation: a tree of turns, each a user's message and its answer.

A turn has a number, counted from 1 in its conversation, and stands behind its parent. Turns with
the same parent are versions: a question that was changed or asked again keeps the former one. A
conversation is read along one path, from the beginning to its head.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, Field

from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MediaReport
from mico_chat.messages import Message, TextPart
from mico_chat.wire import TurnEnd, Usage
from mico_server.store.media import MediaRecord, NewMedium
from mico_server.store.tables import now

MOST_TITLED = 2000  # characters of a message, among which the words of its title are looked for


class StoredText(BaseModel):
    type: Literal["text"] = "text"
    text: str


class StoredMedium(BaseModel):
    type: Kind
    media_id: str
    pinned: bool = False
    heard: bool = False


StoredPart: TypeAlias = Annotated[StoredText | StoredMedium, Field(discriminator="type")]


@dataclass(frozen=True)
class NewTurn:
    """A turn to be stored. ``new_media`` are those of ``parts`` that are not stored yet.

    ``reports`` has one report for each medium. ``created_at`` distinguishes the turn from a later
    turn of the same number. It stands behind the turn ``parent``, or at the beginning (0).
    ``beside`` is the version whose question another model answers here, too, and ``preferred`` the
    better one of both.
    """

    parts: Sequence[StoredPart]
    model: str
    answer: str = ""
    finish_reason: TurnEnd = "unanswered"
    usage: Usage | None = None
    reports: Sequence[MediaReport] = ()
    confidence: float | None = None
    unsure: bool | None = None
    new_media: Sequence[NewMedium] = ()
    created_at: datetime = field(default_factory=now)
    parent: int = 0
    beside: int | None = None
    preferred: int | None = None


class Turn(BaseModel):
    number: int
    parent: int
    parts: tuple[StoredPart, ...]
    answer: str
    finish_reason: TurnEnd
    usage: Usage | None
    reports: tuple[MediaReport, ...]
    confidence: float | None
    unsure: bool | None
    created_at: datetime
    model: str | None
    beside: int | None
    preferred: int | None


@dataclass(frozen=True)
class ConversationInfo:
    """A conversation without its turns; ``model`` gave the last answer, at ``updated_at``."""

    id: str
    tenant: str
    title: str
    system: str | None
    model: str
    created_at: datetime
    updated_at: datetime
    head: int | None
    revision: int
    pinned: bool
    archived: bool
    last_number: int


@dataclass(frozen=True)
class Conversation(ConversationInfo):
    """A conversation along one path, and the media that it shows, by their ids.

    ``turns`` are those of the path, ``tree`` has all turns by their numbers.
    """

    turns: tuple[Turn, ...]
    media: Mapping[str, MediaRecord]
    tree: Mapping[int, Turn]

    @property
    def next_number(self) -> int:
        """The number of the next turn, which no turn has had before."""
        return max(self.last_number, *self.tree, 0) + 1

    @cached_property
    def versions(self) -> Mapping[int, Sequence[int]]:
        """The numbers of the turns behind each parent, the oldest first."""
        found: dict[int, list[int]] = {}
        for turn in self.tree.values():
            found.setdefault(turn.parent, []).append(turn.number)
        return found

    @cached_property
    def pinned_media(self) -> frozenset[str]:
        """The ids of the media that stay where the conversation is shortened."""
        return frozenset(part.media_id for part in self._media_parts() if part.pinned)

    @cached_property
    def heard_media(self) -> frozenset[str]:
        """The ids of the sounds that no model is shown, since messages have their words."""
        return frozenset(part.media_id for part in self._media_parts() if part.heard)

    def _media_parts(self) -> Iterator[StoredMedium]:
        parts = (part for turn in self.tree.values() for part in turn.parts)
        return (part for part in parts if isinstance(part, StoredMedium))

    def path(self, number: int) -> tuple[Turn, ...]:
        """The turns from the beginning to this one."""
        parents = {turn.number: turn.parent for turn in self.tree.values()}
        return tuple(self.tree[one] for one in path_to(parents, number))

    @cached_property
    def rivals(self) -> Mapping[int, Turn]:
        """For each turn that was answered beside another, and for that one: the later of both."""
        pairs = [turn for turn in self.tree.values() if turn.beside in self.tree]
        return {one: turn for turn in pairs for one in (turn.beside or 0, turn.number)}

    @cached_property
    def later(self) -> Mapping[int, int]:
        """How many turns follow each turn, on any path."""
        found: Counter[int] = Counter()
        for turn in reversed(list(self.tree.values())):  # children before their parents
            found[turn.parent] += 1 + found[turn.number]
        return found


def path_to(parents: Mapping[int, int], last: int) -> list[int]:
    """The turns from the beginning to ``last``; none for 0."""
    found = []
    while last:
        found.append(last)
        last = parents[last]
    return found[::-1]


def turns_behind(parents: Mapping[int, int], number: int) -> set[int]:
    """All turns that follow a turn. A turn's number is above its parent's."""
    found = {number}
    for child in sorted(parents):
        if parents[child] in found:
            found.add(child)
    return found - {number}


def leaf_near(parents: Mapping[int, int], number: int) -> int:
    """The last turn of the newest path through a turn, or of the newest one at all (0)."""
    return max({*turns_behind(parents, number), number} - set(parents.values()), default=0)


def with_question(messages: Sequence[Message], question: Message) -> list[Message]:
    """Messages with a question behind them.

    An unanswered question before it becomes its first part, because many chat templates want user
    and assistant to take turns.
    """
    if not messages or messages[-1].role != "user":
        return [*messages, question]
    parts = (*messages[-1].content, TextPart("\n"), *question.content)
    return [*messages[:-1], Message("user", parts)]


def title_of(parts: Sequence[StoredPart]) -> str:
    """The first words of a message, at most 60 characters, or the kinds of its media."""
    start = text_in(parts)[:MOST_TITLED]
    words = " ".join("".join(c if c.isprintable() else " " for c in start).split())
    if not words:
        return ", ".join(dict.fromkeys(part.type for part in parts if part.type != "text"))
    if len(words) <= 60:
        return words
    # At the end of the last word; a script without spaces is cut anywhere.
    return f"{words[:59].rsplit(' ', 1)[0]}…"


def text_in(parts: Sequence[StoredPart]) -> str:
    return " ".join(part.text for part in parts if isinstance(part, StoredText))
