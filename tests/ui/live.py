"""Real processes: a server, and the page in front of it."""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import uvicorn

from mico_chat.media import MediaDecoder
from mico_server.app import create_app
from mico_server.settings import ServerSettings
from tests.fakes import FakeAssistant

START_S = 240
"""A machine that tests other things meanwhile loads the model slowly."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


class Command:
    """A module that serves at ``url``; it may be started again after a stop.

    ``ready`` is a URL, or a path of this one, that answers once the program is ready.
    """

    def __init__(self, folder: Path, module: str, ready: str, *arguments: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._ready = ready
        self._log = folder / "log"
        self._command = [sys.executable, "-m", *module.split(), "--port", str(port), *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        self.wait()

    def wait(self) -> None:
        """Wait until it answers."""
        assert self._process is not None
        deadline = time.monotonic() + START_S
        with httpx.Client(base_url=self.url, trust_env=False) as client:
            while time.monotonic() < deadline and self._process.poll() is None:
                try:
                    if client.get(self._ready).status_code == 200:
                        return
                except httpx.TransportError:
                    pass  # it does not listen yet
                time.sleep(0.1)
        pytest.fail(f"{self._command} does not answer; it said:\n{self.said()}")

    def stop(self, *, kill: bool = False) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        self._process.wait(60)
        self._process = None

    def said(self) -> str:
        return self._log.read_text(errors="replace")


class FakeServer(Command):
    def __init__(self, folder: Path) -> None:
        self._words = folder / "words"
        arguments = ("--data-dir", str(folder / "data"), "--words", str(self._words))
        super().__init__(folder, "tests.ui.live", "/health/ready", *arguments)

    def allow(self, words: int | None = None) -> None:
        """Let each answer go on until it has this many words, or to its end."""
        new = self._words.with_suffix(".new")
        new.write_text("inf" if words is None else str(words))
        new.replace(self._words)


class MiniSite(Command):
    """The page and the server that it starts, whose data are in ``data``."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.data = data
        port = str(free_port())
        ready = f"http://127.0.0.1:{port}/health/ready"
        arguments = ("--api-port", port, "--data-dir", str(data))
        super().__init__(folder, "mico_chat.cli ui", ready, *arguments)


def main() -> None:
    """Serve a fake assistant, which says no more words than the number in the file ``--words``.

    The file may change while the service runs. The real decoder decodes the media.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--words", type=Path, required=True)
    options = parser.parse_args()
    with MediaDecoder() as decoder:
        assistant = FakeAssistant(allowed=lambda: float(options.words.read_text()), decoder=decoder)
        app = create_app(lambda: assistant, ServerSettings(data_dir=options.data_dir))
        uvicorn.run(app, port=options.port, log_level="warning", timeout_graceful_shutdown=1)


if __name__ == "__main__":
    main()
