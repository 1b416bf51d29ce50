"""Talk: a browser with a fake microphone and a fake camera, from speech to sound."""

import base64
import json
import wave
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import pytest

pytest.importorskip("playwright.sync_api")
pytest.importorskip("hibari", reason="pip install 'mico-chat[speech]'")
pytest.importorskip("faster_whisper", reason="pip install 'mico-chat[reads]'")

from PIL import Image
from playwright.sync_api import WebSocket, expect

from mico_chat.media.kinds import KINDS
from mico_chat.reading.speech import Listener, Listening, folder
from mico_chat.speech import Voices
from mico_chat.speech.hearing import Resampler
from mico_chat.speech.sound import from_raw, pcm16
from tests.support.fakes import FakeListener
from tests.support.waiting import until
from tests.ui.chat_page import PHONE, ChatPage
from tests.ui.conftest import OpenPage
from tests.ui.live import Command, FakeServer
from tests.ui.test_page_in_browser import TOO_SMALL, barriers

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ASKED = "Where does the old river go?"


def speech(text: str = ASKED, quiet_s: float = 1.0) -> bytes:
    """A sentence between two silences, as a file."""
    quiet = np.zeros(int(24_000 * quiet_s), np.float32)
    file = BytesIO()
    with wave.open(file, "wb") as written:
        written.setparams((1, 2, 24_000, 0, "NONE", ""))
        written.writeframes(pcm16(np.concatenate([quiet, *Voices().get().say(text), quiet])))
    return file.getvalue()


