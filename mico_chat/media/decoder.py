"""MediaDecoder: decodes untrusted media in worker processes, which a hostile file may kill."""

import logging
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import IO, Protocol, Self

from mico_chat import system
from mico_chat.errors import MediaError, MicoError
from mico_chat.media.file import MediaFile, MediaLimits
from mico_chat.media.medium import Medium
from mico_chat.media.worker import read_header, read_medium, write_file, write_header

log = logging.getLogger(__name__)

_START_S = 60.0  # seconds in which a worker must start, on a slow disk and a busy machine
_GRACE_S = 1.0
"""Seconds after the time limit before a worker is killed. A worker that stops decoding in this time
stays in use."""

_MAIN = "from mico_chat.media.worker import main\nmain(*map(int, sys.argv[2:]))"


class Decoder(Protocol):
    def decode(self, file: MediaFile) -> Medium: ...


class MediaDecoder:
    """Decodes media in ``workers`` processes under ``limits`` of memory and time.

    A file that crashes a worker, or exceeds its time or memory, gets a MediaError; the next file
    gets a new worker. Threads may share a decoder. A worker starts when it is first needed.
    """

    def __init__(self, limits: MediaLimits | None = None, *, workers: int = 1) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1")
        self.limits = limits or MediaLimits()
        self._workers = [_Worker(self.limits) for _ in range(workers)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def decode(self, file: MediaFile) -> Medium:
        file.check(self.limits)
        worker = self._idle.get()
        try:
            return worker.decode(file)
        finally:
            self._idle.put(worker)

    def pids(self) -> list[int]:
        return [pid for worker in self._workers if (pid := worker.pid) is not None]

    def exposed(self) -> str | None:
        """Why the workers that have started are not isolated; None if they are."""
        return next((worker.exposed for worker in self._workers if worker.exposed), None)

    def close(self) -> None:
        """End the workers, and with them any decoding still under way."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_CLOSED = "this MediaDecoder is closed; make a new one"


class _Worker:
    def __init__(self, limits: MediaLimits) -> None:
        self.limits = limits
        self.exposed: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._files: socket.socket | None = None
        self._closed = False
        self._lock = threading.Lock()  # no process starts after ``close()``

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def decode(self, file: MediaFile) -> Medium:
        if self.pid is None:
            self._start()
        process = self._process
        assert process is not None
        with _deadline(process, self.limits.timeout_s + _GRACE_S) as passed:
            try:
                requests, answers = _pipes(process)
                write_file(requests, file, self._files)
                header = read_header(answers)
                if "clip" in header and file.view.sampler is not None:
                    n_frames, seconds = header["clip"]
                    frames = file.view.sampler(int(n_frames), float(seconds))
                    write_header(requests, {"frames": frames})
                    requests.flush()
                    header = read_header(answers)
                try:
                    return read_medium(answers, header, self.limits.memory_mb * 1024 * 1024)
                finally:
                    if header["large"]:  # the next medium gets a new process
                        self.stop()
            except MediaError:
                raise
            except (EOFError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                # The worker is dead or its answer is malformed: it is not used again.
                self.stop()
                if passed.is_set():
                    raise self.limits.out_of_time(file.name) from error
                log.warning("%s: decoder process %d ended: %r", file.name, process.pid, error)
                reason = f"the decoder process {_ended(process)} while reading it; "
                reason += "the file is damaged or hostile"
                raise MediaError(file.name, reason, "killed") from error
            except BaseException:  # interrupted: the next request must not get this answer
                self.stop()
                raise

    def _start(self) -> None:
        self.stop()
        with self._lock:
            if self._closed:
                raise MicoError(_CLOSED)
            self._files, theirs = socket.socketpair() if system.HANDS_FILES else (None, None)
            handed = () if theirs is None else (theirs.fileno(),)
            with theirs or nullcontext():
                process = system.start_apart(_MAIN, *map(str, handed), pass_fds=handed)
            self._process = process
        with _deadline(process, _START_S):
            try:
                requests, answers = _pipes(process)
                write_header(requests, self.limits.model_dump(exclude_unset=True))
                requests.flush()
                self.exposed = read_header(answers)["exposed"]
            except (EOFError, OSError, ValueError) as error:
                if self._closed:
                    raise MicoError(_CLOSED) from error
                system.kill(process)
                said = process.stderr.read().decode(errors="replace") if process.stderr else ""
                self.stop()
                last = said.strip().splitlines()[-1:] or ["it said nothing"]
                raise MicoError(f"the media decoder process does not start: {last[0]}") from error
        log.debug("decoder process %d started", process.pid)
        if self.exposed is not None:
            _warn_once(self.exposed)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self.stop()

    def stop(self) -> None:
        process, self._process = self._process, None
        files, self._files = self._files, None
        if files is not None:
            files.close()
        if process is not None:
            system.end(process)


@cache
def _warn_once(why: str) -> None:
    log.warning("media files are decoded in a process that is not isolated: %s", why)


@contextmanager
def _deadline(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """Kill a process when the time is over. The event tells whether it was killed."""
    passed = threading.Event()

    def kill() -> None:
        passed.set()
        system.kill(process)

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield passed
    finally:
        timer.cancel()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _ended(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code is None or code >= 0:
        return f"ended with status {code}"
    names = {one.value: one.name for one in signal.Signals}
    return f"was killed by {names.get(-code, f'signal {-code}')}"
