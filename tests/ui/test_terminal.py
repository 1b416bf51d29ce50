"""What a person types and what the screen shows for it, and a conversation with a real server."""

import io
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from rich.filesize import decimal

from mico_chat.checkpoints.marks import Marks
from mico_chat.media.kinds import KINDS
from mico_chat.wire import ChatEvent, ChatResponse, DeltaEvent, Progress
from mico_ui import routes
from mico_ui.client import ApiError, Client
from mico_ui.routes import Question, Upload
from mico_ui.terminal.chat import Chat
from mico_ui.terminal.prompt import ChatCompleter, kept_history, reader
from mico_ui.terminal.screen import Screen
from mico_ui.terminal.talk import Talk
from tests.server.service.test_models import Shelf
from tests.support.fakes import FakeAssistant, FakeListener
from tests.support.waiting import PATIENCE_S
from tests.ui.conftest import served, stored_media

ENTER, ALT_ENTER, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x03", "\x04"
UP = "\x1b[A"

Type = Callable[..., str]


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keyboard:
        yield keyboard


@pytest.fixture
def type_in(client: Client, keyboard: PipeInput) -> Type:
    """Type lines, each ended with Enter, then Ctrl-D; gives the text on the screen."""
    history = InMemoryHistory()

    def type_in(*lines: str, width: int = 100, colours: bool = False) -> str:
        out = io.StringIO()
        kind: Any = {"force_terminal": colours, "color_system": "truecolor" if colours else None}
        console = Console(file=out, width=width, highlight=False, **kind)
        (model,) = client.send(routes.models())
        read = reader(history, input=keyboard, output=DummyOutput())
        keyboard.send_text("".join(line + ENTER for line in lines) + CTRL_D)
        Chat(Talk(client), Screen(console), model, read).run()
        return out.getvalue()

    return type_in


def test_every_kind_has_its_command_and_files_are_dropped_into_questions(
    type_in: Type, client: Client, picture: Path
) -> None:
    escaped = str(picture).replace(" ", "\\ ")
    shown = type_in(*(f"/{kind} {picture}" for kind in KINDS), "/media", f"Is it like {escaped}?")
    for number, kind in enumerate(KINDS, 1):
        assert shown.count(f"{number} {kind} red circle.png") == 2
    names = ", ".join(f"{kind} red circle.png" for kind in KINDS)
    assert f"[{names}, image red circle.png] Is it like?" in " ".join(shown.split())
    assert "▀" not in shown
    asked_about = stored_media(client)
    shown = type_in(f"'{picture}'", "/drop 1", f"'{picture}'", colours=True)
    assert "\x1b[38;2;255;255;255;48;2;255;255;255m▀" in shown
    assert stored_media(client) == asked_about  # the others are deleted


def test_a_person_at_this_machine_finds_the_chats_of_the_page(client: Client) -> None:
    browsers = [f"b-{n:036x}" for n in range(3)]
    for given in ({"user": browsers[0]}, {"browser": browsers[1], "home": True}):
        with Client(client.api, **given) as page, page.stream(Question(str(given))) as events:
            list(events)
    with Client(client.api, browser=browsers[2]) as other, other.stream(Question("Mine")) as events:
        list(events)
    with Client(client.api, home=True) as terminal:
        chat, out = chat_of(terminal)
        chat.take("/history")
        # The first is of an earlier version, whose page sent each browser's name as a user.
        assert re.findall(r"b-0+([0-2])", out.getvalue()) == ["1", "0"]
        chat.take("/open 2")
        assert chat.talk.ask("And now?")


def chat_of(client: Client) -> tuple[Chat, io.StringIO]:
    """A chat whose lines a test gives itself, and the text on its screen."""
    out, first = io.StringIO(), client.send(routes.models())[0]
    return Chat(Talk(client), Screen(Console(file=out, width=100)), first, lambda _: ""), out


def test_a_recording_is_asked_as_text(tmp_path: Path, picture: Path) -> None:
    assistant = FakeAssistant(listener=FakeListener("Where is", "the cat?"))
    with served(tmp_path, assistant) as client:
        chat, out = chat_of(client)
        chat.take(f"/dictate '{picture}'")
        assert out.getvalue().startswith("> Where is the cat?\n[] Where is the cat?\n")
        assert stored_media(client) == []
        for wrong, said in (("", "needs the path"), (f"'{picture}' '{picture}'", "one recording")):
            with pytest.raises(ApiError, match=said):
                chat.take(f"/dictate {wrong}")
        assistant.encoder = FakeAssistant(listener=FakeListener()).encoder
        with pytest.raises(ApiError, match=r"red circle\.png: no speech was heard in it"):
            chat.take(f"/dictate '{picture}'")


