"""A session in real time: what a client says, what it hears and is answered, and how it ends.

Small parts that tasks join: an :class:`~mico_chat.speech.hearing.Ear` finds turns, the listener
writes them down, :class:`~mico_server.realtime.answering.Answering` thinks and speaks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from fastapi import WebSocket, WebSocketDisconnect
from numpy.typing import NDArray
from pydantic import ValidationError

from mico_chat.errors import MicoError, RequestError
from mico_chat.media import MediaFile
from mico_chat.messages import Message, base64_data
from mico_chat.options import request_error
from mico_chat.speech import Voice
from mico_chat.speech import events as said
from mico_chat.speech.events import CLIENT_EVENT, Content, Item, ServerEvent, Session, new_id
from mico_chat.speech.hearing import LONGEST_S, RATE, Ear, Resampler, Turn
from mico_chat.speech.sound import RATES, from_raw
from mico_chat.tools import read_tool_use
from mico_server.dialects.chat import ChatTurn
from mico_server.fetch.media_reader import MediaReader
from mico_server.http.auth import Caller
from mico_server.http.errors import error_body, mico_error_body
from mico_server.http.json_body import read_json
from mico_server.realtime.answering import Answering
from mico_server.realtime.conversation import Conversation, Kept, read_item
from mico_server.realtime.stored import StoredChat
from mico_server.realtime.thinking import Ahead, Thinking
from mico_server.realtime.writing import Written, listener_of, recording, written
from mico_server.routes.speech import voice_of
from mico_server.service import Client

logger = logging.getLogger(__name__)

WATCH_S, CLOSE_S = 1.0, 5.0
LEAST_S = 0.1  # of sound that may be committed


@dataclass
class Over(Exception):
    """The session ends: for the client an error event with ``why``, then a close with ``code``."""

    code: int
    why: str
    message: str


class RealtimeSession:
    """A client at the other end of ``socket``; ``valid`` says whether its key still is.

    With a ``chat`` its turns are stored there.
    """

    def __init__(
        self,
        socket: WebSocket,
        client: Client,
        reader: Callable[[], Awaitable[MediaReader]],
        config: Session,
        caller: Caller,
        valid: Callable[[], Awaitable[bool]],
        chat: StoredChat | None = None,
    ) -> None:
        self._caller, self._chat = caller, chat
        self._socket, self._client, self._reader, self._valid = socket, client, reader, valid
        self._settings = client.service.settings
        self.config = config
        self._conversation = Conversation(self._settings.max_media)
        for kept in () if chat is None else chat.history:
            self._conversation.add(kept)
        self._ear = Ear(config.audio.input.turn_detection)
        self._resampler = self._new_resampler()
        self._item_id = new_id("item")
        self._language: str | None = None
        self._early: asyncio.Task[Written] | None = None  # hears what was said before a pause
        self._ahead = Ahead()
        self._answering: Answering | None = None
        self._answer: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sending = asyncio.Lock()
        self._last_said = asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Serve the client until it leaves or the session is over; nothing runs on after that."""
        for work in (self._listen(), self._watch(), self._warm()):
            self._spawn(work)
        try:
            await self._failed
        except WebSocketDisconnect:
            logger.info("a session ends: the client left")
        except Over as over:
            await self._close(over)
        except Exception:
            logger.exception("a session failed")
            await self._close(Over(1011, "internal", "internal error; the server's log has more"))
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._ahead.drop()
            if self._chat is not None:
                await self._keep(self._chat.leave)

    async def _close(self, over: Over) -> None:
        logger.info("a session ends: %s", over.message)
        try:
            async with asyncio.timeout(CLOSE_S):
                kind = error_body(400, over.message, over.why)["error"]
                await self._say("error", error=kind)
                await self._socket.close(over.code, over.message[:120])
        except (TimeoutError, Over, WebSocketDisconnect):
            logger.info("the client does not hear why")

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        def ended(task: asyncio.Task[Any]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) and not self._failed.done():
                self._failed.set_exception(error)

        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(ended)
        return task

    async def _say(self, kind: str, **fields: Any) -> None:
        wait_s = self._settings.body_timeout_s
        text = ServerEvent(type=kind, **fields).json_text()
        try:
            async with asyncio.timeout(wait_s), self._sending:
                await self._socket.send_text(text)
        except TimeoutError as error:
            raise Over(1008, "not_reading", f"the client read nothing for {wait_s:g} s") from error
        except RuntimeError as error:  # Starlette's, once the client has left
            raise WebSocketDisconnect(1006) from error

    async def _warm(self) -> None:
        """Load what the first turn would wait for; what is missing is told when it is needed."""
        with suppress(MicoError):
            if self.config.output_modalities == ["audio"]:
                await self._voice(self.config)
            loaded = self._client.service.models.named(self.config.model).loaded
            if loaded is not None and self.config.audio.input.turn_detection is not None:
                await asyncio.to_thread(lambda: listener_of(loaded).languages)

    async def _watch(self) -> None:
        """End the session for its length, silence of the client, a withdrawn key, the service."""
        now, settings = asyncio.get_running_loop().time, self._settings
        begun = now()
        while True:
            try:
                await asyncio.wait_for(self._client.service.ending.wait(), WATCH_S)
            except TimeoutError:
                pass
            else:
                raise Over(1001, "service_ending", "the service ends; connect again soon")
            if now() - begun > settings.realtime_session_s:
                setting = "MICO_SERVER_REALTIME_SESSION_S"
                why = f"the session is {settings.realtime_session_s:g} s old ({setting})"
                raise Over(1000, "session_expired", why)
            idle = now() - self._last_said > settings.realtime_idle_s
            if idle and (self._answer is None or self._answer.done()):
                setting = "MICO_SERVER_REALTIME_IDLE_S"
                why = f"no event came for {settings.realtime_idle_s:g} s ({setting})"
                raise Over(1000, "session_idle", why)
            if not await self._valid():
                raise Over(1008, "invalid_api_key", "the key of this session was withdrawn")

    # --- What the client says ---

    async def _listen(self) -> None:
        await self._say("session.created", session=self.config)
        if self._chat is not None:
            named = {"id": self._chat.id, "object": "realtime.conversation"}
            await self._say("conversation.created", conversation=named)
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            self._last_said = asyncio.get_running_loop().time()
            id_, body = None, None
            try:
                if (text := message.get("text")) is None:
                    raise RequestError("an event is JSON in a text message, but bytes came")
                given = read_json(text)
                if isinstance(given, dict) and isinstance(given.get("event_id"), str):
                    id_ = given["event_id"][:512]
                await self._do(CLIENT_EVENT.validate_python(given))
            except ValidationError as error:
                first = error.errors()[0]
                outer = len(first["loc"]) and first["loc"][0] == given.get("type")
                body = mico_error_body(request_error(first, outer=int(outer)))
            except MicoError as error:
                body = mico_error_body(error)
            if body is not None:
                await self._say("error", error={**body["error"], "event_id": id_})

    async def _do(self, event: said.ClientEvent) -> None:
        if not isinstance(event, said.AudioAppend):
            await self._ahead.drop()  # it may make the question another one
        match event:
            case said.SessionUpdate():
                await self._update(event.session)
            case said.AudioAppend():
                await self._append(event.audio)
            case said.AudioEnd(type="input_audio_buffer.clear"):
                self._ear.clear()
                await self._say("input_audio_buffer.cleared")
            case said.AudioEnd():
                if self._ear.seconds < LEAST_S:
                    reason = f"{1000 * self._ear.seconds:.0f} ms of sound; at least 100 are needed"
                    raise RequestError.at("input_audio_buffer", reason)
                self._check_hearing()
                await self._commit(self._ear.take())
            case said.ItemCreate():
                await self._create(event.item, event.previous_item_id)
            case said.ItemNamed(type="conversation.item.delete"):
                self._conversation.remove(event.item_id)
                await self._say("conversation.item.deleted", item_id=event.item_id)
            case said.ItemNamed():
                item = self._conversation.named(event.item_id).item
                await self._say("conversation.item.retrieved", item=item)
            case said.ItemTruncate():
                kept = self._conversation.named(event.item_id)
                if self._busy and self._answering is not None and self._answering.kept is kept:
                    await self._interrupt("client_cancelled")  # nobody hears the rest
                    self._answering.truncated = True
                kept.truncate(event.audio_end_ms)
                if kept.cut is not None:
                    await kept.cut(kept.read.text)
                told = event.model_dump(exclude={"type", "event_id"})
                await self._say("conversation.item.truncated", **told)
            case said.ResponseCreate():
                await self._respond(event.response)
            case said.ResponseCancel():
                under_way = self._answering
                if under_way is None or not (self._busy or under_way.truncated):
                    raise RequestError("response.cancel: no response is under way")
                if event.response_id not in (None, under_way.response.id):
                    raise RequestError.at("response_id", "no such response is under way")
                under_way.truncated = False
                await self._interrupt("client_cancelled")

    async def _update(self, given: dict[str, Any]) -> None:
        before, config = self.config, configured(self.config, given)
        speaking, spoke = config.audio.output, before.audio.output
        if (speaking.voice, speaking.speed) != (spoke.voice, spoke.speed):
            await self._voice(config)
        self.config = config
        if config.audio.input.format != before.audio.input.format:
            self._resampler = self._new_resampler()
        if config.audio.input.turn_detection != before.audio.input.turn_detection:
            self._ear = Ear(config.audio.input.turn_detection, self._ear.detector)
        await self._say("session.updated", session=config)

    async def _voice(self, config: Session) -> Voice:
        voices, name = self._client.service.voices, config.audio.output.voice
        async with AsyncExitStack() as stack:
            await self._client.use(stack, config.model)
        return await asyncio.to_thread(voice_of, voices, name)

    def _new_resampler(self) -> Resampler:
        return Resampler(RATES[self.config.audio.input.format.type], RATE)

    def _samples(self, audio: str, where: str) -> NDArray[np.float32]:
        form, data = self.config.audio.input.format.type, base64_data(audio, where)
        if form == "audio/pcm" and len(data) % 2:
            raise RequestError.at(where, f"{len(data)} bytes; PCM of 16 bits has an even number")
        return from_raw(data, form)

    async def _append(self, audio: str) -> None:
        if self._ear.detection is not None:
            self._check_hearing()
        samples = self._samples(audio, "audio")
        if self._ear.seconds + len(samples) / RATES["audio/pcm"] > 2 * LONGEST_S:
            reason = f"more than {2 * LONGEST_S:g} s of sound: commit or clear what is there"
            raise RequestError.at("input_audio_buffer", reason)
        ear, resampler = self._ear, self._resampler
        for turn in await asyncio.to_thread(lambda: list(ear.hear(resampler(samples)))):
            await self._turn(turn)

    async def _turn(self, turn: Turn) -> None:
        detection = self._ear.detection
        assert detection is not None
        if turn.what in ("paused", "resumed", "started"):
            await self._ahead.drop()
            if self._early is not None:
                self._early.cancel()
                self._early = None
        if turn.what == "paused" and turn.sound is not None:  # likely the end: it is heard by then
            self._early = self._spawn(self._written(turn.sound))
            if detection.create_response and not self._busy:
                about = (self._conversation, self.config, self._caller)
                self._ahead.task = self._spawn(self._ahead.think(self._client, self._early, *about))
        if turn.what in ("paused", "resumed"):
            return
        if turn.sound is None:
            self._item_id = new_id("item")
            at = {"audio_start_ms": turn.at_ms, "item_id": self._item_id}
            await self._say("input_audio_buffer.speech_started", **at)
            if detection.interrupt_response:
                await self._interrupt("turn_detected")
            return
        at = {"audio_end_ms": turn.at_ms, "item_id": self._item_id}
        await self._say("input_audio_buffer.speech_stopped", **at)
        early, self._early = self._early, None
        if early is not None and not turn.listened:
            early.cancel()
            early = None
        if early is None or self._ahead.thinking is None:  # the response itself begins no later
            await self._ahead.drop()
        kept = await self._commit(turn.sound, early)
        if detection.create_response and kept.heard is not None:
            self._spawn(self._respond_to(kept, kept.heard))

    async def _respond_to(self, kept: Kept, heard: asyncio.Task[str]) -> None:
        answered = bool(await asyncio.shield(heard))
        if answered and not self._ear.speaking and not self._busy:
            try:
                await self._respond(said.ResponseOptions())
                return
            except MicoError as error:
                await self._say("error", error=mico_error_body(error)["error"])
        await self._ahead.drop()

    async def _commit(
        self, sound: NDArray[np.float32], early: asyncio.Task[Written] | None = None
    ) -> Kept:
        item = Item(id=self._item_id, role="user", content=[Content(type="input_audio")])
        self._item_id = new_id("item")
        kept = Kept(item, Message("user", ()))
        await self._say("input_audio_buffer.committed", item_id=item.id)
        await self._add(kept)
        kept.heard = self._spawn(self._hear(kept, sound, 0, early))
        return kept

    async def _create(self, item: Item, after: str | None) -> None:
        sounds = [
            (number, self._samples(part.audio, f"item.content[{number}].audio"))
            for number, part in enumerate(item.content)
            if part.type == "input_audio" and part.audio
        ]
        kept = await read_item(item, await self._reader(), self._conversation.calls)
        await self._add(kept, after)
        if sounds:
            form = self.config.audio.input.format.type
            resampled = Resampler(RATES[form], RATE)(
                np.concatenate([one for _, one in sounds]), last=True
            )
            kept.heard = self._spawn(self._hear(kept, resampled, sounds[0][0]))

    async def _add(self, kept: Kept, after: str | None = None) -> None:
        previous, forgotten = self._conversation.add(kept, after)
        place = {"item": kept.item, "previous_item_id": previous}
        await self._say("conversation.item.added", **place)
        if kept.item.role in ("user", "system") or kept.item.status == "completed":
            await self._say("conversation.item.done", **place)
        await self._tell_forgotten(forgotten)

    async def _tell_forgotten(self, ids: Sequence[str]) -> None:
        for id_ in ids:
            await self._say("conversation.item.deleted", item_id=id_)

    # --- Hearing, thinking, speaking ---

    def _check_hearing(self) -> None:
        """Refuse sounds that nobody can write down, as far as that is known before."""
        loaded = self._client.service.models.named(self.config.model).loaded
        if loaded is not None:
            listener_of(loaded)

    async def _hear(
        self,
        kept: Kept,
        sound: NDArray[np.float32],
        place: int,
        early: asyncio.Task[Written] | None = None,
    ) -> str:
        """Write a recording down; "" if nothing is said in it, which then is shown as a sound."""
        file, held = recording(sound), None
        if self._chat is not None and self._chat.media:
            kept.sounds = (replace(file, heard=True),)
            held = self._spawn(self._keep(self._chat.hold))
        name = "conversation.item.input_audio_transcription"
        told = {"item_id": kept.item.id, "content_index": place}
        found = await (self._written(sound) if early is None else early)
        if held is not None:
            await held
        if isinstance(found, MicoError):
            await self._say(f"{name}.failed", error=mico_error_body(found)["error"], **told)
            return ""
        text, self._language, shown = found
        if shown and not text:
            kept.read, kept.sounds = _with_sound(kept.read, file), ()
        kept.item.content[place].transcript = text
        if self.config.audio.input.transcription is not None:
            usage = {"type": "duration", "seconds": round(len(sound) / RATE, 2)}
            await self._say(f"{name}.completed", transcript=text, usage=usage, **told)
        return text

    async def _keep(self, store: Callable[[Sequence[Kept], str], Awaitable[None]]) -> None:
        """Store what was asked and is not answered, unless an earlier question still is."""
        if self._busy:
            return
        try:
            await store(self._conversation.asked(), str(self.config.model))
        except MicoError as error:
            logger.warning("a question is not kept before its answer: %s", error)

    async def _written(self, sound: NDArray[np.float32]) -> Written:
        return await written(self._client, self.config, recording(sound), self._language)

    @property
    def _busy(self) -> bool:
        return self._answer is not None and not self._answer.done()

    async def _respond(self, options: said.ResponseOptions) -> None:
        if self._busy:
            raise RequestError("response.create: a response is under way; cancel it, or wait")
        await self._client.service.counted(self._caller)
        limits = await self._client.service.left(self._caller)
        names = said.ResponseOptions.model_fields.keys() & Session.model_fields.keys()
        given = options.model_dump(include=names, exclude_none=True)
        config = configured(self.config, given)
        conversation = self._conversation
        if options.input is not None:
            items: list[Kept] = []
            for one in options.input:
                calls = Conversation(0, items).calls
                items.append(await self._input(one, calls))
            conversation = Conversation(self._settings.max_media, items)
        voice = await self._voice(config) if config.output_modalities == ["audio"] else None
        response = said.Response(
            output_modalities=config.output_modalities, metadata=options.metadata
        )
        chat = self._chat if options.conversation == "auto" else None
        if chat is not None:
            response.conversation_id = chat.id

        def turn() -> AbstractAsyncContextManager[ChatTurn | None]:
            if chat is None:
                return nullcontext()
            return chat.turn(conversation.asked(), str(config.model))

        answering = Answering(self._client, config, response, voice, self._say, turn)

        async def begin(kept: Kept) -> None:
            if options.conversation == "auto":
                await self._add(kept)

        async def think() -> Thinking:
            if limits:
                await self._say("rate_limits.updated", rate_limits=limits)
            read = await conversation.messages(config.instructions)
            if (early := self._ahead.taken(config, read)) is not None:
                return early
            await self._ahead.drop()
            return Thinking(self._client, config, read)

        work = answering.run(think, begin, lambda: self._language)
        self._answering, self._answer = answering, self._spawn(work)
        if conversation is self._conversation:
            self._spawn(self._get_ready(answering, self._answer))

    async def _get_ready(self, answering: Answering, answer: asyncio.Task[None]) -> None:
        """What the next turn has no room for goes while the client listens, and the model computes
        what then is left: nobody waits for it."""
        await asyncio.wait((answer,))
        if (thinking := answering.thinking) is None or answering.response.status != "completed":
            return
        try:
            next_, forgotten = await self._conversation.next()
            await self._tell_forgotten(forgotten)
            read = await self._conversation.messages(answering.session.instructions, next_)
            await thinking.get_ready(read)
        except MicoError as error:
            logger.info("the next answer is not made ready for: %s", error)

    async def _input(self, given: dict[str, Any], calls: dict[str, str]) -> Kept:
        if given.get("type") == "item_reference":
            return self._conversation.named(str(given.get("id")), "response.input")
        try:
            return await read_item(Item.model_validate(given), await self._reader(), calls)
        except ValidationError as error:
            raise request_error(error.errors()[0]) from error

    async def _interrupt(self, reason: str) -> None:
        """End the response that is under way; it says so itself."""
        if self._answering is not None and self._answer is not None and not self._answer.done():
            self._answering.reason = reason
            self._answer.cancel()
            await asyncio.wait((self._answer,))


def _with_sound(read: Message, file: MediaFile) -> Message:
    return replace(read, content=(*read.content, file))


def configured(session: Session, given: dict[str, Any]) -> Session:
    try:
        new = session.updated(given)
        read_tool_use(new.tools, new.tool_choice, flat=True)
        return new
    except (ValidationError, RequestError) as error:
        found = request_error(error.errors()[0]) if isinstance(error, ValidationError) else error
        raise RequestError(f"session.{found}", f"session.{found.param}") from error
