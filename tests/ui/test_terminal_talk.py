"""A conversation of the terminal's with a real server, when all goes well and when it does not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mico_chat.wire import ChatEvent, ChatResponse, DeltaEvent
from mico_ui.client import ApiError, Client
from mico_ui.routes import Upload
from mico_ui.terminal.talk import Talk
from tests.fakes import FakeAssistant
from tests.ui.conftest import served, stored_media


@pytest.fixture
def talk(client: Client) -> Talk:
    return Talk(client)


def whole(events: Iterator[ChatEvent]) -> ChatResponse:
    *_, last = events
    assert isinstance(last, ChatResponse)
    return last


@pytest.fixture
def stop(talk: Talk, halfway: threading.Event, assistant: FakeAssistant) -> Callable[[str], None]:
    """Ask, and leave after the first word."""

    def stop_answer(text: str) -> None:
        halfway.clear()
        assistant.cancelled.clear()
        with closing(talk.ask(text)) as events:
            while not isinstance(next(events), DeltaEvent):
                pass
        assert assistant.cancelled.wait(timeout=30)
        halfway.set()

    return stop_answer


def said(talk: Talk) -> list[tuple[str, str]]:
    """Question and end of each stored turn."""
    return [(turn.message, turn.finish_reason) for turn in talk.conversation().turns]


PICTURE = Upload("image", b"abc", "cat.png")


def test_media_go_with_the_next_question_alone(talk: Talk, client: Client) -> None:
    first, second = talk.attach(PICTURE), talk.attach(Upload("audio", b"x", "purr.wav"))
    assert whole(talk.ask("One")).answer == "[image cat.png, audio purr.wav] One"
    assert not talk.attached
    whole(talk.ask("Two"))
    shown = [[medium.name for medium in turn.media] for turn in talk.conversation().turns]
    assert shown == [["cat.png", "purr.wav"], []]
    # The server forgets a detached medium, unless a conversation shows it.
    third, fourth = talk.attach(PICTURE), talk.attach(PICTURE)
    with pytest.raises(ApiError, match="no medium 3; 2 attached"):
        talk.detach(3)
    assert talk.detach(2) == [fourth]
    assert talk.attached == [third]
    talk.detach()
    assert not talk.attached
    assert {medium.id for medium in stored_media(client)} == {first.id, second.id}


def test_settings_are_checked_at_once(talk: Talk, assistant: FakeAssistant) -> None:
    talk.set("temperature", "0.7")
    talk.set("stop", '["a", "b"]')
    with pytest.raises(ApiError, match="temperature"):
        talk.set("temperature", "hot")
    with pytest.raises(ApiError, match=r"no setting 'temprature'; did you mean temperature\?"):
        talk.set("temprature", "1")
    with pytest.raises(ApiError, match="json_schema"):
        talk.set("json_schema", "{nonsense")
    talk.set("depth_scale", "0.002")
    whole(talk.ask("Hi"))
    talk.set("stop", "")
    whole(talk.ask("Hi"))
    assert [options.temperature for options in assistant.options] == [0.7, 0.7]
    assert [options.stop for options in assistant.options] == [("a", "b"), ()]


def test_retry_of_a_refused_question_takes_nothing_back(
    talk: Talk, stop: Callable[[str], None]
) -> None:
    stop("Same")
    talk.set("temperature", "1")
    talk.attach(PICTURE)
    for again in (False, True):
        with pytest.raises(ApiError, match="refused"):
            whole(talk.retry() if again else talk.ask("refuse this"))
        assert said(talk) == [("Same", "cancelled")]
        assert [medium.name for medium in talk.attached] == ["cat.png"]
    assert whole(talk.ask("Better")).answer == "[image cat.png] Better"


def test_a_stopped_answer_is_part_of_the_conversation(
    talk: Talk, stop: Callable[[str], None]
) -> None:
    talk.attach(PICTURE)
    stop("One")  # it begins a conversation, whose id is never told
    assert not talk.attached
    whole(talk.ask("Two"))
    stop("Three")
    whole(talk.ask("Four"))
    ends = [("One", "cancelled"), ("Two", "stop"), ("Three", "cancelled"), ("Four", "stop")]
    assert said(talk) == ends


@pytest.mark.parametrize("first", [True, False])
def test_retry_of_a_stopped_answer(talk: Talk, stop: Callable[[str], None], first: bool) -> None:
    before = [] if first else [("Zero", "stop")]
    if not first:
        whole(talk.ask("Zero"))
    talk.attach(PICTURE)
    stop("One")
    assert talk.conversation().turns[-1].finish_reason == "cancelled"
    assert whole(talk.retry()).answer == "[image cat.png] One"
    assert said(talk) == [*before, ("One", "stop")]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts also in a script's background, where signals are ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_question_stopped_before_its_first_word(tmp_path: Path) -> None:
    gate = threading.Event()
    assistant = FakeAssistant(gate)
    with served(tmp_path, assistant) as client:
        talk = Talk(client)
        talk.attach(PICTURE)

        def press_ctrl_c() -> None:
            assert assistant.started.acquire(timeout=30)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        thread = threading.Thread(target=press_ctrl_c)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            whole(talk.ask("One"))
        thread.join()
        assert assistant.cancelled.wait(timeout=30)
        gate.set()
        assert [medium.name for medium in talk.attached] == ["cat.png"]
        assert whole(talk.retry()).answer == "[image cat.png] One"
        assert said(talk) == [("One", "stop")]
