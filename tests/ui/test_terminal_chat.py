"""What a person types, key by key, and what the screen shows for it; a real server answers."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from mico_chat.media.kinds import KINDS
from mico_chat.wire import ChatEvent, ChatResponse, Usage
from mico_ui import describe, routes
from mico_ui.client import Client
from mico_ui.terminal.chat import Chat
from mico_ui.terminal.prompt import ChatCompleter, kept_history, reader
from mico_ui.terminal.screen import Screen
from mico_ui.terminal.talk import Talk
from tests.fakes import FakeAssistant
from tests.ui.conftest import stored_media

ENTER, ALT_ENTER, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x03", "\x04"
UP = "\x1b[A"

Type = Callable[..., str]


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keyboard:
        yield keyboard


@pytest.fixture
def type_in(client: Client, keyboard: PipeInput) -> Type:
    """Type lines, each ended with Enter, then Ctrl-D; what the screen shows after that."""
    history = InMemoryHistory()

    def type_in(*lines: str, width: int = 100, colours: bool = False) -> str:
        out = io.StringIO()
        console = Console(
            file=out,
            width=width,
            highlight=False,
            force_terminal=colours,
            color_system="truecolor" if colours else None,
        )
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


WRONG = (
    ("/image", "error: /image needs the path of a file"),
    ("/image /nothing at all.png", "error: /nothing at all.png: no such file"),
    ("/foo", "error: no command /foo; /help lists them"),
    ("/imge x", "error: no command /imge; did you mean /image? /help lists them"),
    ("/set temperature 9", "error: temperature: input should be less than or equal to 2"),
    ("/drop 1", "error: no medium 1; 0 attached"),
    ("/drop ²", "error: expected a number, got '²'"),
    ("/retry", "error: no question has been asked yet"),
    ("/save", "error: /save needs the path of a file to write"),
    ("/save /nowhere/x.md", "error: nothing has been said yet"),
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


@pytest.mark.parametrize("command", ["/quit", "/exit", "/bye"])
def test_ways_to_end(type_in: Type, command: str) -> None:
    assert "[]" not in type_in(command, "never asked")


def test_system_settings_and_new(type_in: Type, assistant: FakeAssistant) -> None:
    shown = type_in(
        *("/system Be brief.", "/set temperature=0.7", "/set max_tokens 9", "One"),
        *("/new", "/set temperature", "Two", '/system ""', "/system", "Three", "/settings"),
    )
    assert "temperature: 0.7" in shown
    assert "temperature: the server's default" in shown
    assert "no system text" in shown
    assert re.search(r"max_tokens +9 ", shown)
    assert [o.temperature for o in assistant.options] == [0.7, 0.0, 0.0]
    assert [o.max_tokens for o in assistant.options] == [9, 9, 9]
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
    facts = f"array, {describe.size(picture.stat().st_size)}"
    assert page.read_text() == (
        f"# First\n\n> Be kind.\n\n## Question\n\n- image: red circle.png ({facts})\n\nFirst\n\n"
        "## Answer (fake)\n\n[image red circle.png] First\n"
    )


def test_estimate_help_and_an_answer_at_its_limit(type_in: Type, picture: Path) -> None:
    shown = type_in(f"/image {picture}", "/estimate What is it?", "/help", "/?")
    assert "10 tokens (1 of media) + up to 256 for the answer: fits the context of 1,000" in shown
    assert shown.count("/quit") == 2
    assert shown.count("Alt-Enter") == 2

    def events() -> Generator[ChatEvent, None, None]:
        usage = Usage(prompt_tokens=1, completion_tokens=1, media_tokens=0)
        stored = {"model": "m", "conversation_id": None, "turn": None, "media": ()}
        yield ChatResponse.model_validate(
            {"answer": "a", "finish_reason": "length", "usage": usage, **stored}
        )

    out = io.StringIO()
    Screen(Console(file=out)).answer(events())
    assert "/set max_tokens N" in out.getvalue()


def test_what_others_wrote_does_not_steer_the_terminal(type_in: Type, client: Client) -> None:
    escape = "\x1b]0;title\x07\x1b[2J"
    with client.stream(routes.Question(f"evil {escape}")) as events:
        list(events)
    shown = type_in("/history", "/open 1", f"say {escape}")
    assert "\x1b" not in shown
    assert "evil ]0;title[2J" in shown


def test_narrow_screens(type_in: Type) -> None:
    shown = type_in("word " * 30, "/help", "/settings", "/history", width=30)
    assert all(len(line) <= 30 for line in shown.splitlines())


def completed(text: str) -> list[str]:
    found = ChatCompleter().get_completions(Document(text), CompleteEvent())
    return [text[: len(text) + c.start_position] + c.text for c in found]


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
    found = completed(text.format(folder=tmp_path))
    assert found == [line.format(folder=tmp_path) for line in lines]


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
