"""Real processes: a server, and the page in front of it."""

import math
import multiprocessing
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from mico_chat.media import MediaDecoder
from mico_chat.media.kinds import KINDS, Kind
from mico_server.app import create_app
from mico_server.host import ModelSource
from mico_server.settings import ServerSettings
from tests.support.fakes import WALL, FakeAssistant
from tests.support.waiting import PATIENCE_S, until


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def wait_for(url: str, alive: Callable[[], bool], status: int = 200) -> None:
    """Wait until a process answers at ``url`` with this status; fail when it ends before."""
    with httpx.Client(trust_env=False, timeout=PATIENCE_S) as client:

        def answers() -> bool:
            try:
                return client.get(url).status_code == status
            except httpx.TransportError:
                return False  # it does not listen yet

        until(answers, alive, pause_s=0.1)


class Command:
    """``mico-chat ui``, which serves a page at ``url`` once ``ready`` answers, a URL or a path."""

    def __init__(self, folder: Path, ready: str, *arguments: str) -> None:
        port = str(free_port())
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "log"
        command = [sys.executable, "-m", "mico_chat.cli", "ui", "--port", port, *arguments]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        ready = ready if "://" in ready else self.url + ready
        try:
            wait_for(ready, lambda: self._process.poll() is None)
        except BaseException as error:
            self._process.kill()
            pytest.fail(f"{command} does not answer: {error}; it said:\n{self.said()}")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)

    def said(self) -> str:
        return self._log.read_text(errors="replace")


class MiniSite(Command):
    """The page and the server that it starts, whose data are in ``data``."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.data = data
        port = str(free_port())
        ready = f"http://127.0.0.1:{port}/health/ready"
        super().__init__(folder, ready, "--api-port", port, "--data-dir", str(data))


QUIET: dict[str, Any] = {"log_level": "warning", "timeout_graceful_shutdown": 1}


class FakeServer:
    """A service with fake assistants, whose process a test may kill and start again.

    ``models`` has the kinds of media that each of them reads, by its name, and ``listeners`` makes
    the listeners of those that listen.

    The process is forked from one that has imported everything, so that it starts at once.
    """

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, Sequence[Kind]] | None = None,
        listeners: Mapping[str, Callable[[], Any]] | None = None,
    ) -> None:
        self._models, self._listeners = models or {"fake": KINDS}, listeners or {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["mico_server.app", "tests.support.fakes"])
        self._folder = folder
        self._port = free_port()
        self._words = self._context.Value("d", math.inf)
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        what = (self._port, self._folder, self._words, self._models, self._listeners)
        self._process: BaseProcess = self._context.Process(target=_serve, args=what)
        self._process.start()
        try:
            wait_for(f"{self.url}/health/ready", self._process.is_alive)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def kept(self) -> str:
        """What the newest turn has as its answer on the disk."""
        with closing(sqlite3.connect(self._folder / "mico-chat.db")) as database:
            newest = "SELECT answer FROM turns ORDER BY created_at DESC LIMIT 1"
            return str(database.execute(newest).fetchone()[0]).strip()

    def allow(self, words: float = math.inf) -> None:
        """Let each answer go on until it has this many words, or to its end."""
        self._words.value = words


def _serve(
    port: int,
    folder: Path,
    words: Any,
    models: Mapping[str, Sequence[Kind]],
    listeners: Mapping[str, Callable[[], Any]],
) -> None:
    """Serve fake assistants; the real decoder decodes the media."""

    def load(name: str) -> FakeAssistant:
        listener = listeners[name]() if name in listeners else None
        allowed = partial(getattr, words, "value")
        assistant = FakeAssistant(allowed=allowed, decoder=decoder, listener=listener)
        assistant.name, assistant.reads = name, tuple(models[name])
        assistant.encoder.depths = WALL
        return assistant

    with MediaDecoder() as decoder:
        sources = [
            ModelSource(name, partial(load, name), reads=partial(tuple, kinds))
            for name, kinds in models.items()
        ]
        app = create_app(sources, ServerSettings(data_dir=folder))
        uvicorn.run(app, port=port, ws="websockets-sansio", **QUIET)
