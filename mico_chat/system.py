"""What Linux, macOS and Windows do not have alike: it is imported and called here alone.

A system is asked for what it has and not for its name, so that a test can take it away.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any


def _module(name: str) -> Any:
    """A module of Python that some systems lack; None there."""
    with suppress(ImportError):
        return import_module(name)
    return None


fcntl, msvcrt, resource, termios = map(_module, ("fcntl", "msvcrt", "resource", "termios"))

LIBC = ctypes.CDLL("msvcrt" if os.name == "nt" else None, use_errno=True)
_TRIM = getattr(LIBC, "malloc_trim", None)  # glibc's

HANDS_FILES = fcntl is not None
"""Whether an open file can be handed to another process."""

APART: dict[str, Any] = {"start_new_session": True}
"""Arguments of Popen for a process that does not get the Ctrl-C of this one's terminal."""
if hasattr(subprocess, "CREATE_NEW_PROCESS_GROUP"):
    APART = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}

PIPE_ENDED = 141  # 128 and SIGPIPE: the exit status of a program whose reader has gone


ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "MICO_KINDS")


def start_apart(main: str, *arguments: str, **given: Any) -> subprocess.Popen[bytes]:
    """A Python that runs ``main`` with pipes, for what may be hostile: it gets of the environment
    what Python needs to start, and so no secret, and one thread, as thread pools reserve address
    space. Ctrl-C in a terminal is left to this process.

    Not multiprocessing: it would import the caller's main module, and with it torch. It also breaks
    scripts without an ``if __name__ == "__main__"`` guard.
    """
    environment = {key: os.environ[key] for key in ENVIRONMENT if key in os.environ}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    path = json.dumps([str(Path(entry).absolute()) for entry in sys.path])
    code = f"import json, sys\nsys.path[:] = json.loads(sys.argv[1])\n{main}"
    return subprocess.Popen(
        [sys.executable, "-c", code, path, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        **APART,
        **given,
    )


def kill(process: subprocess.Popen[Any]) -> None:
    """Kill a process that is ``APART``, with all that it has started where that is a group."""
    if not hasattr(os, "killpg"):
        process.kill()
        return
    # All have ended; on macOS they may not have been reaped.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process that is ``APART``, wait for it and close its pipes."""
    kill(process)
    process.wait()
    for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
        with suppress(BrokenPipeError):  # an unsent request
            pipe.close()


def end_with_parent() -> None:
    """Have Linux kill this process when its parent ends."""
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def interrupt() -> None:
    """Do in any thread what Ctrl-C does."""
    if fcntl is None:  # Windows would end the process
        interrupt_main()
    else:
        os.kill(os.getpid(), signal.SIGINT)


def limit(name: str, most: int) -> bool:
    """Set a limit of this process, such as RLIMIT_FSIZE; False where there are none."""
    if resource is not None:
        resource.setrlimit(getattr(resource, name), (most, most))
    return resource is not None


def allow_open_files(needed: int) -> int:
    """Let this process open so many files; returns how many of them it may."""
    if resource is None:  # Windows has no such limit
        return needed
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed: int = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed


@contextmanager
def alarm(seconds: float, stop: Callable[..., None]) -> Iterator[None]:
    """Call ``stop`` when the block has run so long, where the system has such a clock."""
    has_one = hasattr(signal, "setitimer")
    if has_one:
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if has_one:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def unechoed() -> Iterator[None]:
    """Keys pressed while the block runs are not shown, and wait for the next prompt."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before, quiet = termios.tcgetattr(sys.stdin), termios.tcgetattr(sys.stdin)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)  # the latter would take a Ctrl-D for itself
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def lock(file: IO[Any]) -> None:
    """Wait until no other process has the file locked; closing it ends the lock."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)
    elif msvcrt is not None:
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)


def sync(path: Path) -> None:
    """Have a file, or a folder's entries, on the disk. Windows opens no folder."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_back_memory() -> None:
    """Have the C library give its free memory back, where it can."""
    if _TRIM is not None:
        _TRIM(0)


def cores() -> set[int] | None:
    """The cores on which the process may run; None where the system does not tell."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def is_nice() -> bool:
    """Whether this process has given its priority away."""
    return hasattr(os, "getpriority") and os.getpriority(os.PRIO_PROCESS, 0) > 0
