"""A response in real time: what a model has thought is spoken by the sentence."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mico_chat.errors import MicoError
from mico_chat.messages import Message
from mico_chat.speech import LanguageError, Voice, check_language
from mico_chat.speech.events import Content, Item, Response, Session
from mico_chat.speech.hearing import Resampler
from mico_chat.speech.sound import RATES, to_raw
from mico_chat.speech.speakable import Sentences
from mico_chat.tools import CallPiece
from mico_server.dialects.chat import ChatTurn
from mico_server.http.errors import mico_error_body
from mico_server.realtime.conversation import Kept, called, words_until
from mico_server.realtime.thinking import Thinking
from mico_server.routes.speech import in_thread
from mico_server.service import Client

PIECE_BYTES = 24_000  # of sound in an event: half a second of PCM

Say = Callable[..., Awaitable[None]]


class Answering:
    """Answers with the settings of a session at this time. ``say`` sends an event.

    ``thinking`` makes it, and ``turn`` stores it in a chat. ``reason`` is set by who cancels the
    task, else the cancellation is the session's end. ``truncated`` is set where a client ends it by
    that: a client that then cancels it too gets no error.
    """

    def __init__(
        self,
        client: Client,
        session: Session,
        response: Response,
        voice: Voice | None,
        say: Say,
        turn: Callable[[], AbstractAsyncContextManager[ChatTurn | None]] = nullcontext,
    ) -> None:
        self._to_store = turn
        self._turn: ChatTurn | None = None
        self._client, self.session, self._voice, self._say = client, session, voice, say
        self.response = response
        self.reason: str | None = None
        self.truncated = False
        self.kept = Kept(Item(role="assistant", status="in_progress"), Message.assistant())
        self._text = self._spoken = ""
        self.thinking: Thinking | None = None
        self._begun = self._mute = False
        self._output: list[Item] = []
        self._place: dict[str, Any] = {}
        self._call: Kept | None = None

    async def run(
        self,
        think: Callable[[], Awaitable[Thinking]],
        begin: Callable[[Kept], Awaitable[None]],
        language: Callable[[], str | None],
    ) -> None:
        await self._say("response.created", response=self.response)
        status, details = "completed", None
        async with AsyncExitStack() as stack:
            try:
                thinking = self.thinking = await think()
                stack.push_async_callback(thinking.drop)
                self._turn = await stack.enter_async_context(self._to_store())
                await self._answer(thinking, begin, language)
                if thinking.finish == "length":
                    status, details = "incomplete", {"reason": "max_output_tokens"}
            except MicoError as error:
                body = mico_error_body(error)["error"]
                status, details = "failed", {"error": body}
                await self._say("error", error=body)
            except BaseException as error:
                if not isinstance(error, asyncio.CancelledError) or self.reason is None:
                    await self._keep("cancelled")  # the client has left, or the session ends
                    raise
                status, details = "cancelled", {"reason": self.reason}
            try:
                await self._keep(status)
            except MicoError as error:
                await self._say("error", error=mico_error_body(error)["error"])
        await self._end(status, details)

    async def _answer(
        self,
        thinking: Thinking,
        begin: Callable[[Kept], Awaitable[None]],
        language: Callable[[], str | None],
    ) -> None:
        thinking.wanted.set()
        try:
            sentences = Sentences()
            while (piece := await thinking.pieces.get()) is not None:
                if isinstance(piece, CallPiece):
                    for sentence in sentences.end():
                        await self._speak(sentence.text, language())
                    await self._called(piece, begin)
                    continue
                if not self._begun:
                    await self._announce(begin)
                if self._voice is None:
                    self._text += piece
                    await self._event("response.output_text.delta", delta=piece)
                else:
                    for sentence in sentences.feed(piece):
                        await self._speak(sentence.text, language())
                if self._turn is not None:
                    self._turn.keep_so_far(lambda: self._text)
            await thinking.ended
            for sentence in sentences.end():
                await self._speak(sentence.text, language())
            if thinking.finish == "stop":
                await self._call_ends("completed")
        finally:
            await thinking.drop()

    async def _announce(self, begin: Callable[[Kept], Awaitable[None]]) -> None:
        self._begun = True
        self._place = await self._add(self.kept, begin)
        await self._event("response.content_part.added", part=self._part(""))

    async def _add(self, kept: Kept, begin: Callable[[Kept], Awaitable[None]]) -> dict[str, Any]:
        """Begin an item of the response; its place is returned."""
        place = {"response_id": self.response.id, "output_index": len(self._output)}
        self._output.append(kept.item)
        await self._say("response.output_item.added", **place, item=kept.item)
        await begin(kept)
        return {**place, "item_id": kept.item.id}

    async def _called(self, piece: CallPiece, begin: Callable[[Kept], Awaitable[None]]) -> None:
        if piece.name is not None:
            await self._call_ends("completed")
            told = {"call_id": piece.id, "name": piece.name, "arguments": ""}
            item = Item(type="function_call", status="in_progress", **told)
            self._call = Kept(item, Message.assistant())
            self._call_place = await self._add(self._call, begin)
        if self._call is not None and piece.arguments:
            self._call.item.arguments = f"{self._call.item.arguments}{piece.arguments}"
            told = {"call_id": str(self._call.item.call_id), "delta": piece.arguments}
            await self._say("response.function_call_arguments.delta", **self._call_place, **told)

    async def _call_ends(self, status: Any) -> None:
        if (kept := self._call) is None:
            return
        self._call, kept.item.status = None, status
        if status == "completed":
            kept.read = called(kept.item)
        told = kept.item.model_dump(include={"call_id", "name", "arguments"})
        await self._say("response.function_call_arguments.done", **self._call_place, **told)
        await self._item_ends(kept.item)

    async def _item_ends(self, item: Item) -> None:
        place = {"response_id": self.response.id, "output_index": self._output.index(item)}
        await self._say("response.output_item.done", **place, item=item)
        await self._say("conversation.item.done", item=item)

    async def _speak(self, text: str, language: str | None) -> None:
        """Say a sentence; nobody speaks a language without a voice, which is told once."""
        assert self._voice is not None
        self._text += text
        await self._event("response.output_audio_transcript.delta", delta=text)
        try:
            check_language(self._voice, text, language)
        except LanguageError as error:
            if not self._mute:
                self._mute = True
                await self._say("error", error=mico_error_body(error)["error"])
            return
        made = self._voice.say(text, self.session.audio.output.speed)
        await self._sound(text, made, self._voice.sample_rate)

    async def _sound(self, text: str, made: Iterator[NDArray[np.float32]], rate: int) -> None:
        """Send the sound of a text while it is made."""
        form = self.session.audio.output.format.type
        seconds, n, sent = 0.0, 0, 0
        try:
            while (samples := await in_thread(made)) is not None:
                seconds += len(samples) / rate
                raw = to_raw(Resampler(rate, RATES[form])(samples, last=True), form)
                n += len(raw)
                for at in range(0, len(raw), PIECE_BYTES):
                    piece = raw[at : at + PIECE_BYTES]
                    delta = base64.b64encode(piece).decode()
                    await self._event("response.output_audio.delta", delta=delta)
                    sent += len(piece)
        except asyncio.CancelledError:
            if sent:
                said = words_until(text, sent / n), seconds * sent / n
                self.kept.said.append(said)
            raise
        self.kept.said.append((text, seconds))

    async def _keep(self, status: str) -> None:
        """Store what was said: of an answer that is cut off, not what nobody can have heard."""
        if status == "cancelled" and self._voice is not None:
            self._text = "".join(text for text, _ in self.kept.said)
        if self._turn is None or self.thinking is None:
            return
        gathered = self.thinking.gathered
        if status in ("completed", "incomplete"):
            if any(item.type == "function_call" for item in self._output):
                self._turn.set_aside(self._text)  # the answer goes on behind the result
            else:
                await self._turn.keep(gathered.answer())
        elif self._text:
            await self._turn.keep_part(gathered, self._text)
        else:
            self._turn.set_aside()
        self.kept.cut = self._turn.cut

    async def _end(self, status: Any, details: dict[str, Any] | None) -> None:
        response, item = self.response, self.kept.item
        await self._call_ends("incomplete")
        if self._begun:
            item.status = "completed" if status == "completed" else "incomplete"
            item.content = [Content(type="output_text" if self._voice is None else "output_audio")]
            self.kept.set_text(self._text)
            if self._voice is None:
                await self._event("response.output_text.done", text=self._text)
            else:
                await self._event("response.output_audio.done")
                kind = "response.output_audio_transcript.done"
                await self._event(kind, transcript=self._text)
            await self._event("response.content_part.done", part=self._part(self._text))
            await self._item_ends(item)
        response.output, response.status = self._output, status
        response.status_details = {"type": status, **(details or {})}
        if self.thinking is not None and (used := self.thinking.usage) is not None:
            given, made = used.prompt_tokens, used.completion_tokens
            total = {"input_tokens": given, "output_tokens": made, "total_tokens": given + made}
            response.usage = {
                **total,
                "input_token_details": {"cached_tokens": used.cached_tokens},
            }
        await self._say("response.done", response=response)

    def _part(self, text: str) -> Content:
        if self._voice is None:
            return Content(type="text", text=text)
        return Content(type="audio", transcript=text)

    async def _event(self, kind: str, **fields: Any) -> None:
        await self._say(kind, **self._place, content_index=0, **fields)
