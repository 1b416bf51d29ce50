"""Other programs that benchmarks start, and the memory of processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from mico_chat.errors import ConfigError
from mico_ui.local_server import local_server

START_S, END_S = 300.0, 10.0
"""Seconds that a program may take to start, and to end before it is killed."""


def two_free_ports() -> tuple[int, int]:
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as two:
        return one.getsockname()[1], two.getsockname()[1]


@contextmanager
def program(
    *command: str, ready: str = r"(?:ready|chat) at (http\S+)"
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Python program, and the group of the first line it prints that ``ready`` matches.

    It runs in a session of its own, which is killed at the end if it does not end.

    Raises:
        ConfigError: the program ended, or took too long.
    """
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    late = threading.Timer(START_S, process.kill)
    late.start()
    try:
        said = (re.search(ready, line) for line in process.stdout or ())
        found = next(filter(None, said), None)
        if found is None:
            raise ConfigError(f"{' '.join(command)} ended at once or took over {START_S:g} s")
        late.cancel()
        threading.Thread(target=lambda: list(process.stdout or ()), daemon=True).start()
        yield process, found[1]
    finally:
        late.cancel()
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def service(stack: ExitStack, *flags: str, engine: str = "llamacpp") -> str:
    """The URL of a ``mico-chat serve`` with data of its own, until the stack ends."""
    data = stack.enter_context(TemporaryDirectory())
    server = local_server(["--engine", engine, "--data-dir", data, *flags])
    return stack.enter_context(server)[0]


def family(pids: Iterable[int]) -> Iterator[psutil.Process]:
    """The processes and all that they have started."""
    for pid in pids:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            yield from (process, *process.children(recursive=True))


def memory(fields: Sequence[str], pid: int | str = "self", file: str = "status") -> int:
    """The sum in bytes of a process's fields, such as VmHWM; 0 if the process has ended."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/{file}").read_text()
        found = re.findall(rf"(?m)^(?:{'|'.join(fields)}):\s+(\d+) kB", text)
        return sum(map(int, found)) * 1024
    return 0


def forget_peak() -> None:
    """Let VmHWM, the highest mark of this process, count from here on (proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")
