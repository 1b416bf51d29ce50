"""The chat in a terminal: it reads lines, runs commands and shows answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TypeAlias

from rich.cells import cell_len

from mico_chat.errors import MicoError
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.media.kinds import TABLE, Kind
from mico_chat.system import unechoed
from mico_chat.wire import ConversationSummary, ModelInfo
from mico_ui import describe, routes
from mico_ui.client import ApiError
from mico_ui.routes import Upload
from mico_ui.terminal.screen import Screen, preview
from mico_ui.terminal.talk import SETTINGS, Talk, dropped, named, paths_of

KEYS = (
    *(("Enter", "ask"), ("Alt-Enter", 'a new line; or put the text between """ and """')),
    *(("Up, Down, Ctrl-R", "go to earlier questions"), ("Tab", "complete a command or path")),
    *(("Ctrl-C", "stop an answer"), ("Ctrl-D", "end")),
)


Run: TypeAlias = "Callable[[Chat, str], None]"


@dataclass(frozen=True)
class Command:
    """A command: its function, its argument as /help shows it, and its other names."""

    run: Run
    argument: str
    help: str
    aliases: tuple[str, ...] = ()


def _attach(chat: Chat, text: str, *, kind: Kind) -> None:
    if not text:
        raise ApiError(f"/{kind} needs the path of a file")
    for path in paths_of(text):
        chat.attach(kind, path)


COMMANDS = {
    str(kind): Command(partial(_attach, kind=kind), "FILE", f"attach {row.words} to the question")
    for kind, row in TABLE.items()
}


def _command(argument: str, help: str, *aliases: str) -> Callable[[Run], Run]:
    """Makes a method of the chat a command; its argument is the text behind the command's name."""

    def add(run: Run) -> Run:
        COMMANDS[run.__name__] = Command(run, argument, help, aliases)
        return run

    return add


