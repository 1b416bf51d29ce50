"""What a model answers; it may be begun before its question has certainly ended."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

from mico_chat.ask import Ask
from mico_chat.assistant import GatheredAnswer
from mico_chat.engine.base import Delta
from mico_chat.errors import MicoError
from mico_chat.messages import Message
from mico_chat.options import GenerationOptions
from mico_chat.speech.events import Item, Session
from mico_chat.tools import CallPiece, read_tool_use
from mico_chat.wire import Usage
from mico_server.dialects.openai import check_size
from mico_server.http.auth import Caller
from mico_server.realtime.conversation import Conversation, Kept
from mico_server.realtime.writing import Written
from mico_server.service import Client


class Thinking:
    """A model's answer to the messages ``read``, with the settings of a session at this time.

    It begins at once. Its ``pieces`` wait until they are taken; None is the last one. It ends,
    and counts as an answer, once it is ``wanted``: until then it can be dropped without a trace.
    """

    def __init__(
        self,
        client: Client,
        session: Session,
        read: Sequence[Message],
    ) -> None:
        self._client, self._session, self._read = client, session, read
        self._ask: Ask | None = None
        self.wanted = asyncio.Event()
        self.pieces: asyncio.Queue[str | CallPiece | None] = asyncio.Queue()
        self.gathered = GatheredAnswer(1)
        self.usage: Usage | None = None
        self.finish = "stop"
        self.ended = asyncio.create_task(self._think())
        self.ended.add_done_callback(lambda _: self.pieces.put_nowait(None))

    def answers(self, session: Session, read: Sequence[Message]) -> bool:
        """Whether it would be the same if it began now, with these settings and messages."""
        return self._session == session and self._read == read

    async def drop(self) -> None:
        """Stop the model, if it has not ended yet."""
        self.ended.cancel()
        await asyncio.gather(self.ended, return_exceptions=True)

    async def get_ready(self, next_: Sequence[Message]) -> None:
        """Once it has ended: let the model compute what the answer to ``next_`` begins with, if it
        begins otherwise than this one, for lack of room."""
        if self._ask is None or self.usage is None:
            return
        ask, usage = replace(self._ask, messages=next_), self.usage
        async with AsyncExitStack() as stack:
            host = await self._client.use(stack, self._session.model)
            if list(next_[: len(self._read)]) == list(self._read):
                shown = await host.guarded(host.assistant.shown(ask))
                left_out = shown.turns_left_out, shown.media_left_out
                if left_out == (usage.turns_left_out, usage.media_left_out):
                    return
            await host.guarded(host.assistant.compute(ask))

    async def _think(self) -> None:
        session, given = self._session, {"truncation": "auto"}
        most = session.max_output_tokens
        options = GenerationOptions.of(given if most == "inf" else {**given, "max_tokens": most})
        declared, choice, parallel = session.tools, session.tool_choice, session.parallel_tool_calls
        tools = read_tool_use(declared, choice, parallel=parallel, flat=True)
        check_size(declared, self._client.service.settings)
        ask = self._ask = Ask(self._read, options, self._client.tenant, tools)
        async with AsyncExitStack() as stack:
            host = await self._client.use(stack, session.model)
            if declared:
                host.assistant.check_tools()
            host.assistant.check_length(ask)
            async with aclosing(host.stream(ask, self.wanted)) as events:
                async for one in events:
                    self.gathered.add(one)
                    if isinstance(one, Delta):
                        if one.text:
                            self.pieces.put_nowait(one.text)
                        if one.call is not None:
                            self.pieces.put_nowait(one.call)
                        self.usage = one.usage or self.usage
                        self.finish = one.finish_reason or self.finish


class Ahead:
    """At most one answer that is begun at the likely end of a turn, by a ``task``."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.thinking: Thinking | None = None

    async def think(
        self,
        client: Client,
        words: asyncio.Task[Written],
        conversation: Conversation,
        session: Session,
        caller: Caller,
    ) -> None:
        """Begin the answer, as soon as the turn is written down, unless a limit forbids it."""
        found = await asyncio.shield(words)  # whoever drops the answer still needs the words
        if isinstance(found, MicoError) or not found[0]:
            return
        kept = Kept(Item(role="user"), Message.user(found[0]))
        try:
            limits = await client.service.left(caller)
            read = await conversation.messages(session.instructions, kept)
        except MicoError:
            return  # the response itself will find it, and tell the client
        if all(one["remaining"] for one in limits):
            self.thinking = Thinking(client, session, read)

    def taken(self, session: Session, read: Sequence[Message]) -> Thinking | None:
        """The answer to these messages, if it is the one that was begun."""
        if (thinking := self.thinking) is None or not thinking.answers(session, read):
            return None
        self.thinking = None
        return thinking

    async def drop(self) -> None:
        """Speech goes on, or the question became another one."""
        (task, self.task), (thinking, self.thinking) = (self.task, None), (self.thinking, None)
        if task is not None:
            task.cancel()
        if thinking is not None:
            await thinking.drop()