def test_another_model_is_asked(tmp_path: Path, picture: Path) -> None:
    shelf = Shelf()
    with shelf.served(tmp_path, "ab") as http, Client(str(http.base_url)) as client:
        chat, out = chat_of(client)
        chat.take("/model")
        reads = "reads text, image, audio, video, depth, normal, document"
        assert out.getvalue() == f"* a: loaded, {reads}\n  b: unloaded, {reads}\n"
        with pytest.raises(ApiError, match="no model 'c' there; the server has a, b"):
            chat.take("/model c")
        chat.take("/model b")
        assert "* b: unloaded" in out.getvalue()
        chat.take(f"/image '{picture}'")
        chat.take("Hello")
        assert not shelf.made["a"].asked
        assert shelf.made["b"].asked[-1][-1].text == "Hello"
        (summary,) = client.send(routes.conversations()).data
        assert summary.model == "b"


WRONG = (
    ("/image", "error: /image needs the path of a file"),
    ("/image /nothing at all.png", "error: /nothing at all.png: no such file"),
    ("/foo", "error: no command /foo; /help lists them"),
    ("/imge x", "error: no command /imge; did you mean /image? /help lists them"),
    ("/set temperature 9", "error: temperature: input should be less than or equal to 2"),
    ("/set temperature hot", "error: temperature: "),
    ("/set temprature 1", "error: no setting 'temprature'; did you mean temperature?"),
    ("/set json_schema {nonsense", "error: json_schema: "),
    ("/drop 1", "error: no medium 1; 0 attached"),
    ("/drop ²", "error: expected a number, got '²'"),
    ("/retry", "error: no question has been asked yet"),
    ("/save", "error: /save needs the path of a file to write"),
    ("/save /nowhere/x.md", "error: nothing has been said yet"),
    ("/pin 1", "error: nothing has been said yet"),
    ("/open", "error: a number is missing"),
    ("/open 7", "error: no conversation 7; /history lists 0"),
    ("/open conv-x", "error: no conversation 'conv-x'"),
    ("/image a.png", "error: a.png: not a image"),
    ("refuse", "error: refused"),
    ("crash", "error: the model failed; the server's log has the details"),
)


