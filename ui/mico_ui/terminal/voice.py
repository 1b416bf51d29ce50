"""``mico-chat talk``: a microphone and a loudspeaker, and /v1/realtime between them."""

import asyncio
import base64
import json
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from mico_chat.errors import ConfigError
from mico_ui.client import ApiError, AsyncClient
from mico_ui.terminal.screen import Screen, printable

try:
    import sounddevice
except OSError as error:  # the package is there, but not the library that it loads
    raise ConfigError(f"{error}: install PortAudio (Debian's package libportaudio2)") from error

RATE = 24_000  # samples a second, of 16 bits
INTERRUPTED = "interrupted"  # the name of events that may come when there is nothing left to stop
BLOCK = 960  # samples at a time: 40 ms
SOUND = {"samplerate": RATE, "channels": 1, "dtype": "int16"}


def check_devices() -> None:
    """Refuse a machine that lacks a microphone or a loudspeaker."""
    for name, check in (
        ("microphone", sounddevice.check_input_settings),
        ("loudspeaker", sounddevice.check_output_settings),
    ):
        try:
            check(**SOUND)
        except (sounddevice.PortAudioError, ValueError) as error:
            raise ApiError(f"no {name} for sound of {RATE} Hz: {error}") from error


class Loudspeaker:
    """The sound of an item that waits; the device's thread takes it from here."""

    def __init__(self) -> None:
        self.item, self._heard = "", 0  # in bytes
        self._waiting, self._lock = bytearray(), threading.Lock()

    @property
    def speaking(self) -> bool:
        return bool(self._waiting)

    def add(self, item: str, sound: bytes) -> None:
        with self._lock:
            if item != self.item:
                self.item, self._heard = item, 0
            self._waiting += sound

    def fill(self, out: Any, *_: object) -> None:
        """Write what comes next, or silence."""
        with self._lock:
            sound = bytes(self._waiting[: len(out)])
            del self._waiting[: len(out)]
            self._heard += len(sound)
            out[:] = sound.ljust(len(out), b"\0")

    def hush(self) -> int | None:
        """Play no more; how many ms of the item were heard if it is cut off."""
        with self._lock:
            cut = self.speaking
            self._waiting.clear()
            return 1000 * self._heard // (2 * RATE) if cut else None


class Conversation:
    """A person at a terminal, and the server at the other end of ``socket``.

    Without ``headphones`` the microphone would hear the loudspeaker, so it rests meanwhile.
    """

    def __init__(self, socket: ClientConnection, screen: Screen, headphones: bool) -> None:
        self._socket, self._screen, self._headphones = socket, screen, headphones
        self._loudspeaker = Loudspeaker()
        self._response: str | None = None  # under way, or dropped: its events are on their way
        self._dropped: str | None = None

    async def run(self) -> None:
        """Talk until the server ends it, or a Ctrl-C."""
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[bytes | None]()

        def hear(data: Any, *_: object) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, bytes(data))

        def keys() -> None:
            for _ in sys.stdin:
                loop.call_soon_threadsafe(heard.put_nowait, None)

        how = {**SOUND, "blocksize": BLOCK}
        threading.Thread(target=keys, daemon=True).start()
        with (
            sounddevice.RawInputStream(**how, callback=hear),
            sounddevice.RawOutputStream(**how, callback=self._loudspeaker.fill),
        ):
            hearing = asyncio.create_task(self._hear(heard))
            try:
                async for text in self._socket:
                    await self._take(json.loads(text))
            finally:
                hearing.cancel()

    async def _say(self, kind: str, **fields: Any) -> None:
        await self._socket.send(json.dumps({"type": kind, **fields}))

    async def _hear(self, heard: asyncio.Queue[bytes | None]) -> None:
        """Send what the microphone hears; None is a key."""
        with suppress(ConnectionClosed):  # whoever follows the events finds out, too
            while True:
                if (sound := await heard.get()) is None:
                    if self._response is not None:
                        await self._say("response.cancel", event_id=INTERRUPTED)
                    await self._hush()
                    continue
                if self._loudspeaker.speaking and not self._headphones:
                    sound = bytes(len(sound))
                audio = base64.b64encode(sound).decode()
                await self._say("input_audio_buffer.append", audio=audio)

    async def _hush(self) -> None:
        self._dropped, self._response = self._response or self._dropped, None
        if (heard := self._loudspeaker.hush()) is not None:
            cut = {"item_id": self._loudspeaker.item, "content_index": 0, "audio_end_ms": heard}
            await self._say("conversation.item.truncate", event_id=INTERRUPTED, **cut)

    async def _take(self, event: dict[str, Any]) -> None:
        if event.get("response_id", "") == self._dropped:
            return
        match event["type"]:
            case "session.created":
                audio: Any = {"input": {"transcription": {}}}
                await self._say("session.update", session={"type": "realtime", "audio": audio})
            case "input_audio_buffer.speech_started":
                await self._hush()
            case "conversation.item.input_audio_transcription.completed" if event["transcript"]:
                self._screen.note(f"> {event['transcript']}")
            case "response.created":
                self._response = event["response"]["id"]
            case "response.output_audio_transcript.delta":
                print(printable(event["delta"]), end="", flush=True)
            case "response.output_audio.delta":
                self._loudspeaker.add(event["item_id"], base64.b64decode(event["delta"]))
            case "response.done":
                self._response = None
                print(flush=True)
            case "error" if event["error"].get("event_id") != INTERRUPTED:
                self._screen.error(event["error"]["message"])


def talk(
    client: Callable[[], AsyncClient], screen: Screen, headphones: bool, **where: str | None
) -> None:
    """Talk until Ctrl-C; ``where`` has the ``model`` and the ``conversation``."""

    async def run() -> None:
        async with client() as made, made.live("/v1/realtime", **where) as socket:
            how = "speak" if headphones else "press Enter"
            screen.note(f"listening; {how} to interrupt, Ctrl-C ends")
            await Conversation(socket, screen, headphones).run()

    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        screen.note("ended")
