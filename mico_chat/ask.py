"""One question, however it came in: what the assistant, and every stage of it, takes whole."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from mico_chat.messages import Message
from mico_chat.options import GREEDY, GenerationOptions
from mico_chat.tools import NO_TOOLS, ToolUse
from mico_chat.wire import Progress

T = TypeVar("T")

NOTE: ContextVar[Callable[[Progress], None] | None] = ContextVar("NOTE", default=None)
"""Who is told how far the work for a request is. The request's own tasks set and read it."""


LORA: ContextVar[Any] = ContextVar("LORA", default=None)
"""The adapter (:class:`~mico_chat.checkpoints.lora.Lora`) with which media are encoded."""


@dataclass(frozen=True)
class Ask:
    """A conversation, how its next message is to be answered, and for whom.

    ``plain`` is a prompt that is continued as it is: a text, whose markup is markup, or token ids.
    The chat template and the messages have no part in it. What was left out of the conversation
    is as in :class:`~mico_chat.wire.Usage`.

    Only questions of the same ``tenant`` share encoded media and computed tokens, besides those of
    the system prompt.
    """

    messages: Sequence[Message]
    options: GenerationOptions = GREEDY
    tenant: str = ""
    tools: ToolUse = NO_TOOLS
    plain: str | tuple[int, ...] | None = None
    turns_left_out: int = 0
    media_left_out: int = 0
    pages_sent: tuple[str, ...] = ()


class Tally:
    """Counts the steps of some work for a request, and tells NOTE each of them."""

    def __init__(self, what: Literal["media", "explain"], total: int) -> None:
        self.what, self.total, self.done, self._note = what, total, 0, NOTE.get()

    def step(self, n: int = 1, *, more: int = 0) -> None:
        self.done, self.total = self.done + n, self.total + more
        if self._note is not None:
            self._note(Progress(what=self.what, done=self.done, total=self.total))

    async def counted(self, work: Callable[..., Awaitable[T]], *given: Any) -> T:
        found = await work(*given)
        self.step()
        return found
