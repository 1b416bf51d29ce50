"""``mico-chat talk``, with a stand-in for the package of the sound device."""

import asyncio
import base64
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("hibari", reason="pip install 'mico-chat[speech]'")
pytest.importorskip("faster_whisper", reason="pip install 'mico-chat[reads]'")

from mico_chat.speech import Voices
from mico_chat.speech.sound import pcm16
from mico_ui.client import AsyncClient, Client
from mico_ui.terminal.screen import Screen
from tests.support.fakes import FakeAssistant, FakeListener

ASKED = "Where does the old river go?"
QUIET = bytes(2 * 24_000)  # a second


@pytest.fixture
def assistant() -> FakeAssistant:
    return FakeAssistant(listener=FakeListener(ASKED))


class Stream:
    """A stream of the package: while it is open, a thread calls its callback."""

    def __init__(self, callback: Any, blocksize: int, samplerate: int, **how: Any) -> None:
        assert (samplerate, how) == (24_000, {"channels": 1, "dtype": "int16"})
        self.callback, self.blocksize = callback, blocksize
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        for _ in iter(partial(self._closed.wait, 0.002), True):  # faster than a device
            self.block()

    def block(self) -> None:
        raise NotImplementedError


@pytest.fixture
def voice(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, with a device that hears the question, then silence; ``heard`` was played."""
    spoken = io.BytesIO(pcm16(np.concatenate([*Voices().get().say(ASKED)])))
    heard = bytearray()

    class Input(Stream):
        def block(self) -> None:
            n = 2 * self.blocksize
            self.callback(memoryview(spoken.read(n).ljust(n, b"\0")), self.blocksize, None, None)

    class Output(Stream):
        def block(self) -> None:
            out = bytearray(2 * self.blocksize)
            self.callback(memoryview(out), self.blocksize, None, None)
            heard.extend(out)
            if heard.endswith(QUIET) and heard.strip(b"\0"):  # it has said all
                self._closed.set()
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    device: Any = types.ModuleType("sounddevice")
    device.RawInputStream, device.RawOutputStream = Input, Output
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    monkeypatch.delitem(sys.modules, "mico_ui.terminal.voice", raising=False)
    module: Any = importlib.import_module("mico_ui.terminal.voice")
    module.heard = heard
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield module
    signal.signal(signal.SIGINT, before)
    del sys.modules["mico_ui.terminal.voice"]


def test_a_question_is_heard_and_its_answer_spoken(
    voice: Any, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.StringIO()
    screen = Screen(Console(file=out, width=100))
    voice.talk(partial(AsyncClient, client.api, home=True), screen, False, model="fake")
    answer = np.concatenate([*Voices().get().say(f"[] {ASKED}")])
    assert pcm16(answer).strip(b"\0") in voice.heard
    assert capsys.readouterr().out.strip() == f"[] {ASKED}"
    (first, said, last) = out.getvalue().splitlines()
    assert first == "listening; press Enter to interrupt, Ctrl-C ends"
    assert (said, last) == (f"> {ASKED}", "ended")


class Line:
    """The end of a WebSocket that is written to."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    async def send(self, text: str) -> None:
        self.sent.append(json.loads(text))


@pytest.mark.parametrize("headphones", [False, True])
@pytest.mark.parametrize("by", ["a key", "speech"])
def test_an_answer_is_interrupted(voice: Any, headphones: bool, by: str) -> None:
    line: Any = Line()
    talk = voice.Conversation(line, Screen(Console(file=io.StringIO())), headphones)
    sound = bytes(range(1, 241)) * 200  # a second
    delta = {"type": "response.output_audio.delta", "item_id": "i", "response_id": "r"}
    delta["delta"] = base64.b64encode(sound).decode()

    async def run() -> None:
        await talk._take({"type": "response.created", "response": {"id": "r"}})
        await talk._take(delta)
        out = bytearray(12_000)
        talk._loudspeaker.fill(out, 6000)
        assert out == sound[:12_000]
        heard: Any = asyncio.Queue()
        heard.put_nowait(b"ab")
        if by == "a key":
            heard.put_nowait(None)
        else:
            await talk._take({"type": "input_audio_buffer.speech_started"})
        heard.put_nowait(b"ab")
        hearing = asyncio.create_task(talk._hear(heard))
        while not heard.empty() or len(line.sent) < 3 + (by == "a key"):
            await asyncio.sleep(0)
        hearing.cancel()
        await talk._take(delta)  # it was on its way
        talk._loudspeaker.fill(out, 6000)
        assert out == bytes(12_000)

    asyncio.run(run())
    sent = {one.pop("type"): one for one in line.sent}
    cut = {"event_id": "interrupted", "item_id": "i", "content_index": 0, "audio_end_ms": 250}
    assert sent["conversation.item.truncate"] == cut
    assert ("response.cancel" in sent) == (by == "a key")
    rests = by == "a key" and not headphones
    assert line.sent[0].get("audio", "YWI=") == ("AAA=" if rests else "YWI=")
    assert sent["input_audio_buffer.append"] == {"audio": "YWI="}


NO_DEVICE = """
class PortAudioError(Exception): pass
def check_input_settings(**how): raise PortAudioError("Error querying device -1")
check_output_settings = check_input_settings
"""


@pytest.mark.parametrize(
    ("package", "told"),
    [
        ("raise ModuleNotFoundError(name='sounddevice')", "needs the extra 'talk'"),
        ("raise OSError('PortAudio library not found')", "not found: install PortAudio"),
        (NO_DEVICE, "no microphone for sound of 24000 Hz: Error querying device -1"),
    ],
)
def test_what_is_missing_is_named_in_one_line(tmp_path: Path, package: str, told: str) -> None:
    (tmp_path / "sounddevice.py").write_text(package)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = subprocess.run(
        [sys.executable, "-m", "mico_chat.cli", "talk"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (2, "")
    (line,) = found.stderr.splitlines()
    assert told in line
