"""``mico-chat chat``: with a person at a terminal, or one question in a pipe."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from rich.console import Console

from mico_chat.media.kinds import Kind
from mico_ui import calls
from mico_ui.answers import Delta, Model
from mico_ui.calls import Question, Upload
from mico_ui.client import ApiError, Client
from mico_ui.local_server import local_server, new_secret
from mico_ui.terminal.screen import Screen
from mico_ui.terminal.settings import applied, setting
from mico_ui.terminal.words import Flow, printable

KEY_FAULTS = {
    "missing_api_key": "this server asks for a key: give it with --key or MICO_API_KEY",
    "invalid_api_key": "the key of --key or MICO_API_KEY is not valid on this server",
}
"""What is told of the server's errors about keys, by their codes."""


@dataclass(frozen=True)
class Asked:
    """What the command line says. Without ``api`` a server is started, with the flags ``serve``.

    ``settings`` are as they are written; ``go_on``: with the last conversation.
    """

    question: str | None = None
    media: Sequence[tuple[Kind, Path]] = ()
    api: str | None = None
    key: str | None = None
    serve: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    go_on: bool = False


def main(asked: Asked) -> int:
    """The exit status: 0, 2 after an error, which is told in one line, 130 after Ctrl-C."""
    try:
        settings = {name: setting(name, text) for name, text in asked.settings.items()}
        interactive = asked.question is None and sys.stdin.isatty() and sys.stdout.isatty()
        question = None if interactive else _question(asked)
        with ExitStack() as stack:
            progress = Screen(Console(stderr=True, highlight=False))
            api, key = _server(asked, stack, progress)
            client = stack.enter_context(Client(api, key))
            model = _model(client, progress)
            if question is not None:
                _answer(client, asked, settings, question)
            else:
                _chat(client, model, asked, settings)
        return 0
    except ApiError as error:
        told = KEY_FAULTS.get(error.code or "", str(error))
        print(f"error: {' '.join(printable(told).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _question(asked: Asked) -> str:
    """The question of the command line, and what comes through a pipe behind it."""
    parts = [asked.question or ""]
    if not sys.stdin.isatty():
        parts.append(sys.stdin.buffer.read().decode(errors="replace"))
    question = "\n\n".join(part.strip() for part in parts if part.strip())
    if not question and not asked.media:
        raise ApiError('there is no question: echo "What is it?" | mico-chat chat --image cat.jpg')
    return question


def _server(asked: Asked, stack: ExitStack, progress: Screen) -> tuple[str, str | None]:
    """The server's address, and the key for it; it is started and ended here if none is named."""
    if asked.api is not None:
        return asked.api, asked.key
    secret = new_secret()
    with progress.waiting("starting a server and loading the model"):
        return stack.enter_context(local_server(asked.serve, secret)), asked.key or secret


def _model(client: Client, progress: Screen) -> Model:
    """The served model; a server that is still loading it is waited for."""
    with ExitStack() as waiting:
        told = False
        while True:
            try:
                return client.send(calls.models())[0]
            except ApiError as error:
                if error.status != HTTPStatus.SERVICE_UNAVAILABLE:
                    raise
                if not told:
                    waiting.enter_context(progress.waiting(str(error)))
                told = True
            time.sleep(0.5)


def _last(client: Client) -> str | None:
    """The id of the conversation that was answered last."""
    found = client.send(calls.conversations(limit=1)).data
    return found[0].id if found else None


def _answer(client: Client, asked: Asked, settings: dict[str, Any], text: str) -> None:
    """One answer, and nothing else, to standard output."""
    media = [Upload(kind, path) for kind, path in asked.media]
    id_ = _last(client) if asked.go_on else None
    question = applied(settings, Question(text, media, id_, asked.system))
    flow = Flow(sys.stdout, Console().width) if sys.stdout.isatty() else None
    with client.stream(question) as events:
        for event in events:
            if not isinstance(event, Delta):
                continue
            if flow is not None:
                flow.feed(event.text)
            else:
                sys.stdout.write(event.text)
                sys.stdout.flush()
    if flow is not None:
        flow.end()
    else:
        print(flush=True)


def _chat(client: Client, model: Model, asked: Asked, settings: dict[str, Any]) -> None:
    # Not needed for one answer.
    from mico_ui.terminal.chat import Chat
    from mico_ui.terminal.prompt import kept_history, reader
    from mico_ui.terminal.talk import Talk

    talk = Talk(client)
    for name, text in asked.settings.items():
        talk.set(name, text)
    screen = Screen(Console(highlight=False))
    chat = Chat(talk, screen, model, reader(kept_history()))
    screen.note(f"{model.id} at {client.api} - /help lists commands, Ctrl-D ends")
    if asked.go_on and (last := _last(client)) is not None:
        screen.transcript(talk.open(last))
    if asked.system is not None:
        talk.system = asked.system
    for kind, path in asked.media:
        chat.attach(kind, path)
    chat.run()
