"""The prompt: it reads one or several lines, with history and completion."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

from mico_chat.media.kinds import TABLE
from mico_ui.terminal.chat import COMMANDS
from mico_ui.terminal.screen import printable
from mico_ui.terminal.talk import SETTINGS


def reader(
    history: History, *, input: Input | None = None, output: Output | None = None
) -> Callable[[str], str]:
    """A function that asks for a line, or several; its argument is shown before the cursor.

    It raises KeyboardInterrupt at Ctrl-C, and EOFError at Ctrl-D in an empty line.
    """
    session: PromptSession[str] = PromptSession(
        history=history,
        completer=ChatCompleter(),
        complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
        key_bindings=_keys(),
        multiline=True,
        prompt_continuation="  ",
        placeholder=FormattedText([("ansibrightblack", "Ask something, or /help")]),
        reserve_space_for_menu=6,
        input=input,
        output=output,
    )

    def read(before: str) -> str:
        return session.prompt(FormattedText([("ansicyan bold", printable(before))]))

    return read


def kept_history() -> History:
    """Earlier questions, kept in a file that only the user can read.

    The file is ``$XDG_STATE_HOME/mico-chat/chat-history``, by default in ``~/.local/state``. If it
    cannot be written, memory keeps the questions.
    """
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        path = Path(state).expanduser() / "mico-chat" / "chat-history"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("ab"):
            return FileHistory(path)
    except (OSError, RuntimeError):
        return InMemoryHistory()


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")  # Enter sends this while an answer is being written
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        state = buffer.complete_state
        if state is not None and state.current_completion is not None and _goes_on(buffer.text):
            buffer.complete_state = None  # the chosen completion is in the line already
            buffer.insert_text("" if buffer.text.endswith("/") else " ")
        elif buffer.text.lstrip().startswith('"""') and buffer.text.count('"""') < 2:
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def _goes_on(text: str) -> bool:
    """Whether the user has to add something: a file to a folder, a path to a command."""
    command = COMMANDS.get(text[1:])
    return text.endswith("/") or (command is not None and command.argument not in ("", "[N]"))


class ChatCompleter(Completer):
    """Completes commands, paths of files of a command's kind, and names of settings."""

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        text = document.text_before_cursor
        name, space, rest = text.partition(" ")
        if not text.startswith("/") or "\n" in text:
            return
        if not space:
            for command in COMMANDS:
                if command.startswith(text[1:]):
                    meta = COMMANDS[command].help
                    yield Completion(f"/{command}", -len(text), display_meta=meta)
        elif name == "/set" and " " not in rest:
            for setting, meta in SETTINGS.items():
                if setting.startswith(rest):
                    yield Completion(setting, -len(rest), display_meta=meta)
        elif name in (*ENDINGS, "/save"):
            yield from _paths(ENDINGS.get(name), rest.lstrip(" '\""), complete_event)


ENDINGS = {f"/{kind}": row.endings for kind, row in TABLE.items()}


def _paths(
    endings: tuple[str, ...] | None, text: str, event: CompleteEvent
) -> Iterable[Completion]:
    def wanted(path: str) -> bool:
        return endings is None or os.path.isdir(path) or path.lower().endswith(endings)

    completer = PathCompleter(expanduser=True, file_filter=wanted)
    for found in completer.get_completions(Document(text), event):
        slash = "/" if found.display_text.endswith("/") else ""
        yield Completion(found.text + slash, 0, display=found.display)
