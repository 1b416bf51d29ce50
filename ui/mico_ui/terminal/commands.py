"""The commands of the chat, all of which begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mico_chat.media.kinds import IN_WORDS, KINDS, Kind
from mico_ui import calls, describe
from mico_ui.answers import Conversation
from mico_ui.client import ApiError
from mico_ui.terminal.paths import paths_of
from mico_ui.terminal.settings import SETTINGS

if TYPE_CHECKING:
    from mico_ui.terminal.chat import Chat

KEYS = (
    ("Enter", "ask"),
    ("Alt-Enter", 'a new line; or put the text between """ and """'),
    ("Up, Down, Ctrl-R", "go to earlier questions"),
    ("Tab", "complete a command or path"),
    ("Ctrl-C", "stop an answer"),
    ("Ctrl-D", "end"),
)


@dataclass(frozen=True)
class Command:
    """What a command does: ``run`` gets the chat and the text behind its name."""

    run: Callable[[Chat, str], None]
    takes: str
    help: str
    others: tuple[str, ...] = ()


def _attach(chat: Chat, text: str, *, kind: Kind) -> None:
    if not text:
        raise ApiError(f"/{kind} needs the path of a file")
    for path in paths_of(text):
        chat.attach(kind, path)


def _media(chat: Chat, text: str) -> None:
    if not chat.talk.attached:
        chat.screen.note("nothing is attached; /image FILE attaches a picture")
    for number, medium in enumerate(chat.talk.attached, 1):
        chat.screen.medium(number, medium)


def _drop(chat: Chat, text: str) -> None:
    for medium in chat.talk.detach(_number(text) if text else None):
        chat.screen.note(f"removed {medium.name}")


def _new(chat: Chat, text: str) -> None:
    chat.talk.new()
    chat.screen.note("a new conversation")


def _clear(chat: Chat, text: str) -> None:
    chat.talk.detach()
    chat.screen.console.clear()
    _new(chat, "")


def _retry(chat: Chat, text: str) -> None:
    if float(chat.talk.settings.get("temperature", 0)) == 0:
        chat.screen.note(
            "at temperature 0 the answer stays the same; /set temperature 0.8 varies it"
        )
    chat.screen.answer(chat.talk.retry())


def _system(chat: Chat, text: str) -> None:
    if text:
        chat.talk.system = "" if text in ('""', "''") else text
    chat.screen.note(f"system: {chat.talk.system}" if chat.talk.system else "no system text")


def _set(chat: Chat, text: str) -> None:
    name, _, value = text.replace("=", " ", 1).partition(" ")
    if not name:
        _settings(chat, "")
        return
    chat.talk.set(name, value.strip())
    shown = chat.talk.settings.get(name, "the server's default")
    chat.screen.note(f"{name}: {shown}")


def _settings(chat: Chat, text: str) -> None:
    given = chat.talk.settings
    chat.screen.table([(name, str(given.get(name, "-")), help) for name, help in SETTINGS.items()])
    chat.screen.note(f"system: {chat.talk.system or '-'}")
    chat.screen.note(f"model: {chat.model.id} at {chat.talk.client.api}")


def _history(chat: Chat, text: str) -> None:
    page = chat.talk.client.send(calls.conversations(query=text or None))
    chat.listed = page.data
    if not page.data:
        chat.screen.note("no conversation" + (f" with {text!r} in it" if text else " yet"))
    chat.screen.conversations(page.data, chat.talk.id)
    if page.has_more:
        chat.screen.note("there are more; /history TEXT finds those that contain TEXT")


def _open(chat: Chat, text: str) -> None:
    id_ = text
    if not text.startswith("conv-"):
        if not chat.listed:
            _history(chat, "")
        number = _number(text)
        if not 1 <= number <= len(chat.listed):
            raise ApiError(f"no conversation {number}; /history lists {len(chat.listed)}")
        id_ = chat.listed[number - 1].id
    chat.screen.transcript(chat.talk.open(id_))


def _save(chat: Chat, text: str) -> None:
    if not text:
        raise ApiError("/save needs the path of a file to write")
    (path,) = [Path(text.strip("'\"")).expanduser()]
    told = as_markdown(chat.talk.conversation())
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(told)
    except FileExistsError as error:
        raise ApiError(f"{path}: this file exists already; choose another name") from error
    except OSError as error:
        raise ApiError(f"{path}: {error.strerror or error}") from error
    chat.screen.note(f"written to {path}")


def as_markdown(conversation: Conversation) -> str:
    """A conversation as a page."""
    lines = [f"# {conversation.title}", ""]
    if conversation.system:
        lines += [f"System: {conversation.system}", ""]
    for turn in conversation.turns:
        lines += ["## You", ""]
        lines += [f"- {medium.kind}: {medium.name}" for medium in turn.media]
        lines += [""] if turn.media else []
        answer = "(not answered)" if turn.finish_reason == "unanswered" else turn.answer
        lines += [turn.message, "", f"## {conversation.model}", "", answer, ""]
    return "\n".join(lines)


def _estimate(chat: Chat, text: str) -> None:
    chat.screen.note(describe.cost(chat.talk.estimate(text)))


def _help(chat: Chat, text: str) -> None:
    rows = [(f"/{name} {c.takes}".strip(), c.help) for name, c in COMMANDS.items()]
    chat.screen.table([*rows, ("", ""), *KEYS])
    chat.screen.note("The path of a picture, sound or clip in a question attaches that file too.")


def _quit(chat: Chat, text: str) -> None:
    raise EOFError


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ApiError(f"expected a number, got {text!r}" if text else "a number is missing")
    return int(text)


COMMANDS: dict[str, Command] = {
    **{
        kind: Command(
            partial(_attach, kind=kind), "FILE", f"attach {IN_WORDS[kind]} to the question"
        )
        for kind in KINDS
    },
    "media": Command(_media, "", "list what is attached to the next question"),
    "drop": Command(_drop, "[N]", "remove attached file N, or all of them"),
    "estimate": Command(_estimate, "[QUESTION]", "count the tokens that a question would take"),
    "retry": Command(_retry, "", "ask the last question again"),
    "new": Command(_new, "", "begin another conversation"),
    "clear": Command(_clear, "", "the same, with an empty screen and nothing attached"),
    "system": Command(_system, "[TEXT]", 'instructions for the model (system prompt); "" for none'),
    "set": Command(
        _set, "[NAME VALUE]", "set an option: temperature 0.7; without VALUE: its default"
    ),
    "settings": Command(_settings, "", "list all options and their values"),
    "history": Command(_history, "[TEXT]", "list stored conversations, or those that contain TEXT"),
    "open": Command(_open, "N", "continue conversation N of /history"),
    "save": Command(_save, "FILE", "write the conversation as Markdown"),
    "help": Command(_help, "", "show this list", others=("?",)),
    "quit": Command(_quit, "", "end the chat", others=("exit", "bye")),
}

NAMES: dict[str, str] = {
    f"/{written}": name for name, command in COMMANDS.items() for written in (name, *command.others)
}
"""Commands as they are written, and their names."""
