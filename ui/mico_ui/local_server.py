"""A server of one's own: ``mico-chat serve`` as a child process, on a free port of this machine."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from mico_ui.client import ApiError

# The server ends with the process that started it, however that ends: its standard input does.
_MAIN = """
import os, signal, sys, threading

def end_with_parent():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with_parent, daemon=True).start()
from mico_chat.cli import main
main(sys.argv[1:])
"""

_END_S = 15.0
"""Seconds that a server may take to end before it is killed."""


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


@contextmanager
def local_server(arguments: Sequence[str] = (), secret: str | None = None) -> Iterator[str]:
    """The address of a server that has loaded its model; it ends with the block.

    ``arguments`` are more flags of ``mico-chat serve``. It takes ``MICO_SERVER_*`` variables as
    always, but for its address. Who sends ``secret`` needs no key. A Ctrl-C in the terminal does
    not reach it.

    Raises:
        ApiError: with the server's own words, when it ends before it is ready.
    """
    own = ["--host", "127.0.0.1", "--port", "0", "--shutdown-timeout-s", "2"]
    command = tied_to_us("serve", *arguments, *own)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment(secret),
            start_new_session=True,
        )
        try:
            yield _address(process, log)
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
