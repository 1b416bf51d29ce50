"""The conversation as a person has it: lines in, commands and answers out."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len

from mico_chat.media.kinds import Kind
from mico_ui.answers import ConversationSummary, Model
from mico_ui.calls import Upload
from mico_ui.client import ApiError
from mico_ui.terminal.commands import COMMANDS, NAMES
from mico_ui.terminal.paths import NoFileError, dropped
from mico_ui.terminal.prompt import unechoed
from mico_ui.terminal.screen import Screen
from mico_ui.terminal.talk import Talk

if TYPE_CHECKING:
    from mico_chat.media import MediaDecoder


class Chat:
    """Reads lines with ``read``, which gets what stands before the cursor, until it ends.

    ``listed`` are the conversations that /history has shown last.
    """

    def __init__(
        self, talk: Talk, screen: Screen, model: Model, read: Callable[[str], str]
    ) -> None:
        self.talk = talk
        self.screen = screen
        self.model = model
        self.listed: list[ConversationSummary] = []
        self._read = read
        self._open = ExitStack()
        self._decoder: MediaDecoder | None = None

    def run(self) -> None:
        """Until the user ends it; media that were never asked about are taken back then."""
        with self._open:
            while True:
                try:
                    line = self._read(self._before())
                except KeyboardInterrupt:
                    self.screen.note("Ctrl-D or /quit ends the chat")
                    continue
                except EOFError:
                    break
                try:
                    with unechoed():
                        self.take(line)
                except EOFError:
                    break
                except KeyboardInterrupt:
                    self.screen.note("stopped")
                except (ApiError, NoFileError) as error:
                    self.screen.error(str(error))
            self.talk.detach()

    def take(self, line: str) -> None:
        """What a line asks for: a command, files to attach, a question, or several of these.

        Raises:
            ApiError, NoFileError: if it cannot be had.
            EOFError: for the command that ends the chat.
        """
        text = _unquoted(line)
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
        """Send a file to the server, and show it and what was found in it."""
        with self.screen.waiting(f"sending {path.name}"):
            stored = self.talk.attach(Upload(kind, path))
        self.screen.medium(len(self.talk.attached), stored)
        self._show(kind, path)

    def _show(self, kind: Kind, path: Path) -> None:
        """The file as coloured blocks, decoded in a process of its own like the server's."""
        if not self.screen.has_colours:
            return
        # What this needs takes a while to import, and may not be needed at all.
        from mico_chat.errors import MicoError
        from mico_chat.media import MediaDecoder, MediaFile
        from mico_ui.terminal.pictures import preview

        if self._decoder is None:
            self._decoder = self._open.enter_context(MediaDecoder())
        try:
            medium = self._decoder.decode(MediaFile(kind, path, path.name))
        except MicoError as error:  # the server has more room than this machine
            self.screen.note(f"no preview: {error}")
            return
        self.screen.show(preview(medium, self.screen.console.width))

    def _before(self) -> str:
        names = ", ".join(medium.name for medium in self.talk.attached)
        if cell_len(names) > self.screen.console.width // 2:
            names = f"{len(self.talk.attached)} media"
        return f"[{names}] > " if names else "> "


def _unquoted(line: str) -> str:
    text = line.strip()
    if text.startswith('"""'):
        return text.removeprefix('"""').removesuffix('"""').strip()
    return text
