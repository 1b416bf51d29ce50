"""``mico-chat chat`` and ``talk``: with a person at a terminal, or one question in a pipe."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from mico_chat.late import late
from mico_chat.media.kinds import Kind
from mico_chat.system import PIPE_ENDED
from mico_chat.wire import DeltaEvent, ModelInfo
from mico_ui import routes
from mico_ui.client import ApiError, AsyncClient, Client
from mico_ui.local_server import local_server
from mico_ui.routes import Question, Upload
from mico_ui.terminal.screen import Screen, WordWrap, printable
from mico_ui.terminal.talk import Talk, applied, named, setting

# One answer needs neither.
with late():
    from mico_ui.terminal import chat as chat_commands
    from mico_ui.terminal import prompt, voice

# By the code of a server's error: the message in place of the server's own.
KEY_FAULTS = {
    "missing_api_key": "this server asks for a key: give it with --key or MICO_API_KEY",
    "invalid_api_key": "the key of --key or MICO_API_KEY is not valid on this server",
}


@dataclass(frozen=True)
class ChatCommand:
    """The arguments of the command. Without ``api`` a server is started, with the flags ``serve``.

    ``settings`` are as they are written. ``model`` is one of those that ``api`` serves. ``go_on``
    continues the last conversation. With ``talk`` it is spoken, with or without headphones.
    """

    question: str | None = None
    media: Sequence[tuple[Kind, Path]] = ()
    api: str | None = None
    key: str | None = None
    serve: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    go_on: bool = False
    model: str | None = None
    talk: Literal["loudspeaker", "headphones"] | None = None


def main(command: ChatCommand) -> int:
    """The exit status: 0, 2 after an error, which is printed in one line, 130 after Ctrl-C."""
    try:
        settings = {name: setting(name, text) for name, text in command.settings.items()}
        interactive = command.question is None and sys.stdin.isatty() and sys.stdout.isatty()
        question = None if interactive or command.talk else _question(command)
        if command.talk:
            voice.check_devices()
        with ExitStack() as stack:
            progress = Screen(Console(stderr=True, highlight=False))
            api, key = command.api, command.key
            if api is None:
                with progress.waiting("starting a server and loading the model"):
                    api, secret = stack.enter_context(local_server(command.serve))
                key = key or secret
            client = stack.enter_context(Client(api, key, home=True))
            model = named(_models(client, progress), command.model)
            if command.talk:
                last = _last(client) if command.go_on else None
                where = {"model": command.model, "conversation": last or "new"}
                live = partial(AsyncClient, api, key, home=True)
                screen = Screen(Console(highlight=False))
                voice.talk(live, screen, command.talk == "headphones", **where)
            elif question is not None:
                _answer(client, command, settings, question)
            else:
                _chat(client, model, command)
        return 0
    except ApiError as error:
        message = KEY_FAULTS.get(error.code or "", str(error))
        print(f"error: {' '.join(printable(message).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_ENDED


def _question(command: ChatCommand) -> str:
    """The question of the command line, and behind it the text that comes through a pipe."""
    parts = [command.question or ""]
    if not sys.stdin.isatty():
        parts.append(sys.stdin.buffer.read().decode(errors="replace"))
    question = "\n\n".join(part.strip() for part in parts if part.strip())
    if not question and not command.media:
        raise ApiError('there is no question: echo "What is it?" | mico-chat chat --image cat.jpg')
    return question


def _models(client: Client, progress: Screen) -> list[ModelInfo]:
    with progress.waiting("waiting for the server's model"):
        while True:
            try:
                return client.send(routes.models())
            except ApiError as error:
                if error.status != HTTPStatus.SERVICE_UNAVAILABLE:
                    raise
            time.sleep(0.5)


def _last(client: Client) -> str | None:
    calls = (routes.conversations(limit=1, pinned=one, archived=False) for one in (False, True))
    found = [summary for call in calls for summary in client.send(call).data]
    return max(found, key=lambda summary: summary.updated_at).id if found else None


def _answer(client: Client, command: ChatCommand, settings: dict[str, Any], text: str) -> None:
    media = [Upload(kind, path) for kind, path in command.media]
    id_ = _last(client) if command.go_on else None
    asked = Question(text, media, id_, command.system, model=command.model)
    question = applied(settings, asked)
    with client.stream(question) as events:
        pieces = (event.text for event in events if isinstance(event, DeltaEvent))
        if not sys.stdout.isatty():
            for piece in pieces:
                print(piece, end="", flush=True)
            print(flush=True)
            return
        wrapped = WordWrap(sys.stdout, Console().width)
        for piece in pieces:
            wrapped.feed(piece)
        wrapped.end()


def _chat(client: Client, model: ModelInfo, command: ChatCommand) -> None:
    talk = Talk(client, model=command.model)
    for name, text in command.settings.items():
        talk.set(name, text)
    screen = Screen(Console(highlight=False))
    chat = chat_commands.Chat(talk, screen, model, prompt.reader(prompt.kept_history()))
    screen.note(f"{model.id} at {client.api} - /help lists commands, Ctrl-D ends")
    if command.go_on and (last := _last(client)) is not None:
        screen.transcript(talk.open(last))
    if command.system is not None:
        talk.system = command.system
    for kind, path in command.media:
        chat.attach(kind, path)
    chat.run()