@dataclass
class Chat:
    """A chat of lines: ``read`` asks for the next line; its argument is shown before the cursor.

    ``listed`` are the conversations that /history has shown last.
    """

    talk: Talk
    screen: Screen
    served: ModelInfo
    read: Callable[[str], str]
    listed: list[ConversationSummary] = field(default_factory=list)
    _decoder: MediaDecoder = field(default_factory=MediaDecoder)

    def run(self) -> None:
        """Chat until the user ends it; then media that no question was about are deleted."""
        with self._decoder:
            while True:
                line = None
                try:
                    line = self.read(self._before())
                    with unechoed():
                        self.take(line)
                except EOFError:
                    break
                except KeyboardInterrupt:
                    at_prompt = line is None
                    self.screen.note("Ctrl-D or /quit ends the chat" if at_prompt else "stopped")
                except ApiError as error:
                    self.screen.error(str(error))
            self.talk.detach()

    def take(self, line: str) -> None:
        """Run a command, or ask a question and attach the files whose paths are in it."""
        text = line.strip()
        if text.startswith('"""'):
            text = text.removeprefix('"""').removesuffix('"""').strip()
        name, _, rest = text.partition(" ")
        if name in NAMES:
            COMMANDS[NAMES[name]].run(self, rest.strip())
            return
        message, media = dropped(text)
        if not media and re.fullmatch(r"/\w*", name):
            close = get_close_matches(name, NAMES, n=1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise ApiError(f"no command {name}; {meant}/help lists them")
        for kind, path in media:
            self.attach(kind, path)
        if message:
            self.screen.answer(self.talk.ask(message))

    def attach(self, kind: Kind, path: Path) -> None:
        with self.screen.waiting(f"sending {path.name}"):
            stored = self.talk.attach(Upload(kind, path))
        self.screen.medium(len(self.talk.attached), stored)
        console = self.screen.console
        if not console.is_terminal or console.color_system not in ("256", "truecolor"):
            return
        try:
            medium = self._decoder.decode(MediaFile(kind, path, path.name))
        except MicoError as error:  # the server has more room than this machine
            self.screen.note(f"no preview: {error}")
            return
        for part in preview(medium, console.width):
            console.print(part)

    def _before(self) -> str:
        names = ", ".join(medium.name for medium in self.talk.attached)
        if cell_len(names) > self.screen.console.width // 2:
            names = f"{len(self.talk.attached)} media"
        return f"[{names}] > " if names else "> "

    # --- Commands ---

    @_command("", "list the media attached to the next question")
    def media(self, text: str) -> None:
        if not self.talk.attached:
            self.screen.note("nothing is attached; /image FILE attaches a picture")
        for number, medium in enumerate(self.talk.attached, 1):
            self.screen.medium(number, medium)

    @_command("[N]", "remove attached file N, or all of them")
    def drop(self, text: str) -> None:
        for medium in self.talk.detach(_number(text) if text else None):
            self.screen.note(f"removed {medium.name}")

    @_command("[N]", "list the media of the chat; pin or unpin N, which stays in a full one")
    def pin(self, text: str) -> None:
        chat = self.talk.conversation()
        media = list({one.id: one for turn in chat.turns for one in turn.media}.values())
        if text:
            number = _number(text)
            if not 1 <= number <= len(media):
                raise ApiError(f"no medium {number}; the chat has {len(media)}")
            one = media[number - 1]
            pinned = {one.id: not one.pinned}
            self.talk.client.send(routes.change_conversation(chat.id, pinned_media=pinned))
            media[number - 1] = one.model_copy(update={"pinned": pinned[one.id]})
        if not media:
            self.screen.note("the chat has no media yet")
        for number, one in enumerate(media, 1):
            mark = " (pinned)" if one.pinned else ""
            self.screen.note(f"{number}  {TABLE[one.kind].noun}: {one.name}{mark}")

    @_command("FILE", "ask what is said in a recording, as if you had typed it")
    def dictate(self, text: str) -> None:
        if not text:
            raise ApiError("/dictate needs the path of a recording")
        (path, *others) = paths_of(text)
        if others:
            raise ApiError("/dictate takes one recording at a time")
        with self.screen.waiting(f"listening to {path.name}"):
            said = self.talk.client.send(routes.transcription(Upload("audio", path)))
        if not said:
            raise ApiError(f"{path.name}: no speech was heard in it")
        self.screen.note(f"> {said}")
        self.screen.answer(self.talk.ask(said))

    @_command("[QUESTION]", "count the tokens that a question would take")
    def estimate(self, text: str) -> None:
        self.screen.note(describe.cost(self.talk.estimate(text)))

    @_command("", "ask the last question again")
    def retry(self, text: str) -> None:
        if float(self.talk.settings.get("temperature", 0)) == 0:
            said = "at temperature 0 the answer stays the same; /set temperature 0.8 varies it"
            self.screen.note(said)
        self.screen.answer(self.talk.retry())

    @_command("", "begin another conversation")
    def new(self, text: str) -> None:
        self.talk.new()
        self.screen.note("a new conversation")

    @_command("", "begin another conversation, empty the screen and detach all media")
    def clear(self, text: str) -> None:
        self.talk.detach()
        self.screen.console.clear()
        self.new("")

    @_command("[NAME]", "ask another model of the server; without NAME: list them", "models")
    def model(self, text: str) -> None:
        models = self.talk.client.send(routes.models())
        if text:
            self.served = named(models, text)
            self.talk.model = self.served.id
        for one in models:
            mark = "*" if one.id == self.served.id else " "
            reads = ", ".join(("text", *one.modalities))
            self.screen.note(f"{mark} {one.id}: {one.status.value}, reads {reads}")

    @_command("[TEXT]", 'instructions for the model (system prompt); "" for none')
    def system(self, text: str) -> None:
        if text:
            self.talk.system = "" if text in ('""', "''") else text
        system = self.talk.system
        self.screen.note(f"system: {system}" if system else "no system text")

    @_command("[NAME VALUE]", "set an option: temperature 0.7; without VALUE: its default")
    def set(self, text: str) -> None:
        name, _, value = text.replace("=", " ", 1).partition(" ")
        if not name:
            self.settings("")
            return
        self.talk.set(name, value.strip())
        shown = self.talk.settings.get(name, "the server's default")
        self.screen.note(f"{name}: {shown}")

    @_command("", "list all options and their values")
    def settings(self, text: str) -> None:
        given = self.talk.settings
        rows = [(name, str(given.get(name, "-")), help) for name, help in SETTINGS.items()]
        self.screen.table(rows)
        self.screen.note(f"system: {self.talk.system or '-'}")
        self.screen.note(f"model: {self.served.id} at {self.talk.client.api}")

    @_command("[TEXT]", "list stored conversations, or those that contain TEXT")
    def history(self, text: str) -> None:
        archived = None if text else False  # a text is looked for in all of them
        found = routes.conversations(query=text or None, archived=archived)
        page = self.talk.client.send(found)
        self.listed = page.data
        if not page.data:
            self.screen.note("no conversation" + (f" with {text!r} in it" if text else " yet"))
        self.screen.conversations(page.data, self.talk.id)
        if page.has_more:
            self.screen.note("there are more; /history TEXT finds those that contain TEXT")

    @_command("N", "continue conversation N of /history")
    def open(self, text: str) -> None:
        id_ = text
        if not text.startswith("conv-"):
            if not self.listed:
                self.history("")
            number = _number(text)
            if not 1 <= number <= len(self.listed):
                raise ApiError(f"no conversation {number}; /history lists {len(self.listed)}")
            id_ = self.listed[number - 1].id
        self.screen.transcript(self.talk.open(id_))

    @_command("FILE", "write the conversation as Markdown")
    def save(self, text: str) -> None:
        if not text:
            raise ApiError("/save needs the path of a file to write")
        path = Path(text.strip("'\"")).expanduser()
        page = describe.markdown(self.talk.conversation())
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(page)
        except OSError as error:
            taken = isinstance(error, FileExistsError)
            reason = "this file exists already; choose another name" if taken else error.strerror
            raise ApiError(f"{path}: {reason}") from error
        self.screen.note(f"written to {path}")

    @_command("", "show this list", "?")
    def help(self, text: str) -> None:
        rows = [(f"/{name} {c.argument}".strip(), c.help) for name, c in COMMANDS.items()]
        self.screen.table([*rows, ("", ""), *KEYS])
        said = "The path of a picture, sound or clip in a question attaches that file too."
        self.screen.note(said)

    @_command("", "end the chat", "exit", "bye")
    def quit(self, text: str) -> None:
        raise EOFError


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ApiError(f"expected a number, got {text!r}" if text else "a number is missing")
    return int(text)


NAMES = {f"/{alias}": name for name, one in COMMANDS.items() for alias in (name, *one.aliases)}
"""Commands as they are written, and their names."""