@pytest.fixture(scope="module")
def microphone(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("spoken") / "asked.wav"
    path.write_bytes(speech())
    return [f"--use-file-for-fake-audio-capture={path}%noloop"]


@pytest.fixture(scope="module")
def fake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    """``fake`` hears the same in all that is said, ``whisper`` what is said."""
    listeners: dict[str, Any] = {"fake": partial(FakeListener, ASKED), "whisper": Listener}
    models = dict.fromkeys(("fake", "whisper")[: 1 + folder().is_dir()], KINDS)
    server = FakeServer(tmp_path_factory.mktemp("talking"), models, listeners)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def site(fake_server: FakeServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    command = Command(tmp_path_factory.mktemp("page"), "/robots.txt", "--api", fake_server.url)
    yield command
    command.stop()


class Talk:
    """The dialog of a page, and what went over its WebSocket."""

    def __init__(self, chat: ChatPage, model: str = "fake") -> None:
        self.chat, self.page = chat, chat.page
        self.dialog = chat.page.locator("dialog.talk")
        self.told: list[Any] = []
        self.sent: list[Any] = []
        chat.page.on("websocket", self._follow)
        chat.page.evaluate("name => mico.chooseModel(name)", model)
        chat.page.get_by_role("button", name="Talk", exact=True).click()

    def _follow(self, socket: WebSocket) -> None:
        socket.on("framereceived", lambda text: self.told.append(json.loads(text)))
        socket.on("framesent", lambda text: self.sent.append(json.loads(text)))

    def until(self, kind: str, of: list[Any]) -> list[Any]:
        """The events of a kind, once there is one."""

        def found() -> list[Any]:
            self.page.evaluate("0")  # Playwright hears of events while it works
            return [one for one in of if one["type"] == kind]

        return until(found)

    def press(self, button: str) -> None:
        self.dialog.get_by_role("button", name=button).click()

    def state(self, words: str) -> None:
        expect(self.dialog.locator(".state")).to_have_text(words)

    @property
    def sound(self) -> Any:
        """What has come to be heard, at 24,000 Hz."""
        kind = "response.output_audio.delta"
        raw = b"".join(base64.b64decode(one["delta"]) for one in self.told if one["type"] == kind)
        return from_raw(raw, "audio/pcm")


def test_from_speech_to_sound(chat: ChatPage) -> None:
    """Whisper hears the question, and then the answer that comes to the page."""
    if not folder().is_dir():
        pytest.skip("Whisper is not there: mico-chat setup")
    talk = Talk(chat, "whisper")
    expect(talk.dialog.locator(".captions .you")).to_have_text(ASKED)
    expect(talk.dialog.locator(".captions .it")).to_have_text(f"[] {ASKED}")
    talk.until("response.done", talk.told)
    samples = Resampler(24_000, 16_000)(talk.sound, last=True)
    heard = "".join(one.text for one in Listener().segments(samples, Listening("en"))[0])
    assert heard.strip() == ASKED
    talk.state("Listening")
    chat.page.keyboard.press("Escape")  # there is nothing to interrupt
    expect(talk.dialog).to_be_hidden()
    assert chat.text(1) == f"[] {ASKED}"  # a chat like any other
    expect(chat.turns.nth(0).locator(".said")).to_have_text(ASKED)
    expect(chat.turns.nth(0).locator("figure[data-kind=audio]")).to_be_visible()
    expect(chat.conversations).to_have_count(1)


MICROPHONE = """() => {
    const device = new AudioContext();
    const ear = device.createMediaStreamDestination();
    const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
    navigator.mediaDevices.getUserMedia = async (wanted) => {
        window.wanted = wanted;
        return wanted.audio ? ear.stream.clone() : ask(wanted);
    };
    window.speak = async (sound) => {
        const bytes = Uint8Array.from(atob(sound), (one) => one.charCodeAt(0));
        const buffer = await device.decodeAudioData(bytes.buffer);
        const said = new AudioBufferSourceNode(device, { buffer });
        said.connect(ear);
        said.start();
    };
}"""


@pytest.fixture
def spoken() -> str:
    return base64.b64encode(speech()).decode()


@pytest.mark.parametrize(
    ("scheme", "size"), [("light", {}), ("dark", PHONE)], ids=["desk", "phone"]
)
def test_it_sees_is_interrupted_and_muted(
    open_page: OpenPage, server: FakeServer, spoken: str, scheme: str, size: dict[str, Any]
) -> None:
    chat = open_page(color_scheme=scheme, **size)
    page = chat.page
    page.evaluate(MICROPHONE)
    if size is PHONE:
        chat.press("Conversations")
    chat.press("Settings")
    page.get_by_label("What is said and seen in Talk").select_option("false" if size else "true")
    chat.press("Done")
    if size is PHONE:
        chat.press("Close the list")
    talk = Talk(chat)
    talk.state("Listening")
    assert page.evaluate("wanted.audio.echoCancellation") is True
    captions, interrupt = talk.dialog.locator(".captions p"), talk.dialog.get_by_text("Interrupt")

    # A frame goes with each turn, before the answer is asked for.
    talk.press("Use the camera")
    talk.until("session.update", talk.sent)
    page.wait_for_function("document.querySelector('dialog.talk video').videoWidth > 0")
    page.evaluate("sound => speak(sound)", spoken)
    expect(captions.first).to_have_text(ASKED)
    talk.until("response.done", talk.told)
    kinds = [one["type"] for one in talk.sent if one["type"] != "input_audio_buffer.append"]
    assert kinds == ["session.update", "conversation.item.create", "response.create"]
    (item,) = talk.until("conversation.item.create", talk.sent)
    head, _, data = item["item"]["content"][0]["image_url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert max(Image.open(BytesIO(base64.b64decode(data))).size) == 640

    # Esc ends what is spoken, and the server learns how much of it was heard.
    expect(interrupt).to_be_enabled()
    assert barriers(chat) == []
    if size is PHONE:
        assert page.evaluate(TOO_SMALL) == []
    page.keyboard.press("Escape")
    expect(interrupt).to_be_disabled()
    talk.until("conversation.item.truncated", talk.told)
    (cut,) = talk.until("conversation.item.truncate", talk.sent)
    assert 0 <= cut["audio_end_ms"] < 1000 * len(talk.sound) / 24_000
    expect(talk.dialog).to_be_visible()

    # So does speech, while an answer to what is looked at is still made.
    server.allow(1)
    talk.press("Look at this")
    talk.state("Thinking")
    expect(captions.filter(has_text="Look at this.")).to_be_visible()
    n_done = len(talk.until("response.done", talk.told))
    page.evaluate("sound => speak(sound)", spoken)
    until(lambda: len(talk.until("response.done", talk.told)) > n_done)
    reason = talk.until("response.done", talk.told)[-1]["response"]["status_details"]
    assert reason == {"type": "cancelled", "reason": "turn_detected"}
    server.allow()

    talk.press("Mute the microphone")
    muted = talk.dialog.get_by_label("Mute the microphone")
    expect(muted).to_have_attribute("aria-pressed", "true")
    talk.press("End")
    expect(talk.dialog).to_be_hidden()
    expect(chat.turns.nth(0).locator(".said")).to_have_text(ASKED)
    expect(chat.turns.nth(0).locator("figure.card")).to_have_count(0 if size else 2)


def test_a_page_that_cannot_listen_says_so(chat: ChatPage, server: FakeServer) -> None:
    chat.page.evaluate("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    chat.press("Talk")
    dialog = chat.page.locator("dialog.talk")
    reason = "a browser only allows it on https and on this machine's own address"
    expect(dialog.locator(".problem")).to_contain_text(f"No microphone: {reason}")
    dialog.get_by_role("button", name="End").click()
    expect(dialog).to_be_hidden()


def test_a_session_that_ends_says_why(chat: ChatPage, server: FakeServer) -> None:
    talk = Talk(chat)
    talk.state("Listening")
    server.kill()
    expect(talk.dialog.locator(".problem")).to_contain_text("broke off")
    talk.state("Ended")
    talk.press("End")
    expect(talk.dialog).to_be_hidden()
    server.start()
