"""A chat model that always says the same, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mico_chat.evaluation.chat.model import CONTROLS, Answered, Conversation, Reply
from mico_chat.evaluation.tasks.store import Record
from mico_chat.messages import Message


class Parrot:
    """Says ``says`` of a message, ``together`` at a time."""

    name = "parrot"

    def __init__(
        self, says: Callable[[Message], Reply] | None = None, *, together: int = 2
    ) -> None:
        self.controls: tuple[str, ...] = CONTROLS
        self.together = together
        self.says = says or (lambda _: Answered("Four."))
        self.used: list[str] = []
        self.asked: list[Message] = []
        self.limits: list[int] = []
        self.closed = False

    def header(self) -> Record:
        return {"model": self.name, "weights": None, "how": "by heart"}

    def use(self, control: str) -> None:
        self.used.append(control)

    def answers(
        self, conversations: Sequence[Conversation], max_tokens: int
    ) -> Iterator[tuple[int, Reply]]:
        for place, conversation in enumerate(conversations):
            self.asked.append(conversation[-1])
            self.limits.append(max_tokens)
            yield place, self.says(conversation[-1])

    def close(self) -> None:
        self.closed = True
