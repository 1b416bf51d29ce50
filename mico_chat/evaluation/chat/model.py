"""A chat model under evaluation: conversations in, and of each what came of it.

Two kinds: :class:`~mico_chat.evaluation.chat.in_process.InProcess` and
:class:`~mico_chat.evaluation.chat.endpoint.Endpoint`. What is not an answer is never taken for a
wrong one: a model that refuses a kind of medium has not failed at the question.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from tqdm import tqdm

from mico_chat.evaluation.tasks.store import Record
from mico_chat.messages import Message

Conversation: TypeAlias = Sequence[Message]

CONTROLS = ("full", "withheld", "swapped", "without-concepts", "without-grid", "base-llm")
"""What is shown, or which part of the model is used; :mod:`mico_chat.evaluation.skills`."""


@dataclass(frozen=True)
class Answered:
    """What the model said."""

    text: str


@dataclass(frozen=True)
class Refused:
    """The model does not take the request: a kind of medium, or its length."""

    reason: str


@dataclass(frozen=True)
class Unreadable:
    """A medium that cannot be read, whatever the model."""

    reason: str


Reply: TypeAlias = Answered | Refused | Unreadable


class ChatModel(Protocol):
    """What answers.

    ``controls``: those of :data:`CONTROLS` that it has. ``together``: conversations whose answers
    may depend on each other to the last bit, because they are computed in one batch.
    """

    name: str
    controls: tuple[str, ...]
    together: int

    def header(self) -> Record:
        """All that its answers depend on; ``how`` says it in words for the report."""
        ...

    def use(self, control: str) -> None:
        """Switch to the parts that a control leaves. ``base-llm`` cannot be taken back."""
        ...

    def answers(
        self, conversations: Sequence[Conversation], max_tokens: int
    ) -> Iterator[tuple[int, Reply]]:
        """Greedy answers by the conversation's place, each as it comes.

        Raises:
            MicoError: the model failed, or cannot be reached.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


def replies(
    model: ChatModel,
    conversations: Sequence[Conversation],
    done: Collection[int],
    max_tokens: int,
    what: str,
) -> Iterator[tuple[int, Reply, float]]:
    """The replies that are not ``done``, by place, and the seconds since the one before.

    Whole batches are asked again, so that a resumed run computes what an uninterrupted one would
    have.
    """
    size = model.together
    batches = [
        range(start, min(start + size, len(conversations)))
        for start in range(0, len(conversations), size)
    ]
    places = [i for batch in batches if any(i not in done for i in batch) for i in batch]
    found = model.answers([conversations[i] for i in places], max_tokens)
    before = time.perf_counter()
    for number, reply in tqdm(found, desc=what, unit="answer", total=len(places)):
        if (place := places[number]) not in done:
            now = time.perf_counter()
            yield place, reply, round(now - before, 3)
            before = now


def reply_of(text: str, finish_reason: str | None, max_tokens: int) -> Reply:
    """What a model said; nothing at all until its tokens ran out is no answer."""
    if not text and finish_reason == "length":
        return Refused(
            f"the model wrote no answer within {max_tokens} tokens: a model that thinks "
            "first needs a higher --max-tokens"
        )
    return Answered(text)


def outcome(reply: Reply, id: str) -> Record:
    """What a store keeps of a reply that is no answer; of an answer its text alone."""
    if isinstance(reply, Answered):
        return {"id": id, "answer": reply.text}
    kind = "refused" if isinstance(reply, Refused) else "broken"
    return {"kind": kind, "id": id, "reason": reply.reason}
