"""A server of one's own: ``mico-chat serve`` as a child process, on a free port of this machine."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from mico_ui.client import ApiError

# The server ends with the process that started it, however that ends: its standard input does.
_MAIN = """
import os, signal, sys, threading

def end_with_parent():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with_parent, daemon=True).start()
from mico_chat.cli.main import main
main(sys.argv[1:])
"""

_END_S = 15.0
"""Seconds that a server may take to end before it is killed."""

RESTARTS, RESTARTS_S = 3, 300.0
"""How often a server that has died is started again, within how many seconds."""

_REFUSED = 2
"""The exit status of a server that cannot start as it was asked to; nor can it the next time."""


def new_secret() -> str:
    """What a server of one's own takes in a key's place, from the program that started it."""
    return f"ours-{secrets.token_urlsafe(32)}"


def environment(secret: str | None) -> dict[str, str]:
    """The environment of a server that takes ``secret``; None: the server takes keys alone."""
    ours = {} if secret is None else {"MICO_LOCAL_SECRET": secret}
    return {**{n: v for n, v in os.environ.items() if n != "MICO_LOCAL_SECRET"}, **ours}


def tied_to_us(*arguments: str) -> list[str]:
    """The command that runs ``mico-chat`` until its standard input, a pipe of ours, ends."""
    return [sys.executable, "-c", _MAIN, *arguments]


class KeptRunning:
    """A server's process, which is started again when it dies, until it does so too often.

    ``start`` starts it. ``announce`` is told when and why. ``on_left`` is called, by another
    thread, when it is not started any more: ``left`` then says why.
    """

    def __init__(
        self,
        start: Callable[[], subprocess.Popen[Any]],
        *,
        running: subprocess.Popen[Any] | None = None,
        announce: Callable[[str], None] = lambda line: None,
        on_left: Callable[[], None] = lambda: None,
    ) -> None:
        """``running`` is one that has started already."""
        self.process = running or start()
        self.left: str | None = None
        self._start = start
        self._announce = announce
        self._on_left = on_left
        self._ending = False
        self._lock = threading.Lock()
        threading.Thread(target=self._keep, daemon=True).start()

    def _keep(self) -> None:
        starts = [time.monotonic()]
        while True:
            status = self.process.wait()
            with self._lock:
                if self._ending:
                    return
                now = time.monotonic()
                starts = [start for start in starts if now - start < RESTARTS_S]
                if status == _REFUSED or len(starts) > RESTARTS:
                    times = "" if len(starts) < 2 else f", {len(starts)} times in a row"
                    self.left = f"the server ended with {_told(status)}{times}"
                    break
                for pipe in (self.process.stdin, self.process.stdout):
                    if pipe is not None:
                        pipe.close()
                self._announce(f"the server ended with {_told(status)}; it is started again")
                starts.append(now)
                self.process = self._start()
        self._on_left()

    def release(self) -> subprocess.Popen[Any]:
        """The process, which is not started again when it ends now."""
        with self._lock:
            self._ending = True
        return self.process


def _told(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


@contextmanager
def local_server(arguments: Sequence[str] = (), secret: str | None = None) -> Iterator[str]:
    """The address of a server that has loaded its model; it ends with the block.

    ``arguments`` are more flags of ``mico-chat serve``. It takes ``MICO_SERVER_*`` variables as
    always, but for its address. A request that sends ``secret`` needs no key. A Ctrl-C in the
    terminal does not reach it. When it dies later, it is started again at the same address
    (:class:`KeptRunning`).

    Raises:
        ApiError: with the server's own words, when it ends before it is ready.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:

        def start(port: str) -> subprocess.Popen[str]:
            own = ["--host", "127.0.0.1", "--port", port, "--shutdown-timeout-s", "2"]
            return subprocess.Popen(
                tied_to_us("serve", *arguments, *own),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(secret),
                start_new_session=True,
            )

        process = start("0")
        try:
            address = _address(process, log)
            port = address.rpartition(":")[2]
            kept = KeptRunning(lambda: start(port), running=process)
            try:
                yield address
            finally:
                process = kept.release()
        finally:
            _end(process)


def _address(process: subprocess.Popen[str], log: IO[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"ready at (http\S+)", line):
            return found[1]
    code = process.wait()
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = (told or lines or [f"exit status {code}"])[-1]
    raise ApiError(f"the server could not start: {reason}")


def _end(process: subprocess.Popen[str]) -> None:
    with process:  # closes its pipes
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
