"""``mico-chat serve`` as a child process of the terminal chat or of the page."""

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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

from mico_chat import system
from mico_chat.errors import ConfigError
from mico_ui.client import ApiError

# Standard input brings the secret, which an environment would show to other programs. The server
# ends when the process that started it ends: the input is closed then.
_MAIN = """
import os, signal, sys, threading

secret = sys.stdin.readline().strip() or None

def end_with_parent():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with_parent, daemon=True).start()
from mico_chat.cli.main import main
main(sys.argv[1:], local_secret=secret)
"""

END_S = 40.0  # for the last answers of a server, before it is killed
RESTARTS, RESTARTS_S = 3, 300.0  # so many within so many seconds
_REFUSED = 2  # the exit status of a server that cannot start with its settings


def local_url(host: str, port: int) -> str:
    """The address at which this machine reaches its own server that listens there."""
    if port == 0:
        raise ConfigError("port 0 is any free one, but the page must know the server's port")
    # A server that listens on every address is reached on this machine's own.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _new_secret() -> str:
    """A request to a local server that sends this in the place of a key needs no key."""
    return f"ours-{secrets.token_urlsafe(32)}"


def _start(arguments: Sequence[str], secret: str, **streams: Any) -> subprocess.Popen[str]:
    """``mico-chat serve`` in its own session, so that Ctrl-C reaches only the parent process."""
    command = [sys.executable, "-c", _MAIN, "serve", *arguments]
    how: dict[str, Any] = {"stdin": subprocess.PIPE, "text": True, **system.APART}
    process = subprocess.Popen(command, **how, **streams)
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has died already, which its watcher reports
        os.write(process.stdin.fileno(), f"{secret}\n".encode())
    return process


@dataclass
class KeptRunning:
    """A server's process; once it is watched, ``start`` starts it again until it dies too often.

    ``announce`` gets a line about each start. When the server is not started any more, another
    thread calls ``on_left``, and ``left`` says why.
    """

    process: subprocess.Popen[str]
    start: Callable[[], subprocess.Popen[str]]
    announce: Callable[[str], None] = lambda line: None
    on_left: Callable[[], None] = lambda: None
    left: str | None = None
    _ending: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def watch(self) -> None:
        threading.Thread(target=self._keep, daemon=True).start()

    def _keep(self) -> None:
        starts = [time.monotonic()]
        while True:
            with self.process:  # closes its pipes
                status = self.process.wait()
            with self._lock:
                if self._ending:
                    return
                now = time.monotonic()
                starts = [start for start in starts if now - start < RESTARTS_S]
                if status == _REFUSED or len(starts) > RESTARTS:
                    times = "" if len(starts) < 2 else f", {len(starts)} times in a row"
                    self.left = f"the server ended with {_in_words(status)}{times}"
                    break
                self.announce(f"the server ended with {_in_words(status)}; it is started again")
                starts.append(now)
                self.process = self.start()
        self.on_left()

    def end(self) -> None:
        with self._lock:
            self._ending = True
        _end(self.process)


def _in_words(status: int) -> str:
    signals = {-number.value: number.name for number in signal.Signals}
    return signals.get(status, f"status {status}")


@contextmanager
def local_server(arguments: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """The address and the secret of a server that has loaded its model; it ends with the block.

    ``arguments`` are more flags of ``mico-chat serve``; ``MICO_SERVER_*`` variables hold too, but
    for the address. A request that sends the secret in the place of a key needs no key. A server
    that dies later is started again at the same address.
    """
    secret = _new_secret()
    with tempfile.TemporaryFile("w+", errors="replace") as log:

        def start(port: str) -> subprocess.Popen[str]:
            own = ["--host", "127.0.0.1", "--port", port, "--shutdown-timeout-s", "2"]
            return _start([*arguments, *own], secret, stdout=subprocess.PIPE, stderr=log)

        kept = KeptRunning(start("0"), lambda: start(port))
        try:
            address = _address(kept.process, log)
            port = address.rpartition(":")[2]
            kept.watch()
            yield address, secret
        finally:
            kept.end()


def _address(process: subprocess.Popen[str], log: IO[str]) -> str:
    for line in process.stdout or ():
        if found := re.search(r"ready at (http\S+)", line):
            return found[1]
    code = process.wait()
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = (errors or lines or [f"exit status {code}"])[-1]
    raise ApiError(f"the server could not start: {reason}")


@contextmanager
def server_beside(arguments: Sequence[str], announce: Callable[[str], None]) -> Iterator[str]:
    """Run a server that prints to this process's terminal, during the block; gives its secret.

    ``announce`` gets a line when the server has died and is started again. The block is interrupted
    when the server cannot start or dies too often. A request that sends the secret in the place of
    a key needs no key.
    """
    secret = _new_secret()
    start = partial(_start, arguments, secret)
    # A program in a script's background ignores interrupts, and would miss the server's end.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    kept = KeptRunning(start(), start, announce, system.interrupt)
    try:
        kept.watch()  # from now on an interrupt may come
        yield secret
    except KeyboardInterrupt:
        if kept.left is None:
            raise
    finally:
        signal.signal(signal.SIGINT, interrupt)
        kept.end()
    if kept.left is not None:
        raise ConfigError(
            f"{kept.left}, for the reason above; --api-port takes another port, --api a server "
            "that runs already"
        )


def _end(process: subprocess.Popen[str]) -> None:
    with process:  # closes its pipes
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