def test_errors_are_one_line_and_the_chat_goes_on(
    type_in: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(b"broken")
    monkeypatch.chdir(tmp_path)
    shown = type_in(*(line for line, _ in WRONG), "Still there?").splitlines()
    errors = [line for line in shown if "error: " in line]
    assert len(errors) == len(WRONG)
    for (_, said), error in zip(WRONG, errors, strict=True):
        assert said in error
    assert "[] Still there?" in shown
    assert re.fullmatch(r"10 tokens \+ 2 in \d+\.\d s", shown[-1])


def test_lines_as_they_are_typed(
    type_in: Type, assistant: FakeAssistant, keyboard: PipeInput
) -> None:
    shown = type_in(
        *(f"one{ALT_ENTER}two", f'"""three{ENTER}four"""', "\x1b[200~five\rsix\x1b[201~"),
        *(f"nonsense{CTRL_C}sense", "last"),
    )
    assert "Ctrl-D or /quit ends the chat" in shown
    type_in(UP + UP)  # an earlier question
    asked = [messages[-1].text for messages in assistant.asked]
    assert asked == ["one\ntwo", "three\nfour", "five\nsix", "sense", "last", "sense"]


def test_system_settings_and_new(type_in: Type, assistant: FakeAssistant) -> None:
    shown = type_in(
        *("/system Be brief.", "/set temperature=0.7", "/set max_tokens 9"),
        *('/set stop ["a", "b"]', "/set depth_scale 0.002", "One", "/set stop", "/new"),
        *("/set temperature", "Two", '/system ""', "/system", "Three", "/settings"),
    )
    assert "temperature: 0.7" in shown
    assert "temperature: the server's default" in shown
    assert "no system text" in shown
    assert re.search(r"max_tokens +9 ", shown)
    assert [o.temperature for o in assistant.options] == [0.7, 0.0, 0.0]
    assert [o.max_tokens for o in assistant.options] == [9, 9, 9]
    assert [o.stop for o in assistant.options] == [("a", "b"), (), ()]
    texts = [[m.text for m in messages] for messages in assistant.asked]
    assert texts[0] == ["Be brief.", "One"]
    assert texts[1] == ["Be brief.", "Two"]
    assert texts[2][0] in ("", "Two")  # not any more
    assert texts[2][-1] == "Three"


def test_history_open_retry_save(type_in: Type, tmp_path: Path, picture: Path) -> None:
    page = tmp_path / "page one.md"
    type_in("/system Be kind.", f"/image {picture}", "First", "/clear", "Second")
    shown = type_in(
        *("/history", "/open 2", "/retry", f"/save {page}", f"/save {page}"),
        *("/history nothing of it", "/history first"),
    )
    assert re.search(r"1 +just now +Second\n2 +just now +First", shown)
    assert "[image red circle.png]\n> First\n[image red circle.png] First" in shown
    assert "at temperature 0 the answer stays the same" in shown
    assert f"error: {page}: this file exists already" in shown
    assert "no conversation with 'nothing of it' in it" in shown
    assert "First (this one)" in shown
    facts = f"array, {decimal(picture.stat().st_size)}"
    assert page.read_text() == (
        f"# First\n\n> Be kind.\n\n## Question\n\n- image: red circle.png ({facts})\n\nFirst\n\n"
        "## Answer (fake)\n\n[image red circle.png] First\n"
    )


def test_media_are_pinned_and_let_go(type_in: Type, client: Client, picture: Path) -> None:
    def pinned() -> list[bool]:
        (chat,) = client.send(routes.conversations()).data
        turns = client.send(routes.conversation(chat.id)).turns
        return [one.pinned for turn in turns for one in turn.media]

    wrong = ("/pin 0", "/pin 2", "/pin x")
    shown = type_in("Hi", "/pin", f"/image {picture}", "First", "/pin", "/pin 1", *wrong)
    listed = [line for line in shown.splitlines() if line.startswith("1  ")]
    assert listed == [f"1  picture: {picture.name}", f"1  picture: {picture.name} (pinned)"]
    assert "the chat has no media yet\n" in shown
    for error in ("no medium 0; the chat has 1", "no medium 2; the chat", "expected a number"):
        assert f"error: {error}" in shown
    assert pinned() == [True]
    assert "(pinned)" not in type_in("/history", "/open 1", "/pin 1")
    assert pinned() == [False]


def test_archived_chats_are_found_and_a_system_text_set_elsewhere_stays(
    type_in: Type, client: Client, talk: Talk
) -> None:
    type_in("/system Be kind.", "First", "/new", "Second")
    first = client.send(routes.conversations()).data[1].id
    client.send(routes.change_conversation(first, archived=True))
    shown = type_in("/history", "/history first")
    assert re.search(r"1 +just now +Second\n", shown)
    assert re.search(r"1 +just now +First \(archived\)", shown)
    talk.open(first)
    for system in ("Be brief.", None):
        client.send(routes.change_conversation(first, system=system))
        whole(talk.ask("And?"))
        assert client.send(routes.conversation(first)).system == system
    talk.system = "Rhyme."
    whole(talk.ask("And?"))
    assert client.send(routes.conversation(first)).system == "Rhyme."


def test_an_answer_that_is_not_sure(
    type_in: Type, assistant: FakeAssistant, tmp_path: Path, picture: Path
) -> None:
    assistant.marks = Marks.read(0.5)
    page = tmp_path / "page.md"
    asked = type_in(f"/image {picture}", "perhaps", "And now?", f"/save {page}")
    opened = type_in("/history", "/open 1")
    for shown in (asked, opened, page.read_text()):
        assert "[image red circle.png] perhaps (not sure)\n" in shown
        assert "And now?\n" in shown
        assert shown.count("(not sure)") == 1


def test_estimate_help_and_an_answer_at_its_limit(type_in: Type, picture: Path) -> None:
    shown = type_in(
        *(f"/image {picture}", "/estimate What is it?", "/help", "/?", "/set max_tokens 2", "Hi")
    )
    assert "10 tokens (1 of media) + up to 256 for the answer: fits the context of 1,000" in shown
    assert shown.count("/quit") == 2
    assert shown.count("Alt-Enter") == 2
    assert "stopped at the limit of 2 tokens; /set max_tokens N raises it" in shown


def test_what_others_wrote_does_not_steer_the_terminal(type_in: Type, client: Client) -> None:
    escape = "\x1b]0;title\x07\x1b[2J"
    with client.stream(routes.Question(f"evil {escape}")) as events:
        list(events)
    shown = type_in("/history", "/open 1", f"say {escape}")
    assert "\x1b" not in shown
    assert "evil ]0;title[2J" in shown


@pytest.mark.parametrize("end", ["/quit", "/exit", "/bye"])
def test_narrow_screens_and_ways_to_end(type_in: Type, end: str) -> None:
    shown = type_in("word " * 30, "/help", "/settings", "/history", end, "never asked", width=30)
    assert all(len(line) <= 30 for line in shown.splitlines())
    assert "never asked" not in shown


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("/im", ["/image"]),
        ("/set", ["/set", "/settings"]),
        ("/set temp", ["/set temperature"]),
        ("/nothing", []),
        ("What is /im", []),
        ("/quit ", []),
        ("/image {folder}/a ", ["/image {folder}/a cat.png"]),
        ("/audio ~/a", ["/audio ~/a cat.wav"]),
        ("/image '~/a", ["/image '~/a cat.png"]),
        ("/depth fo", ["/depth folder/"]),
        ("/save n", ["/save notes.txt"]),
        ("/image /nowhere/a", []),
    ],
)
def test_completion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, lines: list[str]
) -> None:
    for name in ("a cat.png", "a cat.wav", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    text = text.format(folder=tmp_path)
    found = ChatCompleter().get_completions(Document(text), CompleteEvent())
    completed = [text[: len(text) + c.start_position] + c.text for c in found]
    assert completed == [line.format(folder=tmp_path) for line in lines]


def test_history_is_kept_for_the_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    kept_history().append_string("two\nlines")
    file = tmp_path / "state" / "mico-chat" / "chat-history"
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(kept_history().load_history_strings()) == ["two\nlines"]
    monkeypatch.setenv("XDG_STATE_HOME", str(file))  # a file where the folder should be
    assert list(kept_history().load_history_strings()) == []


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
        assert assistant.cancelled.wait(timeout=PATIENCE_S)
        halfway.set()

    return stop_answer


def said(talk: Talk) -> list[tuple[str, str]]:
    """Question and end of each stored turn."""
    return [(turn.message, turn.finish_reason) for turn in talk.conversation().turns]


PICTURE = Upload("image", b"abc", "cat.png")


def test_what_an_answer_waits_for_is_shown_and_erased(
    talk: Talk, halfway: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mico_server.service.PROGRESS_AFTER_S", 0)
    halfway.clear()

    def events() -> Iterator[ChatEvent]:
        with closing(talk.ask("slowly")) as coming:
            for event in coming:
                yield event
                if isinstance(event, Progress):
                    halfway.set()

    out = io.StringIO()
    Screen(Console(file=out, width=80, force_terminal=True)).answer(events())  # type: ignore[arg-type]
    _, shown, after = out.getvalue().rpartition("reading the conversation: 512 of 4,100")
    assert shown
    assert "\x1b[2K" in after.partition("slowly")[0]  # the line is erased before the first word
    plain = io.StringIO()
    Screen(Console(file=plain, width=80)).answer(talk.ask("slowly"))
    assert plain.getvalue().startswith("[] slowly\n")


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


def test_a_stopped_answer_is_waited_for(
    talk: Talk, stop: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop("One")
    assert talk.id is not None
    stored = talk.client.send(routes.conversation(talk.id))
    waiting = stored.turns[0].model_copy(update={"finish_reason": "unanswered"})
    ended = waiting.model_copy(update={"finish_reason": "cancelled"})
    answers = [stored.model_copy(update={"turns": [turn]}) for turn in (waiting, waiting, ended)]
    monkeypatch.setattr(talk.client, "send", lambda call: answers.pop(0))
    assert said(talk) == [("One", "cancelled")]


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
            assert assistant.started.acquire(timeout=PATIENCE_S)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        thread = threading.Thread(target=press_ctrl_c)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            whole(talk.ask("One"))
        thread.join()
        assert assistant.cancelled.wait(timeout=PATIENCE_S)
        gate.set()
        assert [medium.name for medium in talk.attached] == ["cat.png"]
        assert whole(talk.retry()).answer == "[image cat.png] One"
        assert said(talk) == [("One", "stop")]
