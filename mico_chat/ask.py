"""One question, however it came in: what the assistant, and every stage of it, takes whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mico_chat.messages import Message
from mico_chat.options import GREEDY, GenerationOptions
from mico_chat.tools import NO_TOOLS, ToolUse


@dataclass(frozen=True)
class Ask:
    """A conversation, how its next message is to be answered, and for whom.

    Only questions of the same ``tenant`` share encoded media and computed tokens, besides those of
    the system prompt.
    """

    messages: Sequence[Message]
    options: GenerationOptions = GREEDY
    tenant: str = ""
    tools: ToolUse = NO_TOOLS
